"""Pruning as a function of the stored reports alone, so that a trial adopted by another worker is decided alike."""

import warnings
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


class SuccessiveHalving(BasePruner):
    """At epochs `min_epochs`, `min_epochs * factor`, ... go on only among the best `1 / factor` that came so far.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", arXiv:1810.05934, algorithm 2.
    Differs: A trial is never paused: one that is not promoted when it reaches a rung ends there, as in Optuna's
    SuccessiveHalvingPruner; unlike there, a rung is read from the reports and not from attributes of the trial.

    Args:
        min_epochs: The first rung.
        factor: What the rungs grow by, and the share that goes on.
    """

    def __init__(self, *, min_epochs: int, factor: int) -> None:
        self._min_epochs, self._factor = min_epochs, factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial's last report reached a rung at which it is not among the best."""
        steps = sorted(trial.intermediate_values)
        rung = self._rung_reached(steps)
        if rung is None:
            return False
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        others = (t for t in study.get_trials(deepcopy=False, states=states) if t.number != trial.number)
        values = [value for value in (value_at(other, rung) for other in others) if value is not None]
        better = sum(value > trial.intermediate_values[steps[-1]] for value in values)
        return better >= max(1, (len(values) + 1) // self._factor)

    def _rung_reached(self, steps: list[int]) -> int | None:
        """Return the highest rung that the last report reached and the one before had not."""
        if not steps:
            return None
        before = steps[-2] if len(steps) > 1 else 0
        rung, reached = self._min_epochs, None
        while rung <= steps[-1]:
            if rung > before:
                reached = rung
            rung *= self._factor
        return reached


def value_at(trial: FrozenTrial, rung: int) -> float | None:
    """Return the first value that a trial reported at or after a rung."""
    step = min((step for step in trial.intermediate_values if step >= rung), default=None)
    return None if step is None else trial.intermediate_values[step]


def make_pruner(name: str, settings: dict[str, Any]) -> BasePruner:
    """Return the pruner of a study, from the checked settings of its file."""
    if name == "median":
        return MedianPruner(
            n_startup_trials=settings["n_startup_trials"],
            n_warmup_steps=settings["n_warmup_epochs"] + 1,  # Optuna's steps begin with 0, epochs with 1
            n_min_trials=3,
        )
    if name == "asha":
        return SuccessiveHalving(min_epochs=settings["min_epochs"], factor=settings["factor"])
    if name == "wilcoxon":
        # Its steps are validation images, fold after fold: compared with the best trial's scores of the same images.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # since Optuna 3.6; ours is to follow its changes
            return WilcoxonPruner(n_startup_steps=settings["n_startup_images"])
    assert name == "none", name  # study_file.PRUNERS let it through
    return NopPruner()
