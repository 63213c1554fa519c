"""What `parameter_importance` says of simulated searches of which the truth is known.

    python benchmarks/importance_of_noise.py [--studies 600] [--trials 30] [--sampler tpe] [--space log] [--at-once 1]
        [--peak 0] [--slope 0] [--ped-anova]

A score is noise of standard deviation 1; `--peak 3` adds a bump 3 high over a third of the range of B, `--slope 3` a
line that rises by 3. So of a parameter that no score depends on p is to be uniform, and of B it is to be small.
The sampler is the one of a study, and learns from the scores. `--ped-anova` shows instead what permuted scores say of
Optuna's importance, the best tenth of the trials against all of them.
"""

import argparse
import math
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context

import numpy as np
import optuna
from scipy.stats import kstest

from frem_search.figures.parameter_importance import ABOVE_NOISE, holm, parameter_importance_data
from frem_search.seeds import generator
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.study.samplers import distributions, make_sampler
from frem_search.study.space import parse_space, space_to_json

B = {"low": 1, "high": 128}
SPACES = {
    "linear": {"B": B, "X": {"low": 1.0, "high": 1000.0}},
    "log": {"B": B, "X": {"low": 1.0, "high": 1000.0, "log": True}},
    "four": {
        "B": B,
        "X": {"low": 1.0, "high": 1000.0, "log": True},
        "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
        "loss": ["a", "b", "c"],
    },
}
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)


def search(options: argparse.Namespace, seed: int) -> optuna.Study:
    """Return a search of simulated scores."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dists = distributions(parse_space(SPACES[options.space], where="space"))
    sampler = make_sampler(options.sampler, space=dists, seed=seed, n_startup_trials=10)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    noise = generator("simulated scores", seed)
    for first in range(0, options.trials, options.at_once):
        asked = [study.ask(dists) for _ in range(min(options.at_once, options.trials - first))]
        for trial in asked:
            b = (trial.params["B"] - 1) / 127
            bump = options.peak * math.exp(-(((b - 0.3) / 0.15) ** 2))
            study.tell(trial, bump + options.slope * b + noise.normal())
    return study


def figure(options: argparse.Namespace, seed: int) -> dict[str, tuple[float, bool]]:
    """Return p of each parameter and whether the figure calls it above noise."""
    trials = search(options, seed).get_trials(deepcopy=False)
    record = StudyRecord(
        name=f"simulated {seed}",
        title="",
        dataset="",
        score="mean_iou",
        n_trials=len(trials),
        class_names=(),
        contract={"space": space_to_json(parse_space(SPACES[options.space], where="space"))},
        trials=tuple(TrialRecord(t.number, "complete", t.value, t.params, {}, WHEN, WHEN, {}) for t in trials),
    )
    return {each.name: (each.p, each.verdict == ABOVE_NOISE) for each in parameter_importance_data(record).importances}


def ped_anova(options: argparse.Namespace, seed: int, *, n_permutations: int = 99) -> dict[str, tuple[float, bool]]:
    """Return the same for Optuna's importance, not divided by the sum, over permuted scores."""
    warnings.simplefilter("ignore")
    study = search(options, seed)
    scores = np.array([trial.value for trial in study.trials])
    shuffle = generator("permutations", seed)
    orders = [scores, *(shuffle.permutation(scores) for _ in range(n_permutations))]
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    values = [evaluator.evaluate(study, target=lambda trial, order=order: -order[trial.number]) for order in orders]
    p = {
        name: (1 + sum(each[name] >= values[0][name] for each in values[1:])) / (1 + n_permutations)
        for name in values[0]
    }
    corrected = holm(p)
    return {name: (p[name], corrected[name] <= 0.05) for name in p}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=600)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--space", default="log", choices=SPACES)
    parser.add_argument("--at-once", type=int, default=1, help="trials that are asked for before the first is told")
    parser.add_argument("--peak", type=float, default=0.0)
    parser.add_argument("--slope", type=float, default=0.0)
    parser.add_argument("--ped-anova", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    measure = partial(ped_anova if options.ped_anova else figure, options)
    with get_context("spawn").Pool(options.processes) as pool:
        found = pool.map(measure, range(options.studies), chunksize=5)
    print(f"{vars(options)}, optuna {optuna.__version__}, {time.monotonic() - began:.0f} s")
    for name in SPACES[options.space]:
        p = np.array([study[name][0] for study in found])
        shares = ", ".join(f"{np.mean(p <= level + 1e-9):.3f} below {level}" for level in LEVELS)
        said = np.mean([study[name][1] for study in found])
        print(f"{name}: p {shares}; Kolmogorov-Smirnov {kstest(p, 'uniform').pvalue:.2g}; above noise {said:.3f}")
    print(f"any above noise: {np.mean([any(said for _, said in study.values()) for study in found]):.3f}")


if __name__ == "__main__":
    main()
