"""Whether a search has something to find: the share of a score's variance that is of the configuration, not the seed.

    python benchmarks/search_signal.py --study mouse_frem --quick [--dataset NAME] [--points 16] [--seeds 4]
        [--epochs N] [--processes 2]

The first Sobol points of the study's own space are trained with the same seeds each. The intraclass correlation (ICC)
is 0 where the score is noise and 1 where a seed moves all configurations alike, as in a search, whose trials share one.
It is told of the better half of the points too, as a few broken configurations make it large where nothing is left to
search among the others: the half is chosen by some of the seeds and measured on the others.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import optuna
from scipy import stats
from seed_spread import add_options, load, train_all

from frem_search.study.samplers import distributions, make_sampler


def intraclass_correlation(scores: np.ndarray) -> tuple[float, float, float]:
    """Return the ICC of single scores with the effect of a seed on all configurations taken out, and its 95 % interval.

    Source: Shrout and Fleiss, "Intraclass correlations", Psychological Bulletin 86 (1979), ICC(3, 1).

    Args:
        scores: [configurations, seeds].

    >>> intraclass_correlation(np.array([[1.0, 11.0], [2.0, 12.0], [3.0, 13.1]]))[0] > 0.99
    True
    """
    n, k = scores.shape
    between = k * scores.mean(axis=1).var(ddof=1)
    left = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
    freedom = (n - 1) * (k - 1)
    f = between / ((left**2).sum() / freedom)
    low = f / stats.f.ppf(0.975, n - 1, freedom)
    high = f * stats.f.ppf(0.975, freedom, n - 1)
    icc, lower, upper = ((each - 1) / (each + k - 1) for each in (f, low, high))
    return float(icc), float(lower), float(upper)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="where to write all scores, as JSON")
    options = parser.parse_args()
    study_file = load(options)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dists = distributions(study_file.space)
    sampler = make_sampler("qmc", space=dists, seed=0, n_startup_trials=1)
    sobol = optuna.create_study(direction="maximize", sampler=sampler)
    points = []
    for _ in range(options.points):
        trial = sobol.ask(dists)
        points.append(dict(trial.params))
        sobol.tell(trial, 0.0)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    started = time.perf_counter()
    rows = train_all([(study_file, point, seed) for point in points for seed in seeds], n_processes=options.processes)
    scores = np.array([row[0] for row in rows]).reshape(options.points, options.seeds)
    order = np.argsort(scores.mean(axis=1))[::-1]
    for i in order:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in points[i].items())
        print(f"{shown:40} mean {scores[i].mean():.4f}, standard deviation {scores[i].std(ddof=1):.4f}")
    halves = np.arange(options.seeds) % 2 == 0
    measured = [("all points", scores)]
    for chosen_by, measured_on, name in ((halves, ~halves, "even"), (~halves, halves, "odd")):
        best = np.argsort(scores[:, chosen_by].mean(axis=1))[::-1][: options.points // 2]
        measured.append((f"better half by {name} seeds, on the others", scores[best][:, measured_on]))
    for name, each in measured:
        icc, lower, upper = intraclass_correlation(each)
        print(f"{name}: ICC {icc:.2f} [{lower:.2f}, {upper:.2f}], n = {each.shape[0]} points x {each.shape[1]} seeds")
    print(f"{time.perf_counter() - started:.0f} s for {len(rows)} trainings")
    if options.out:
        options.out.write_text(json.dumps({"points": points, "validation": scores.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
