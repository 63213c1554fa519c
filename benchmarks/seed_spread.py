"""How far scores move when only the training seed changes, of single configurations and of their differences.

What the scatter of a search shows can be read only against the first; between two configurations decides the second,
the spread of *paired* differences: both trained with the same seed, so with the same first weights and batches.

    python benchmarks/seed_spread.py --study mouse_frem --quick --set B=1,X=250.0 --set B=10,X=632.0 [--set ...]
        [--dataset NAME] [--epochs N] [--seeds 5] [--first-seed 1] [--processes 2]

Each `--set` is one configuration: comma-separated values for the searched parameters and others. Differences are of
each later one against the first.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scipy import stats

from frem_search.data.dataset import load_dataset
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import StudyFile, load_study_file
from frem_search.study.space import resolve
from frem_search.system.device import best_precision, describe_device, find_device
from frem_search.training.objective import Objective
from frem_search.training.recipe import first_image_size
from frem_search.training.single import settle

Job = tuple[StudyFile, dict[str, Any], int]


def scores(job: Job) -> tuple[float, float]:
    """Return validation and test score of one training: a study, values for parameters, and a training seed."""
    study_file, values, seed = job
    device = find_device()
    settled = settle(study_file, values | {"seed": seed})
    with TemporaryDirectory() as folder:
        objective = Objective(
            settled,
            load_dataset(settled.dataset, image_size=first_image_size(settled)),
            device=device,
            precision="fp32" if settled.precision == "fp32" else best_precision(device),
            artifacts=Artifacts(folder, "spread"),
            study_uid="spread",
        )
        objective.admit(0, resolve(settled.space, {}))
        for report in objective.epochs():
            if report.error is not None:
                raise report.error
        outcome = objective.finish(0)
    return outcome.score, outcome.result["test"][settled.score]


def train_all(jobs: Sequence[Job], *, n_processes: int) -> list[tuple[float, float]]:
    """Train in processes of one thread each, and return the scores in the jobs' order."""
    for study_file in {job[0].dataset: job[0] for job in jobs}.values():  # generated once, not by every process
        load_dataset(study_file.dataset, image_size=first_image_size(study_file))
    context = get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(scores, jobs))


def parse(text: str) -> dict[str, Any]:
    """Return the values of one `--set`.

    >>> parse("B=8,X=250.0,supervision=true")
    {'B': 8, 'X': 250.0, 'supervision': True}
    """

    def value(word: str) -> Any:
        for kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                pass
        return {"true": True, "false": False}.get(word, word)

    return {name: value(word) for name, word in (pair.split("=") for pair in text.split(","))}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark has in common with `search_signal.py`."""
    parser.add_argument("--study", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dataset")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())


def load(options: argparse.Namespace) -> StudyFile:
    """Return the study that the options name, and print under what conditions it trains."""
    file = load_study_file(options.study, quick=options.quick, dataset=options.dataset, n_epochs=options.epochs)
    device = describe_device(find_device())
    print(f"{file.name}, {file.n_epochs} epochs, {options.processes} processes, torch {torch.__version__}, {device}")
    return file


def difference(values: Sequence[float], first: Sequence[float]) -> str:
    """Return the mean of paired differences, their deviation and the 95 % t interval of the mean."""
    paired = [value - other for value, other in zip(values, first, strict=True)]
    mean, deviation, n = statistics.mean(paired), statistics.stdev(paired), len(paired)
    half = stats.t.ppf(0.975, n - 1) * deviation / n**0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}], deviation of paired differences {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="for example B=32,X=100.0")
    options = parser.parse_args()
    study_file = load(options)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    started = time.perf_counter()
    rows = train_all(
        [(study_file, parse(text), seed) for text in options.set for seed in seeds], n_processes=options.processes
    )
    by_set = [rows[i : i + options.seeds] for i in range(0, len(rows), options.seeds)]
    for part, name in enumerate(("validation", "test")):
        columns = [[row[part] for row in of_set] for of_set in by_set]
        for text, values in zip(options.set, columns, strict=True):
            print(
                f"{name:10} {text:30} {study_file.score} mean {statistics.mean(values):.4f}, standard deviation "
                f"{statistics.stdev(values):.4f}, {min(values):.4f} to {max(values):.4f}, n = {len(values)}"
            )
        for text, values in zip(options.set[1:], columns[1:], strict=True):
            print(f"{name:10} {text} minus {options.set[0]}: {difference(values, columns[0])}")
    print(f"{time.perf_counter() - started:.0f} s for {len(rows)} trainings")


if __name__ == "__main__":
    main()
