"""What the scores of cells have in common: class 1 is the cell, and the score is that class's alone."""

import torch

from frem_search.errors import UsageError
from frem_search.segmentation.metrics.score import Score

CELL = 1  # in isbi2012 and h1299; class 0 is what lies between cells


def check_classes(score: str, n_classes: int, *, needed: int | None) -> None:
    """Raise unless a score can be computed of labels with so many classes.

    Args:
        score: Its name in a study file.
        n_classes: Of the labels.
        needed: How many it needs; None is any number that has a class 1.

    Raises:
        UsageError: The labels have another number of classes.

    >>> check_classes("v_rand", 3, needed=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    frem_search.errors.UsageError: score = 'v_rand': expected labels of 2 classes, ... but got 3. Choose another ...
    """
    if n_classes > CELL if needed is None else n_classes == needed:
        return
    expected = f"at least {CELL + 1}" if needed is None else str(needed)
    message = (
        f"score = {score!r}: expected labels of {expected} classes, 0 between the cells and {CELL} the cell, but got "
        f"{n_classes}. Choose another score in the study file, or a dataset with these classes."
    )
    raise UsageError(message)


def cell_score(value: float, *, n_classes: int) -> Score:
    """Return a score on the CPU; of the classes only the cell has one.

    >>> cell_score(0.5, n_classes=3).per_class.tolist()
    [nan, 0.5, nan]
    """
    per_class = torch.full((n_classes,), torch.nan, dtype=torch.float64)
    per_class[CELL] = value
    return Score(torch.tensor(value, dtype=torch.float64), per_class)
