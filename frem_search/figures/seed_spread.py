"""How far scores of one configuration lie apart that was trained with several seeds."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from frem_search.study.record import StudyRecord, TrialRecord

SEED = "seed"  # the parameter that a trial's weights, batches and turns follow from


class SeedSpread(NamedTuple):
    """The spread over seeds, pooled over configurations.

    Args:
        sd: Standard deviation of one trial's score.
        n_configurations: How many configurations were trained with two seeds or more.
        n_trials: How many trials these are; the deviation has `n_trials - n_configurations` degrees of freedom.
    """

    sd: float
    n_configurations: int
    n_trials: int

    @property
    def n_degrees(self) -> int:
        """Degrees of freedom of the deviation."""
        return self.n_trials - self.n_configurations


def seed_spread(record: StudyRecord) -> SeedSpread | None:
    """Return the spread of a study's complete trials; None where no configuration was trained with two seeds."""
    configurations: dict[str, dict[str, float]] = {}
    for trial in scored(record):
        rest = sorted((name, repr(value)) for name, value in trial.params.items() if name != SEED)
        # The same seed again is the same training, and tells nothing about seeds.
        if SEED in trial.params and trial.value is not None:
            configurations.setdefault(repr(rest), {}).setdefault(repr(trial.params[SEED]), trial.value)
    return pooled(list(scores.values()) for scores in configurations.values())


def pooled(groups: Iterable[list[float]]) -> SeedSpread | None:
    """Return the spread within groups of scores; None where no group has two.

    >>> spread = pooled([[0.5, 0.7], [0.1], [0.2, 0.2, 0.5]])  # squares 0.02 and 0.06, degrees 1 and 2
    >>> round(spread.sd**2, 9), spread.n_configurations, spread.n_trials, spread.n_degrees
    (0.026666667, 2, 5, 3)
    """
    repeated = [scores for scores in groups if len(scores) > 1]
    if not repeated:
        return None
    n_trials = sum(len(scores) for scores in repeated)
    squares = sum((score - sum(scores) / len(scores)) ** 2 for scores in repeated for score in scores)
    return SeedSpread(math.sqrt(squares / (n_trials - len(repeated))), len(repeated), n_trials)


def seeds_line(record: StudyRecord, spread: SeedSpread | None) -> str:
    """Return what a caption says about seeds."""
    if spread:
        return f"{spread.n_trials} trials repeat {spread.n_configurations} configurations with other seeds"
    seeds = {repr(trial.params.get(SEED)) for trial in scored(record)}
    return "one seed" if len(seeds) < 2 else "several seeds, no configuration repeated"


def scored(record: StudyRecord) -> list[TrialRecord]:
    """Return the complete trials that have a score."""
    return [trial for trial in record.complete if trial.value is not None]
