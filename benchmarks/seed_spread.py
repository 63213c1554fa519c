"""How far the score of one configuration moves when only the training seed changes.

What the scatter of a search shows can be read only against this spread.

    python benchmarks/seed_spread.py --study mouse_frem [--dataset NAME] [--seeds 5] [--set B=8,X=250.0] [--set ...]

Each `--set` is one configuration: comma-separated values for the searched parameters.
"""

import argparse
import statistics
import time
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from frem_search.data.dataset import load_dataset
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import Sampler, StudyFile, load_study_file
from frem_search.study.space import resolve
from frem_search.system.device import best_precision, describe_device, find_device
from frem_search.training.objective import Objective
from frem_search.training.recipe import first_image_size


def scores(study_file: StudyFile, drawn: dict[str, Any], seed: int, folder: str) -> tuple[float, float]:
    """Return validation and test score of one training."""
    device = find_device()
    study_file = replace(study_file, sampler=Sampler(seed=seed))
    objective = Objective(
        study_file,
        load_dataset(study_file.dataset, image_size=first_image_size(study_file)),
        device=device,
        precision=best_precision(device),
        artifacts=Artifacts(folder, "spread"),
        study_uid="spread",
    )
    objective.admit(0, resolve(study_file.space, drawn))
    for report in objective.epochs():
        if report.error is not None:
            raise report.error
    outcome = objective.finish(0)
    return outcome.score, outcome.result["test"][study_file.score]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", required=True)
    parser.add_argument("--dataset")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="for example B=32,X=100.0")
    options = parser.parse_args()
    study_file = load_study_file(options.study, quick=True, dataset=options.dataset)
    print(
        f"{study_file.name}, {study_file.n_epochs} epochs, torch {torch.__version__}, {describe_device(find_device())}"
    )
    for text in options.set:
        drawn = {
            name: float(value) if "." in value else int(value)
            for name, value in (p.split("=") for p in text.split(","))
        }
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            rows = [scores(study_file, drawn, seed, folder) for seed in range(options.seeds)]
        for part, values in zip(("validation", "test"), zip(*rows, strict=True), strict=True):
            print(
                f"{text:14} {part:10} {study_file.score} mean {statistics.mean(values):.4f},"
                f" standard deviation {statistics.stdev(values):.4f},"
                f" {min(values):.4f} to {max(values):.4f}, n = {len(values)}"
            )
        print(f"{text:14} {(time.perf_counter() - started) / options.seeds:.1f} s a training")


if __name__ == "__main__":
    main()
