"""Claim, hold, adopt and let go of trials: a RUNNING trial belongs to whoever holds its lease."""

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from frem_search.errors import DatabaseAwayError, LeaseLostError, StorageError, StudyNotFoundError
from frem_search.lease_statements import (
    CHECKPOINTED,
    COUNTS,
    FINISH,
    HOLD,
    KEEP_CURVE,
    KEEP_NOTE,
    LOCK_LEASE,
    RANKING,
    RELEASE,
    RENEW,
    RESUMED,
    RUNNING_TRIAL,
    RUNNING_TRIALS,
    SHARE_STUDY,
    TAKE,
)
from frem_search.processes import is_gone, this_process
from frem_search.storage import is_lost_connection
from frem_search.trial_page import note_attrs, note_version_key, trial_note

if TYPE_CHECKING:
    from frem_search.storage import Storage

T = TypeVar("T")
LEASE_S = 180.0
MAX_ATTEMPTS = 3
PATIENCE_S = 600.0  # with a database that is away when there is nothing to train meanwhile
BLINK_S = 1.0  # patience while there is something to train
AWAY_PAUSE_S = 5.0  # before a worker in training looks for it again


@dataclass
class _Unsent:
    """What the database has not been told yet, because it was out of reach."""

    reports: dict[int, float] = field(default_factory=dict)
    checkpoint: tuple[int, str] | None = None  # its epoch, and the curve up to it as JSON


@dataclass(eq=False)
class Held:
    """A trial that this worker holds."""

    trial: optuna.Trial
    token: str
    is_adopted: bool
    attempt: int
    epoch: int = 0  # how far the training is, for `status`
    is_lost: bool = False
    reported: int = field(default=0)  # the last step that the storage has
    unsent: "_Unsent" = field(default_factory=lambda: _Unsent())

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def id(self) -> int:
        """The trial's key in Optuna's tables."""
        return self.trial._trial_id


