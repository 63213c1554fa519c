"""Training images per second, whole batches and next to no validation, against a plain loop, in one run.

`frem-search bench` measures a study as it is, with its validation and a last batch that is filled up. Here the study's
images are dealt out so that every batch is whole and one image validates: what is left is training itself.

    python -m benchmarks.training_speed [--repeats 5] [--seconds 2] [--batch-size 8]
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from frem_search.bench import Choice, bench_lines, entrants, run_bench
from frem_search.bench.speed import Trainee
from frem_search.data.dataset import load_dataset
from frem_search.data.folds import Split
from frem_search.study.file import load_study_file
from frem_search.study.space import Fixed
from frem_search.system.device import best_precision, find_device
from frem_search.training.recipe import first_image_size


def make_trainee(batch_size: int) -> Trainee:
    """Return `mouse_frem --quick` with as many whole batches as its images give, and one image that validates."""
    quick = load_study_file("mouse_frem", quick=True)
    study_file = replace(quick, space={**quick.space, "batch_size": Fixed(batch_size)})
    dataset = load_dataset(study_file.dataset, image_size=first_image_size(study_file))
    n_train = (len(dataset.cases) - 1) // batch_size * batch_size
    split = Split(dataset.cases[:n_train], dataset.cases[-1:], ())
    device = find_device()
    return Trainee(study_file, replace(dataset, splits=(split,)), device, best_precision(device))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    trainee = make_trainee(options.batch_size)
    contestants = entrants(trainee.device, precision=trainee.precision, choice=Choice(cohorts=(2, 8)))
    print("\n".join(bench_lines(run_bench(
        trainee, list(contestants), n_rounds=options.repeats, seconds=options.seconds
    ))))  # fmt: skip


if __name__ == "__main__":
    main()
