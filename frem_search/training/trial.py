"""The members of one trial, one for each fold, seen as one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from frem_search.training.member import CURVE_COLUMNS, EpochReport, Member

LAST_COLUMN = CURVE_COLUMNS[-1]
MOST_IMAGE_SCORES = 50  # of a trial, each the mean over a group of images where there are more


class Folds:
    """A trial in training, whose score is the mean over its folds; most trials have one.

    Side by side, folds wait for each other at the end of every epoch, so that none is in training while the trial is
    looked at or stored. In sequence, they are trained to their end one after another, so that the next one can be
    spared; an epoch of the trial is then any fold's.

    Args:
        number: By which the caller knows the trial.
        members: One for each fold, in order.
        in_sequence: Train one after another.
    """

    def __init__(self, number: int, members: Sequence[Member], *, in_sequence: bool = False) -> None:
        self.number, self.members, self.in_sequence = number, tuple(members), in_sequence
        # In sequence: scores of the validation images of each fold that is done, for a comparison image by image.
        self.image_scores: list[float] = []
        self.pictures: dict[int, bytes] = {}  # predictions after epochs, until they are stored
        self.set_aside = ""  # where a checkpoint lies that could not be used, so that the trial began again

    @property
    def epoch(self) -> int:
        """How many epochs of the trial are done."""
        if self.in_sequence:
            return sum(member.epoch for member in self.members)
        return max(member.epoch for member in self.members)

    @property
    def is_done(self) -> bool:
        """Whether every fold is."""
        return all(member.is_done for member in self.members)

    @property
    def best_score(self) -> float:
        """The mean over folds of each one's best; over those that have begun."""
        begun = [member.best_score for member in self.members if member.epoch]
        return sum(begun) / len(begun) if begun else -math.inf

    @property
    def curve(self) -> dict[str, list[Any]]:
        """Means over folds, epoch by epoch; in sequence, one fold's epochs after another's."""
        if len(self.members) == 1:
            return self.members[0].curve
        epochs = list(range(1, self.epoch + 1))
        if self.in_sequence:
            rows = [
                dict(zip(m.curve, row, strict=True))
                for m in self.members
                for row in zip(*m.curve.values(), strict=True)
            ]
        else:
            rows = [self._row(epoch) for epoch in epochs]
        return {name: epochs if name == "epoch" else [row[name] for row in rows] for name in self.members[0].curve}

    @property
    def n_beside(self) -> int:
        """How many of the folds train side by side."""
        return 1 if self.in_sequence else len(self.members)

    def training(self) -> tuple[Member, ...]:
        """Return the members that are to be in the cohort now."""
        if not self.in_sequence:
            return self.members
        return tuple(member for member in self.members if not member.is_done)[:1]

    def report(self, of_member: EpochReport, member: Member) -> EpochReport | None:
        """Return what a member's report says of the trial; nothing before the other folds have come as far.

        Args:
            of_member: The report.
            member: Whose it is.
        """
        if len(self.members) == 1:
            return replace(of_member, key=self.number)
        if self.in_sequence or of_member.error is not None or not of_member.is_finite:
            return replace(
                of_member, key=self.number, epoch=self.epoch, best_score=self.best_score, is_done=self.is_done
            )
        member.is_waiting = True
        # Stacked, the others may have trained this epoch too and have their reports still to come.
        expected = [each for each in self.members if each.epoch == of_member.epoch or not each.is_done]
        if not all(each.is_waiting for each in expected):
            return None
        for each in expected:
            each.is_waiting = False
        row = self._row(self.epoch)
        return EpochReport(
            key=self.number,
            epoch=self.epoch,
            train_loss=row["train_loss"],
            score=row["score"],
            best_score=row["best_score"],
            is_finite=True,
            is_done=self.is_done,
            seconds=row["seconds"],
        )

    def _row(self, epoch: int) -> dict[str, Any]:
        """Return the means over folds of an epoch; a fold that came to its end before counts with its last epoch.

        A fold that has not done its first epoch, as another one was no number then, does not count.
        """
        done = ((member.curve, len(member.curve[LAST_COLUMN])) for member in self.members)
        curves = [(curve, min(epoch, n) - 1) for curve, n in done if n]
        row: dict[str, Any] = {
            name: mean([curve[name][i] for curve, i in curves])
            for name in curves[0][0]
            if name not in ("epoch", "per_class", "seconds")
        }
        per_class = zip(*(curve["per_class"][i] for curve, i in curves), strict=True)
        seconds = sum(curve["seconds"][epoch - 1] for curve, i in curves if i == epoch - 1)
        return row | {"per_class": [mean(values) for values in per_class], "seconds": round(seconds, 4)}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers among some values; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def grouped(scores: Sequence[float], *, most: int) -> list[float]:
    """Return at most so many means over neighbouring scores.

    >>> grouped([1.0, 2.0, 3.0, 4.0], most=2)
    [1.5, 3.5]
    """
    n = min(most, len(scores))
    bounds = [len(scores) * i // n for i in range(n + 1)]
    return [sum(scores[a:b]) / (b - a) for a, b in pairwise(bounds)]