class Leases:
    """The leases that one worker holds on trials of one study; as a context, renewed by a thread.

    Args:
        storage: The database.
        study: Optuna's study, with sampler and pruner.
        distributions: Of every searched parameter; all are drawn when a trial is claimed.
        device: What the worker trains on, for `status`.
        lease_s: After how long without a sign of life the trial may be taken by others.
        max_attempts: How many attempts may fail to advance a checkpoint before the trial is FAIL.
        is_stopping: Asked while the database is away; once it says yes, nothing waits for it any longer.
    """

    def __init__(
        self,
        storage: "Storage",
        study: optuna.Study,
        *,
        distributions: Mapping[str, BaseDistribution],
        device: str = "cpu",
        lease_s: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._storage, self._study, self._distributions = storage, study, distributions
        self._study_id = study._study_id
        self._device, self._lease_s, self._max_attempts = device, lease_s, max_attempts
        self._worker = uuid.uuid4().hex
        self._held: dict[int, Held] = {}
        self._notes: dict[int, str] = {}  # of told trials, by their keys
        self._is_stopping, self._away_until = is_stopping, -math.inf
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew_until_stopped, name="lease-renewal", daemon=True)

    def __enter__(self) -> "Leases":
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewer.join()
        with suppress(StorageError):  # the database may be what ended the worker
            self.keep_notes()

    def claim(self) -> Held | Literal["spent", "busy"]:
        """Adopt an orphan, else take an enqueued trial, else ask for a new one.

        Returns:
            The trial; or "spent" if there is nothing left to do, or "busy" if others still hold trials, which may
            become orphans.

        Raises:
            StorageError: The database stayed out of reach.
        """
        claimed = self._patiently(self._claim)
        self._notes.clear()
        if isinstance(claimed, Held):
            self._held[claimed.id] = claimed
        return claimed

    def report(self, held: Held, value: float, *, step: int) -> None:
        """Store a report, unless it is stored already; while the database is away it is kept for later.

        Raises:
            LeaseLostError: Another worker holds the trial now.
        """
        if step > held.reported:
            held.unsent.reports[step] = value
            self._send(held)

    def should_prune(self, held: Held) -> bool:
        """Whether the stored reports say that the trial should end here; while the database is away it goes on."""
        if held.unsent.reports or isinstance(self._study.pruner, optuna.pruners.NopPruner):
            return False
        return self._patiently(lambda: self._study.pruner.prune(self._study, self._storage.optuna.get_trial(held.id)))

    def resumed(self, held: Held) -> None:
        """Note where the trial really goes on: an unusable checkpoint must not hide that later ones advance.

        Raises:
            LeaseLostError: Another worker holds the trial now.
        """

        def store() -> None:
            with self._storage.transaction() as connection:
                self._require(connection, held)
                connection.execute(RESUMED, {"trial_id": held.id, "token": held.token, "epoch": held.epoch})

        self._patiently(store)

    def checkpointed(self, held: Held, *, epoch: int, curve: Mapping[str, Any]) -> None:
        """Note that a checkpoint at `epoch` is stored, with the curve up to it; while the database is away, later.

        Raises:
            LeaseLostError: Another worker holds the trial now.
        """
        held.unsent.checkpoint = epoch, json.dumps(curve)
        self._send(held)

    def tell(
        self,
        held: Held,
        *,
        state: TrialState,
        value: float | None = None,
        step: int = 0,
        attrs: Mapping[str, Any],
        shown: Mapping[str, str] | None = None,
        curve: Mapping[str, Any] | None = None,
    ) -> None:
        """Finish a trial: last report, state, value, attributes and curve in one transaction.

        Its note for the dashboard follows with the next claim: it belongs to the study, whose row claims lock in turn,
        and no tell should stand in that line.

        Args:
            held: The trial.
            state: How it ended.
            value: Of a complete trial; that of a pruned one is its last report.
            step: At which the value is reported too; 0 for not at all.
            attrs: The trial's user attributes.
            shown: The attributes that announce files to Optuna's dashboard.
            curve: Its columns.

        Raises:
            LeaseLostError: Another worker holds the trial now; nothing was changed.
        """

        def store() -> None:
            with self._storage.transaction() as connection:
                if self._require(connection, held).is_told:
                    return  # stored before, but the connection was lost before the answer came
                self._store_unsent(connection, held)
                if value is not None and step > held.reported:
                    self._storage.optuna.set_trial_intermediate_value(held.id, step, value)
                for key, attr in (shown or {}).items():
                    self._storage.optuna.set_trial_system_attr(held.id, key, attr)
                self._finish(
                    connection, held.trial, state=state, value=value, attrs=attrs, token=held.token, epoch=held.epoch
                )
                if curve is not None:
                    connection.execute(KEEP_CURVE, {"trial_id": held.id, "curve": json.dumps(curve)})

        self._patiently(store)
        self._held.pop(held.id, None)
        self._notes[held.id] = trial_note(state.name.lower(), attrs)

    def _send(self, held: Held) -> None:
        """Store what is not stored yet, if the database is there; training does not wait for it."""
        if time.monotonic() < self._away_until:
            return

        def store() -> None:
            with self._storage.transaction() as connection:
                self._require(connection, held)
                self._store_unsent(connection, held)

        try:
            self._storage.retrying(store, patience_s=BLINK_S)
        except DatabaseAwayError:
            self._away_until = time.monotonic() + AWAY_PAUSE_S
            return
        held.reported = max((held.reported, *held.unsent.reports))
        held.unsent = _Unsent()

    def _store_unsent(self, connection: sa.Connection, held: Held) -> None:
        for step, value in sorted(held.unsent.reports.items()):
            # Not by held.trial.report: that one remembers what was rolled back, and would not store it again.
            self._storage.optuna.set_trial_intermediate_value(held.id, step, value)
        if held.unsent.checkpoint is not None:
            epoch, curve = held.unsent.checkpoint
            connection.execute(CHECKPOINTED, {"trial_id": held.id, "epoch": epoch})
            connection.execute(KEEP_CURVE, {"trial_id": held.id, "curve": curve})

    def release(self, held: Held, *, reason: str, is_forgiven: bool = True) -> None:
        """Let go of a trial, so that the next claim adopts it.

        Args:
            held: The trial.
            reason: Why, for `status`.
            is_forgiven: Whether the attempt does not count: the worker was asked to stop.
        """
        self._held.pop(held.id, None)
        values = {"trial_id": held.id, "token": held.token, "reason": reason, "forgiven": int(is_forgiven)}

        def store() -> None:
            with self._storage.transaction() as connection:
                connection.execute(RELEASE, values)

        try:
            self._storage.retrying(store, patience_s=5.0)
        except StorageError:
            return  # the lease runs out by itself

    def keep_notes(self) -> None:
        """Store the notes of told trials that no claim has stored since.

        Raises:
            StorageError: The database stayed out of reach.
        """

        def store() -> None:
            with self._storage.transaction() as connection:
                if connection.execute(SHARE_STUDY, {"study_id": self._study_id}).first() is not None:
                    self._store_notes(connection)

        if self._notes:
            self._storage.retrying(store, patience_s=5.0)
            self._notes.clear()

    def ranking(self, *, most: int) -> list[int]:
        """Return the numbers of the best complete trials, best first."""

        def read() -> list[int]:
            with self._storage.engine.connect() as connection:
                return list(connection.execute(RANKING, {"study_id": self._study_id, "most": most}).scalars())

        return self._patiently(read)

    def _patiently(self, action: Callable[[], T]) -> T:
        return self._storage.retrying(action, patience_s=PATIENCE_S, is_stopping=self._is_stopping)

    def _claim(self) -> Held | Literal["spent", "busy"]:
        self._storage.get_to_know(self._study_id)
        with self._storage.transaction() as connection:
            n_trials = self._lock_study(connection)
            self._store_notes(connection)
            is_held_by_others = False
            for row in connection.execute(RUNNING_TRIALS, {"study_id": self._study_id}).all():
                if not self._is_orphan(row) or not self._is_still_orphan(connection, row):
                    is_held_by_others = True
                    continue
                attempt = row.attempts + (not self._is_unanswered(row))
                if attempt <= self._max_attempts:
                    trial = optuna.trial.Trial(self._study, row.trial_id)
                    return self._take(connection, trial, is_adopted=True, attempt=attempt)
                self._give_up(connection, row)
            counts = connection.execute(COUNTS, {"study_id": self._study_id}).one()
            if not counts.enqueued and counts.numbers >= n_trials:
                return "busy" if is_held_by_others else "spent"
            with self._storage.reading_once():
                trial = self._study.ask(fixed_distributions=dict(self._distributions))
            return self._take(connection, trial, is_adopted=False, attempt=1)

    def _store_notes(self, connection: sa.Connection) -> None:
        for trial_id, note in self._notes.items():
            keep_note(connection, self._study_id, trial_id, note)

    def _lock_study(self, connection: sa.Connection) -> int:
        """Take the lock on the study's row, which Optuna takes too for every new number; return the budget."""
        query = sa.text("""
            SELECT a.value_json FROM studies s JOIN study_user_attributes a USING (study_id)
            WHERE s.study_id = :study_id AND a.key = 'n_trials' FOR UPDATE OF s
        """)
        row = connection.execute(query, {"study_id": self._study_id}).first()
        if row is None:
            message = f"{self._study.study_name}: the study was deleted while this worker was at it."
            raise StudyNotFoundError(message)
        return int(json.loads(row.value_json))

    def _is_orphan(self, row: Any) -> bool:
        if row.worker == self._worker and row.token is not None:
            return self._is_unanswered(row)
        return row.token is None or row.is_expired or is_gone(row)

    def _is_still_orphan(self, connection: sa.Connection, row: Any) -> bool:
        """Lock an orphan's lease and look again: its worker may have been telling the trial at this very moment."""
        of_trial = {"study_id": self._study_id, "trial_id": row.trial_id}
        connection.execute(LOCK_LEASE, of_trial)
        again = connection.execute(RUNNING_TRIAL, of_trial).first()
        return again is not None and self._is_orphan(again)

    def _is_unanswered(self, row: Any) -> bool:
        """Whether we claimed a trial and do not know it: the connection was lost before the answer came."""
        held = self._held.get(row.trial_id)
        return row.worker == self._worker and row.token is not None and (held is None or held.token != row.token)

    def _take(self, connection: sa.Connection, trial: optuna.Trial, *, is_adopted: bool, attempt: int) -> Held:
        held = Held(trial, uuid.uuid4().hex, is_adopted, attempt)
        values = {"trial_id": held.id, "study_id": self._study_id, "token": held.token, "worker": self._worker}
        values |= vars(this_process()) | {
            "device": self._device, "lease_s": self._lease_s, "attempt": attempt,
        }  # fmt: skip
        connection.execute(TAKE, values)
        held.reported = self._last_step(held.id) if is_adopted else 0
        return held

    def _last_step(self, trial_id: int) -> int:
        return max(self._storage.optuna.get_trial(trial_id).intermediate_values, default=0)

    def _give_up(self, connection: sa.Connection, row: Any) -> None:
        reason = (
            f"{row.attempts} attempts in a row advanced no checkpoint; the last ended: {row.reason or 'worker gone'}"
        )
        trial, attrs = optuna.trial.Trial(self._study, row.trial_id), {"reason": reason}
        self._finish(connection, trial, state=TrialState.FAIL, value=None, attrs=attrs, token=None, epoch=0)
        keep_note(connection, self._study_id, row.trial_id, trial_note("fail", attrs))

    def _require(self, connection: sa.Connection, held: Held) -> Any:
        """Lock the lease's row, so that until the transaction ends nobody can take the trial; return the row."""
        row = connection.execute(HOLD, {"trial_id": held.id, "token": held.token}).first()
        if row is None or not (row.is_held or row.is_told):
            held.is_lost = True
            self._held.pop(held.id, None)
            message = f"trial {held.number}: another worker holds it now, so this worker lets go of it."
            raise LeaseLostError(message)
        return row

    def _finish(
        self,
        connection: sa.Connection,
        trial: optuna.Trial,
        *,
        state: TrialState,
        value: float | None,
        attrs: Mapping[str, Any],
        token: str | None,
        epoch: int,
    ) -> None:
        # Not by trial and study, which would read the whole trial again for each of these.
        storage, trial_id = self._storage.optuna, trial._trial_id
        for key, attr in attrs.items():
            storage.set_trial_user_attr(trial_id, key, attr)
        if state is TrialState.PRUNED and (reports := storage.get_trial(trial_id).intermediate_values):
            value = reports[max(reports)]
        storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        connection.execute(FINISH, {"trial_id": trial_id, "token": token, "epoch": epoch})

    def _renew_until_stopped(self) -> None:
        pause_s = self._lease_s / 6
        while not self._stop.wait(pause_s):
            try:
                self._renew()
                pause_s = self._lease_s / 6
            except Exception as error:
                if not is_lost_connection(error):
                    raise
                pause_s = min(self._lease_s / 30, 5.0)

    def _renew(self) -> None:
        with self._storage.engine.begin() as connection:
            for held in list(self._held.values()):
                values = {"trial_id": held.id, "token": held.token, "epoch": held.epoch, "lease_s": self._lease_s}
                if connection.execute(RENEW, values).rowcount == 0:
                    held.is_lost = held.id in self._held  # not ours any more, unless it was finished just now


def keep_note(connection: sa.Connection, study_id: int, trial_id: int, note: str) -> None:
    """Store what the dashboard shows of a trial in words, unless somebody wrote something there."""
    attrs = {key: json.dumps(attr) for key, attr in note_attrs(trial_id, note).items()}
    values = {"keys": list(attrs), "values": list(attrs.values()), "version_key": note_version_key(trial_id)}
    connection.execute(KEEP_NOTE, values | {"study_id": study_id})
