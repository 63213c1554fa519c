"""What a training and a scoring show: epochs on stderr as they pass, scores per class on stdout."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from frem_search.cli.progress import PLAIN_EVERY_S
from frem_search.cli.rows import aligned

if TYPE_CHECKING:
    from frem_search.training.member import EpochReport


@contextmanager
def epoch_progress(name: str, *, n_epochs: int, score: str) -> "Iterator[Callable[[EpochReport], None]]":
    """Give a function that shows each epoch that it is told of: a bar on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(name, n_epochs=n_epochs, score=score)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        epochs = bars.add_task(name, total=n_epochs)

        def show(report: "EpochReport") -> None:
            title = f"{name}, loss {report.train_loss:.4f}, {score} {report.score:.4f}, best {report.best_score:.4f}"
            bars.update(epochs, completed=report.epoch, description=title)

        yield show


def _plain_lines(name: str, *, n_epochs: int, score: str) -> "Callable[[EpochReport], None]":
    told_at = -PLAIN_EVERY_S

    def show(report: "EpochReport") -> None:
        nonlocal told_at
        if time.monotonic() - told_at < PLAIN_EVERY_S and not report.is_done:
            return
        told_at = time.monotonic()
        sys.stderr.write(
            f"{name}: epoch {report.epoch} of {n_epochs}, loss {report.train_loss:.4f}, {score} {report.score:.4f}, "
            f"best {report.best_score:.4f}\n"
        )
        sys.stderr.flush()

    return show


def scores_table(score: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for all classes together and one for each class, a column for each part.

    Args:
        score: The metric.
        parts: For each part the metric's value, and `per_class` by the class's name.

    >>> print(scores_table("mean_iou", {"val": {"mean_iou": 0.5, "per_class": {"cell": 0.75, "wall": None}}}), end="")
              val
    mean_iou  0.5000
    cell      0.7500
    wall      none
    """
    classes = next(iter(parts.values()))["per_class"]
    rows = [["", *parts], [score, *(_cell(part[score]) for part in parts.values())]]
    rows += [[name, *(_cell(part["per_class"][name]) for part in parts.values())] for name in classes]
    return "\n".join(aligned(rows)) + "\n"


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
