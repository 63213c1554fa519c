"""Suggestions as a function of the study's seed, the trial's number, the parameter and the trials before it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from frem_search.seeds import derive
from frem_search.study.space import Choice, Range, Space, searched, to_categorical

SearchSpace = dict[str, BaseDistribution]


class PerTrialSampler(BaseSampler):
    """A sampler that is made anew, with a seed of its own, for every draw.

    Optuna's samplers carry a generator from draw to draw, so that what they suggest depends on how often the process
    was started; with a fixed seed, workers side by side even suggest the same points.

    Args:
        make: Returns a sampler for a seed and a trial's number.
        space: The study's distributions. All parameters of a study are drawn in every trial, so that the joint space
            need not be inferred from the trials.
        seed: The study's seed.
    """

    def __init__(
        self, make: Callable[[int, int], BaseSampler], *, space: Mapping[str, BaseDistribution], seed: int
    ) -> None:
        self._make = make
        self._space = {name: space[name] for name in sorted(space) if not space[name].single()}
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> SearchSpace:  # noqa: ARG002 Optuna's signature
        """Return the whole space."""
        return self._space

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: SearchSpace) -> dict[str, Any]:
        """Draw all parameters together, where the sampler does that."""
        return self._fresh(trial, "all").sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter alone."""
        return self._fresh(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _fresh(self, trial: FrozenTrial, name: str) -> BaseSampler:
        return self._make(derive(self._seed, "sampler", trial.number, name) % 2**32, trial.number)  # numpy's limit


class SobolSampler(BaseSampler):
    """The point of a scrambled Sobol sequence whose index is the trial's number.

    Source: Sobol 1967; scrambling by Owen 1998 as scipy implements it.
    Differs: Optuna's QMCSampler counts its points in the study's attributes, so that a number may be skipped.

    Args:
        seed: Of the scrambling; the same for all trials of a study.
        number: The trial's number.
    """

    def __init__(self, *, seed: int, number: int) -> None:
        self._seed, self._number = seed, number

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> SearchSpace:  # noqa: ARG002 Optuna's signature
        """Return nothing: the space is given by `PerTrialSampler`."""
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: SearchSpace) -> dict[str, Any]:  # noqa: ARG002
        """Return the point, one coordinate for each parameter."""
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(search_space), scramble=True, rng=np.random.default_rng(self._seed))
        if self._number:  # scipy 1.17 fails at fast_forward(0)
            sequence.fast_forward(self._number)
        point = sequence.random(1)[0]
        return {name: _at(dist, float(u)) for (name, dist), u in zip(search_space.items(), point, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw at random what stands outside the sequence, as in a trial enqueued with some parameters only."""
        seed = derive(self._seed, "outside", self._number, param_name) % 2**32
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)


class GridSampler(BaseSampler):
    """The combination of choices whose place among all of them is the trial's number; after the last, the first again.

    Differs: Optuna's GridSampler keeps the grid in each trial's attributes and draws from what is left at random, so
    that workers side by side may try the same one.

    Args:
        number: The trial's number.
    """

    def __init__(self, *, number: int) -> None:
        self._number = number

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> SearchSpace:  # noqa: ARG002 Optuna's signature
        """Return nothing: the space is given by `PerTrialSampler`."""
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: SearchSpace) -> dict[str, Any]:  # noqa: ARG002
        """Return the combination; the last parameter by name changes fastest."""
        shape = [len(_choices(distribution)) for distribution in search_space.values()]
        places = np.unravel_index(self._number % math.prod(shape), shape)
        return {
            name: _choices(distribution)[int(place)]
            for (name, distribution), place in zip(search_space.items(), places, strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the parameter's next choice, as in a trial enqueued with some parameters only."""
        return self.sample_relative(study, trial, {param_name: param_distribution})[param_name]


def _choices(distribution: BaseDistribution) -> Sequence[Any]:
    assert isinstance(distribution, CategoricalDistribution), distribution  # study_file refuses ranges
    return distribution.choices


def _at(distribution: BaseDistribution, u: float) -> Any:
    """Return the value at the share `u` in [0, 1) of a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(u * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    is_integer = isinstance(distribution, IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = float(np.exp(np.log(low) + u * (np.log(high + is_integer) - np.log(low))))
    elif step:
        value = low + step * int(u * (round((high - low) / step) + 1))
    else:
        value = low + u * (high - low)
    # exp(log(5)) is below 5, and 3 * 0.1 above 0.3: a value outside would be drawn again, off the sequence.
    return min(max(int(value) if is_integer else value, low), high)


def _tpe(seed: int, number: int, n_startup_trials: int) -> BaseSampler:  # noqa: ARG001 the table's signature
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=n_startup_trials, multivariate=True, constant_liar=True
    )


def _random(seed: int, number: int, n_startup_trials: int) -> BaseSampler:  # noqa: ARG001 the table's signature
    return RandomSampler(seed=seed)


def _gp(seed: int, number: int, n_startup_trials: int) -> BaseSampler:  # noqa: ARG001 the table's signature
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=n_startup_trials, deterministic_objective=False)


SAMPLERS: dict[str, Callable[[int, int, int], BaseSampler]] = {"tpe": _tpe, "random": _random, "gp": _gp}
SAMPLER_NAMES = (*SAMPLERS, "qmc", "grid")


def make_sampler(name: str, *, space: Mapping[str, BaseDistribution], seed: int, n_startup_trials: int) -> BaseSampler:
    """Return the sampler of a study.

    Args:
        name: One of `SAMPLER_NAMES`.
        space: The study's distributions.
        seed: The study's seed.
        n_startup_trials: How many trials are drawn at random before the sampler learns from them.
    """
    if name == "qmc":
        return PerTrialSampler(lambda _, number: SobolSampler(seed=seed, number=number), space=space, seed=seed)
    if name == "grid":
        return PerTrialSampler(lambda _, number: GridSampler(number=number), space=space, seed=seed)
    make = SAMPLERS[name]
    return PerTrialSampler(lambda drawn, number: make(drawn, number, n_startup_trials), space=space, seed=seed)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of every searched parameter."""
    made: dict[str, BaseDistribution] = {}
    for name in searched(space):
        param = space[name]
        if isinstance(param, Choice):
            made[name] = CategoricalDistribution([to_categorical(choice) for choice in param.choices])
        elif isinstance(param, Range) and param.is_integer:
            made[name] = IntDistribution(int(param.low), int(param.high), log=param.log, step=int(param.step or 1))
        elif isinstance(param, Range):
            made[name] = FloatDistribution(param.low, param.high, log=param.log, step=param.step)
    return made
