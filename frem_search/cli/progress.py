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

from frem_search.record import StudyRecord
from frem_search.status import format_value
from frem_search.worker import TrialEvent

PLAIN_EVERY_S = 10.0
FINISHED = ("complete", "pruned", "failed")


def show_progress(events: Iterator[TrialEvent], record: StudyRecord) -> None:
    """Follow a worker to its end.

    Args:
        events: The worker's.
        record: The study as it was before, for the count of trials and the best score.
    """
    follower = _Follower(record)
    console = Console(stderr=True)
    if not console.is_terminal:
        _follow_plainly(events, follower)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bars:
        trials = bars.add_task(record.name, total=record.n_trials, completed=follower.n_finished)
        running: dict[int, TaskID] = {}
        for event in events:
            line = follower.line(event)
            if event.params is not None:
                name = f"  trial {event.number}"
                running[event.number] = bars.add_task(name, total=record.n_epochs)
            elif event.kind == "epoch":
                bars.update(running[event.number], completed=event.epoch)
            elif event.number in running:
                bars.remove_task(running.pop(event.number))
            if line and event.kind != "epoch":
                bars.console.print(line, highlight=False, markup=False)
            bars.update(trials, completed=follower.n_finished, description=follower.title())


def _follow_plainly(events: Iterator[TrialEvent], follower: "_Follower") -> None:
    told_at = time.monotonic()
    for event in events:
        line = follower.line(event)
        if event.kind == "epoch" and time.monotonic() - told_at < PLAIN_EVERY_S:
            continue
        if line:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            told_at = time.monotonic()


class _Follower:
    """Counts finished trials and keeps the best score."""

    def __init__(self, record: StudyRecord) -> None:
        self.n_finished = sum(trial.state in ("complete", "pruned", "fail") for trial in record.trials)
        self._record = record
        self._best = record.best.value if record.best else None
        self._params: dict[int, str] = {}
        self._is_waiting = False

    def title(self) -> str:
        best = "" if self._best is None else f", best {self._best:.4f}"
        return f"{self._record.name}{best}"

    def line(self, event: TrialEvent) -> str:
        """Take note of an event and return it as a line, empty if there is nothing to say."""
        name = f"trial {event.number}"
        if event.params is not None:
            searched = self._record.searched
            self._params[event.number] = ", ".join(f"{key} {format_value(event.params[key])}" for key in searched)
            return f"{name}: goes on from its last checkpoint" if event.kind == "adopted" else ""
        if event.kind == "epoch":
            score = "" if event.report is None else f", {self._record.score} {event.report.score:.4f}"
            return f"{name}: epoch {event.epoch} of {self._record.n_epochs}{score}"
        is_told, self._is_waiting = self._is_waiting, event.kind == "waiting"
        if event.kind == "waiting":
            return "" if is_told else "waiting for trials that other workers hold"
        if event.kind in FINISHED:
            self.n_finished += 1
        if event.kind == "complete" and event.value is not None:
            is_best = self._best is None or event.value > self._best
            self._best = event.value if is_best else self._best
            count = f"[{self.n_finished}/{self._record.n_trials}]"
            star = "  best so far" if is_best else ""
            return f"{count} {name}: {self._record.score} {event.value:.4f}  {self._params[event.number]}{star}"
        return f"{name}: {event.kind}: {event.reason}"
