"""Workers kept at work until the study's budget is spent, wherever they run."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from frem_search.errors import DatabaseAwayError, StudyNotFoundError, UsageError, WorkerError
from frem_search.search.engines.watch import ANSWER_S, BLINK_S, watch
from frem_search.search.events import TrialEvent
from frem_search.storage.database import Storage
from frem_search.storage.watchdog import answers_within
from frem_search.study.record import StudyRecord, read_record

POLL_S = 0.5
MOST_DEATHS = 5  # in one place, before any trial advances
PAUSE_S = 1.0  # before a place where workers are killed gets another one; doubled each time
STOP_TIMEOUT_S = 3600.0  # an epoch may be long; a second Ctrl-C does not wait
KILL_AFTER_S = 10.0  # of that second Ctrl-C
TOLD_AFTER_S = 20.0
USED_WRONGLY = 2
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


@dataclass(eq=False)
class _Place:
    """Where a worker belongs.

    Args:
        start: Puts one there.
        seat: The one that is there now.
        n_killed: How many were killed there since a trial advanced.
        start_at: When the next one may begin, by `time.monotonic`.
        is_given_up: Whether one ended with an error there, which another would only meet again.
    """

    start: Callable[[], Seat]
    seat: Seat | None = None
    n_killed: int = 0
    start_at: float = -math.inf
    is_given_up: bool = False


class Team:
    """Workers of one study; as a context, they are there from its beginning to its end.

    One that is killed, or that somebody else stopped, is replaced. One that ends with an error of its own is not, and
    the others go on; before the
    study is begun, its error is that of all. The first that leaves has found the budget spent, so that those which
    wait for a place are not needed any more.

    Args:
        starts: Each starts a worker, once more if that one is killed.
        storage: Where their trials are looked up.
        study: The study's name.
        is_stopping: Once it says yes, the workers store their trials and leave.
        tell: Told in a line that workers wait for a place, or ended with an error.
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
        self._places = [_Place(start) for start in starts]
        self._storage, self._study = storage, study
        self._is_stopping, self._tell = is_stopping, tell
        self._is_begun = self._is_spent = False
        self._tell_at = time.monotonic() + TOLD_AFTER_S

    def __enter__(self) -> "Team":
        try:
            self._fill()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_urgent = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._end(within_s=KILL_AFTER_S if is_urgent else STOP_TIMEOUT_S)

    def begun(self) -> StudyRecord | None:
        """Wait until a worker has begun the study, and return it; None if that was stopped before.

        Raises:
            UsageError: A worker was told that the study, or its options, cannot be used.
            WorkerError: As `events`.
            DatabaseAwayError: The database was away when the workers had left.
        """
        while True:
            is_over = self._look_after()
            try:
                with answers_within(ANSWER_S):
                    record = read_record(self._storage, self._study, has_curves=False, patience_s=BLINK_S)
            except StudyNotFoundError:
                if is_over:
                    return None
            except DatabaseAwayError:
                if self._is_stopping():
                    return None
                if is_over:
                    raise
            else:
                self._is_begun = True
                return record
            time.sleep(POLL_S)

    def events(self, since: StudyRecord) -> Generator[TrialEvent, None, None]:
        """Tell what happens to the trials, until all workers have left.

        Args:
            since: The study as it was begun.

        Raises:
            WorkerError: Each of the workers ended with an error, or they were killed again and again.
            DatabaseAwayError: The database was away when they left.
        """
        for event in watch(self._storage, self._study, since=since, is_over=self._look_after):
            if event.kind in ("epoch", "complete", "pruned"):  # one that is given up is no advance
                for place in self._places:
                    place.n_killed = 0
            yield event

    @property
    def _seats(self) -> list[Seat]:
        return [place.seat for place in self._places if place.seat is not None]

    def _look_after(self) -> bool:
        """Replace who was killed; return whether all have left."""
        if self._is_stopping():
            self._stop_all(within_s=STOP_TIMEOUT_S)
            return True
        for place in self._places:
            if place.seat is not None and (end := place.seat.end()) is not None:
                seat, place.seat = place.seat, None
                seat.close()
                self._judge(place, seat.place, end)
        if self._is_spent:
            self._dismiss_waiting()
            return not self._seats
        self._fill()
        self._tell_who_waits()
        return False

    def _fill(self) -> None:
        for place in self._places:
            if place.seat is None and not place.is_given_up and time.monotonic() >= place.start_at:
                place.seat = place.start()

    def _judge(self, place: _Place, name: str, end: End) -> None:
        """See what a worker's end means for its place."""
        if end.status == 0:
            self._is_spent = True
        elif end.status is None:
            self._count_killed(place, name, end)
        elif end.status == STOPPED:
            place.start_at = time.monotonic() + PAUSE_S
        else:
            self._give_up(place, name, end)

    def _count_killed(self, place: _Place, name: str, end: End) -> None:
        place.n_killed += 1
        if place.n_killed >= MOST_DEATHS:
            message = (
                f"{self._study}: {place.n_killed} workers on {name} were killed ({end.words}) before a trial advanced. "
                "Look for what kills them (lack of memory, a scheduler); the same command goes on."
            )
            raise WorkerError(message)
        if place.n_killed > 1:
            place.start_at = time.monotonic() + PAUSE_S * 2 ** (place.n_killed - 2)

    def _give_up(self, place: _Place, name: str, end: End) -> None:
        words = end.words.removeprefix("frem-search: ")
        place.is_given_up = True
        if end.status == USED_WRONGLY and not self._is_begun:
            raise UsageError(words)
        message = f"a worker on {name} ended with status {end.status}: {words}"
        if not self._is_begun or all(each.is_given_up for each in self._places):
            raise WorkerError(message)
        self._tell(f"{message} The others go on." if self._seats else message)

    def _dismiss_waiting(self) -> None:
        for place in self._places:
            if place.seat is not None and place.seat.is_waiting():
                place.seat.close()
                place.seat = None

    def _tell_who_waits(self) -> None:
        if time.monotonic() < self._tell_at:
            return
        self._tell_at = float("inf")
        if n_waiting := sum(seat.is_waiting() for seat in self._seats):
            self._tell(f"{n_waiting} of {len(self._seats)} workers wait for a place")

    def _stop_all(self, *, within_s: float) -> None:
        for seat in self._seats:
            if seat.end() is None:
                seat.ask_to_stop()
        until = time.monotonic() + within_s
        while any(seat.end() is None for seat in self._seats) and time.monotonic() < until:
            time.sleep(POLL_S / 5)

    def _end(self, *, within_s: float = STOP_TIMEOUT_S) -> None:
        """Let those that are left store their trials and go; who has not gone in time is killed."""
        try:
            self._stop_all(within_s=within_s)
        finally:
            for place in self._places:
                if place.seat is not None:
                    place.seat.close()
                    place.seat = None
