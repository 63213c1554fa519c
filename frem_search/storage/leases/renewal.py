"""The thread that keeps a worker's leases alive while it trains."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from frem_search.storage.statements import RENEW
from frem_search.storage.watchdog import answers_within

if TYPE_CHECKING:
    from frem_search.storage.database import Storage
    from frem_search.storage.leases.claims import Held

LONGEST_PAUSE_S = 5.0  # after a failure
END_TIMEOUT_S = 10.0


class Renewal:
    """Renews leases six times in their span, on a connection of its own, until it is stopped.

    Whatever fails is tried again: the worker meets the same error where it can tell it.

    Args:
        storage: The database.
        held: The trials by their keys; what is put in or taken out is seen.
        lease_s: The span.
    """

    def __init__(self, storage: "Storage", held: "Mapping[int, Held]", *, lease_s: float) -> None:
        self._storage, self._held, self._lease_s = storage, held, lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease-renewal", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, as soon as a renewal that is under way has ended."""
        self._stop.set()
        self._thread.join(END_TIMEOUT_S)

    def _renew_until_stopped(self) -> None:
        pause_s = self._lease_s / 6
        while not self._stop.wait(pause_s):
            try:
                with answers_within(min(self._lease_s / 6, END_TIMEOUT_S)):
                    self._renew()
                pause_s = self._lease_s / 6
            except Exception:  # noqa: BLE001 of any kind: a thread that ended would let all leases run out
                pause_s = min(self._lease_s / 30, LONGEST_PAUSE_S)

    def _renew(self) -> None:
        with self._storage.engine.begin() as connection:
            for held in list(self._held.values()):
                values = {"trial_id": held.id, "token": held.token, "epoch": held.epoch, "lease_s": self._lease_s}
                if connection.execute(RENEW, values).rowcount == 0:
                    held.is_lost = held.id in self._held  # not ours any more, unless it was finished just now
