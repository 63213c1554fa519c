"""Columns of a trial's curve as series that a figure can draw."""

import math
from typing import Any, NamedTuple

from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.study.space import resolve, space_from_json

MAX_POINTS = 400
MODULE_CHANGES_NOTHING = {"B": 0, "X": 1.0}  # what a network does where a study sets neither


class Series(NamedTuple):
    """One number per epoch, without the epochs that have none.

    Args:
        epochs: Epochs in rising order.
        values: A finite number for each epoch.
    """

    epochs: tuple[int, ...]
    values: tuple[float, ...]


def series(trial: TrialRecord, column: str, *, keeps_highest: bool = False) -> Series:
    """Return a column of a trial's curve, thinned to what a line on paper can show."""
    epochs, cells = trial.curve.get("epoch", []), trial.curve.get(column, [])
    rows = [
        (int(epoch), float(cell))
        for epoch, cell in zip(epochs, cells, strict=False)
        if cell is not None and math.isfinite(cell)
    ]
    return thin(
        Series(tuple(epoch for epoch, _ in rows), tuple(value for _, value in rows)), keeps_highest=keeps_highest
    )


def thin(whole: Series, *, keeps_highest: bool) -> Series:
    """Return at most MAX_POINTS evenly spaced points, always with the first and the last.

    Args:
        whole: All points.
        keeps_highest: Whether the highest point is kept too, as of a score, whose highest value is the trial's.

    >>> peak = Series(tuple(range(2000)), tuple(float(epoch == 1237) for epoch in range(2000)))
    >>> thinned = thin(peak, keeps_highest=True)
    >>> len(thinned.epochs) <= MAX_POINTS, thinned.epochs[0], thinned.epochs[-1], 1237 in thinned.epochs
    (True, 0, 1999, True)
    """
    n = len(whole.epochs)
    if n <= MAX_POINTS:
        return whole
    even = {round(i * (n - 1) / (MAX_POINTS - 2)) for i in range(MAX_POINTS - 1)}
    highest = {max(range(n), key=lambda i: whole.values[i])} if keeps_highest else set()
    kept = sorted(even | highest)
    return Series(tuple(whole.epochs[i] for i in kept), tuple(whole.values[i] for i in kept))


def full_params(record: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    """Return the parameters of a trial, drawn and fixed; those of the module also where the study is silent."""
    return MODULE_CHANGES_NOTHING | resolve(space_from_json(record.contract["space"]), trial.params)


def enhances(record: StudyRecord, trial: TrialRecord) -> bool:
    """Whether the module changes something: B above 0 maps enhanced, and X other than 1 times."""
    params = full_params(record, trial)
    return bool(params["B"] != 0 and params["X"] != 1)


def baseline(record: StudyRecord) -> TrialRecord | None:
    """Return the best complete trial in which the module changes nothing."""
    plain = [trial for trial in record.complete if trial.value is not None and not enhances(record, trial)]
    return max(plain, key=lambda trial: (trial.value, -trial.number), default=None)


def rows_of(trial: int, quantity: str, whole: Series) -> list[dict[str, Any]]:
    """Return a series as rows of a table in long form."""
    return [
        {"trial": trial, "quantity": quantity, "epoch": epoch, "value": value}
        for epoch, value in zip(whole.epochs, whole.values, strict=True)
    ]


def scale_type(values: list[float]) -> str:
    """Return "log" for positive numbers that span more than two powers of ten, else "linear".

    >>> scale_type([0.01, 3.0]), scale_type([0.1, 3.0]), scale_type([0.0, 3.0])
    ('log', 'linear', 'linear')
    """
    return "log" if values and min(values) > 0 and max(values) > 100 * min(values) else "linear"
