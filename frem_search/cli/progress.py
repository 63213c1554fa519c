"""Live progress of a search on stderr: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from frem_search.search.events import TrialEvent
from frem_search.study.record import StudyRecord
from frem_search.study.status import count_line, format_value

PLAIN_EVERY_S = 10.0  # at most, for each trial in training
BEGUN = ("claimed", "adopted")
FINISHED = ("complete", "pruned", "failed")


def show_progress(events: Iterator[TrialEvent], record: StudyRecord) -> None:
    """Follow a worker to its end.

    Args:
        events: The worker's.
        record: The study as it was before.
    """
    follower, console = _Follower(record), Console(stderr=True)
    sys.stderr.write(f"{record.name}: {count_line(record)}\n")
    sys.stderr.flush()
    if console.is_terminal:
        _follow_in_bars(events, follower, record, console)
    else:
        _follow_plainly(events, follower)


def _follow_in_bars(events: Iterator[TrialEvent], follower: "_Follower", record: StudyRecord, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bars:
        trials = bars.add_task(record.name, total=record.n_trials, completed=follower.n_finished)
        running: dict[int, TaskID] = {}
        for event in events:
            line = follower.line(event)
            if event.kind in BEGUN:
                name = f"  trial {event.number}"
                running[event.number] = bars.add_task(name, total=record.n_epochs, completed=event.epoch)
            elif event.kind == "epoch":
                bars.update(running[event.number], completed=event.epoch)
            elif event.number in running:
                bars.remove_task(running.pop(event.number))
            if line and event.kind != "epoch":
                bars.console.print(line, highlight=False, markup=False)
            bars.update(trials, completed=follower.n_finished, description=follower.title())


def _follow_plainly(events: Iterator[TrialEvent], follower: "_Follower") -> None:
    told_at: dict[int, float] = {}  # by trial
    for event in events:
        line, now = follower.line(event), time.monotonic()
        if event.kind == "epoch" and now - told_at.setdefault(event.number, now) < PLAIN_EVERY_S:
            continue
        told_at[event.number] = now
        if line:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


class _Follower:
    """Puts events into words, each piece of news once; knows how many trials are finished and the best score."""

    def __init__(self, record: StudyRecord) -> None:
        self.n_finished = record.n_finished
        self._record = record
        self._best = record.best.value if record.best else None
        self._params: dict[int, str] = {}
        self._is_waiting = self._is_away = False

    def title(self) -> str:
        best = "" if self._best is None else f", best {self._best:.4f}"
        return f"{self._record.name}{best}"

    def line(self, event: TrialEvent) -> str:
        """Take note of an event and return it as a line, empty if there is nothing to say."""
        if event.kind in ("waiting", "away", "back"):
            return self._of_all(event)
        name = f"trial {event.number}"
        if event.params is not None:
            searched = self._record.searched
            self._params[event.number] = ", ".join(f"{key} {format_value(event.params[key])}" for key in searched)
        if event.kind in BEGUN:
            return f"{name}: {_goes_on(event)}" if event.kind == "adopted" else ""
        if event.kind == "epoch":
            score = "" if event.report is None else f", {self._record.score} {event.report.score:.4f}"
            return f"{name}: epoch {event.epoch} of {self._record.n_epochs}{score}"
        self._is_waiting = False
        if event.kind in FINISHED:
            self.n_finished = event.n_finished
        if event.kind == "complete" and event.value is not None:
            return self._complete(event, event.value)
        return f"{name}: {event.kind}: {event.reason.removeprefix(f'{name}: ')}"

    def _of_all(self, event: TrialEvent) -> str:
        """Return what concerns no trial, unless it was told before."""
        if event.kind == "waiting":
            is_told, self._is_waiting = self._is_waiting, True
            return "" if is_told else "waiting for trials that other workers hold"
        was_away, self._is_away = self._is_away, event.kind == "away"
        if was_away == self._is_away:
            return ""
        return f"the database is away ({event.reason}); training goes on" if self._is_away else "the database is back"

    def _complete(self, event: TrialEvent, value: float) -> str:
        self._best = value if event.is_best else self._best
        count = f"[{event.n_finished}/{self._record.n_trials}]"
        star = "  best so far" if event.is_best else ""
        return f"{count} trial {event.number}: {self._record.score} {value:.4f}  {self._params[event.number]}{star}"


def _goes_on(adopted: TrialEvent) -> str:
    if adopted.reason:
        return f"starts again: its checkpoint could not be used and is set aside as {adopted.reason}"
    return f"goes on at epoch {adopted.epoch}" if adopted.epoch else "starts again: no checkpoint"
