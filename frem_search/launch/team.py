"""Workers kept at work until the study's budget is spent, wherever they run."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from frem_search.errors import StudyNotFoundError, WorkerError
from frem_search.launch.watch import ENDED, watch
from frem_search.record import StudyRecord, read_record
from frem_search.storage import Storage
from frem_search.worker import TrialEvent

POLL_S = 0.5
MOST_DEATHS_IN_A_ROW = 5
STOP_TIMEOUT_S = 3600.0  # an epoch may be long; a second Ctrl-C does not wait
TOLD_AFTER_S = 20.0
STOPPED = 130  # what a worker ends with that somebody else asked to stop: its machine goes away, say


@dataclass(frozen=True)
class End:
    """How a worker ended.

    Args:
        status: Its exit status, or None if it was killed.
        words: What it said at the end, or what killed it.
    """

    status: int | None
    words: str


class Seat(Protocol):
    """One worker, wherever it runs."""

    @property
    def place(self) -> str:
        """Where it runs, for messages."""

    def end(self) -> End | None:
        """Return how it ended, if it has."""

    def is_waiting(self) -> bool:
        """Whether it has no place to run yet."""

    def ask_to_stop(self) -> None:
        """Let it store its trials and go; at the second time it goes at once."""

    def close(self) -> None:
        """Let go of it, and kill it if it still lives."""


class Team:
    """Workers of one study; as a context, they are there from its beginning to its end.

    One that is killed is replaced; one that ends with an error of its own would only meet it again. The first that
    leaves has found the budget spent, so that those which wait for a place are not needed any more.

    Args:
        starts: Each starts a worker, once more if that one is killed.
        storage: Where their trials are looked up.
        study: The study's name.
        is_stopping: Once it says yes, the workers store their trials and leave.
        tell: Told in a line that workers wait for a place.
    """

    def __init__(
        self,
        starts: Sequence[Callable[[], Seat]],
        *,
        storage: Storage,
        study: str,
        is_stopping: Callable[[], bool],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._starts, self._storage, self._study = list(starts), storage, study
        self._is_stopping, self._tell = is_stopping, tell
        self._seats: dict[Seat, Callable[[], Seat]] = {}
        self._deaths_in_a_row = 0
        self._is_spent = False
        self._tell_at = time.monotonic() + TOLD_AFTER_S

    def __enter__(self) -> "Team":
        try:
            for start in self._starts:
                self._seats[start()] = start
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begun(self) -> StudyRecord | None:
        """Wait until a worker has begun the study, and return it; None if that was stopped before.

        Raises:
            WorkerError: As `events`.
        """
        while True:
            is_over = self._look_after()
            try:
                return read_record(self._storage, self._study, has_curves=False)
            except StudyNotFoundError:
                if is_over:
                    return None
            time.sleep(POLL_S)

    def events(self) -> Generator[TrialEvent, None, None]:
        """Tell what happens to the trials, until all workers have left.

        Raises:
            WorkerError: The workers ended with an error, or were killed again and again.
        """
        for event in watch(self._storage, self._study, is_over=self._look_after):
            if event.kind in ENDED.values():
                self._deaths_in_a_row = 0
            yield event

    def _look_after(self) -> bool:
        """Replace who was killed; return whether all have left."""
        if self._is_stopping():
            self._stop_all()
            return True
        for seat, start in list(self._seats.items()):
            end = seat.end()
            if end is not None:
                del self._seats[seat]
                seat.close()
                self._judge(seat, end)
                if end.status != 0 and not self._is_spent:
                    self._seats[start()] = start
        if self._is_spent:
            self._dismiss_waiting()
        else:
            self._tell_who_waits()
        return not self._seats

    def _judge(self, seat: Seat, end: End) -> None:
        if end.status == 0:
            self._is_spent = True
        elif end.status not in (None, STOPPED):
            words = end.words.removeprefix("frem-search: ")
            message = f"a worker on {seat.place} ended with status {end.status}: {words}"
            raise WorkerError(message)
        else:
            self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MOST_DEATHS_IN_A_ROW:
            message = (
                f"{self._study}: {self._deaths_in_a_row} workers were killed ({end.words}) before a trial ended. "
                "Look for what kills them (lack of memory, a scheduler); the same command goes on."
            )
            raise WorkerError(message)

    def _dismiss_waiting(self) -> None:
        for seat in [seat for seat in self._seats if seat.is_waiting()]:
            del self._seats[seat]
            seat.close()

    def _tell_who_waits(self) -> None:
        if time.monotonic() < self._tell_at:
            return
        self._tell_at = float("inf")
        if n_waiting := sum(seat.is_waiting() for seat in self._seats):
            self._tell(f"{n_waiting} of {len(self._seats)} workers wait for a place")

    def _stop_all(self) -> None:
        for seat in self._seats:
            if seat.end() is None:
                seat.ask_to_stop()
        until = time.monotonic() + STOP_TIMEOUT_S
        while any(seat.end() is None for seat in self._seats) and time.monotonic() < until:
            time.sleep(POLL_S / 5)

    def _end(self) -> None:
        """Let those that are left store their trials and go; at a second interrupt they are killed."""
        try:
            self._stop_all()
        finally:
            for seat in self._seats:
                seat.close()
            self._seats.clear()
