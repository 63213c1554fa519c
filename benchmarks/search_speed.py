"""Trials an hour of whole searches, and their best scores: one trial at a time against trials side by side.

Each seed is searched once in every arrangement, in turn, by the command itself; its start is counted.

    python benchmarks/search_speed.py [--seeds 5] [--trials 15]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from frem_search.storage.database import open_storage
from frem_search.study.file import find_study_file, load_study_file
from frem_search.study.stored import keep_cohort, make_contract, open_study
from frem_search.system.device import best_precision, find_device
from frem_search.training.recipe import load_images

COMMAND = [sys.executable, "-m", "frem_search"]
ALONE = "one at a time"
ARRANGEMENTS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    ALONE: (["--cohort", "1"], None),
    "2 workers": (["--cohort", "1", "--workers", "2"], None),
    "2 threads": (["--cohort", "2"], {"cohort": 2, "layout": "threads"}),
    "4 stacked": (["--cohort", "4"], {"cohort": 4, "layout": "stacked"}),
}


def search(study: Path, options: list[str], cohort: dict[str, Any] | None, n_trials: int) -> tuple[float, float]:
    """Return trials an hour and the best score of a search."""
    name = ["--study", str(study), "--quick", "--n-trials", str(n_trials)]
    if cohort is not None:
        begin(study, n_trials, cohort)
    started = time.perf_counter()
    told = subprocess.run([*COMMAND, "run", *name, *options, "--json"], check=True, capture_output=True).stdout
    seconds = time.perf_counter() - started
    status = json.loads(told)
    assert status["states"]["complete"] == n_trials, status
    subprocess.run([*COMMAND, "study", "delete", f"{study.stem}-quick", "--yes"], check=True, capture_output=True)
    return 3600 * n_trials / seconds, status["best"]["value"]


def begin(study: Path, n_trials: int, cohort: dict[str, Any]) -> None:
    """Begin a study with a layout that no measurement has chosen."""
    file = load_study_file(str(study), quick=True, n_trials=n_trials)
    dataset = load_images(file)
    contract = make_contract(
        file,
        precision=best_precision(find_device()),
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
    )
    with open_storage(None) as storage:
        keep_cohort(open_study(storage, file, contract), cohort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=15)
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    scores: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    text = find_study_file("mouse_frem").read_text()
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.environ |= {"FREM_SEARCH_HOME": folder, "FREM_SEARCH_ARTIFACTS": f"{folder}/artifacts"}
        subprocess.run([*COMMAND, "data", "synthesize", "mouse_synthetic"], check=True, capture_output=True)
        for seed in range(options.seeds):
            study = Path(folder) / f"seed{seed}.toml"
            study.write_text(re.sub(r"^seed = 0$", f"seed = {seed}", text, flags=re.MULTILINE))
            for name, (arguments, cohort) in ARRANGEMENTS.items():
                speed, score = search(study, arguments, cohort, options.trials)
                speeds[name].append(speed)
                scores[name].append(score)
                sys.stderr.write(f"seed {seed}, {name}: {speed:.0f} trials/h, best {score:.4f}\n")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.trials} trials, n = {options.seeds} seeds")
    print(
        f"{'':14} {'trials/h':>9} {'min':>6} {'max':>6} {'ratio':>6} {'min':>6} {'max':>6} {'best score':>11} {'sd':>7}"
    )
    for name in ARRANGEMENTS:
        ratios = [a / b for a, b in zip(speeds[name], speeds[ALONE], strict=True)]
        print(
            f"{name:14} {statistics.median(speeds[name]):9.0f} {min(speeds[name]):6.0f} {max(speeds[name]):6.0f}"
            f" {statistics.median(ratios):6.2f} {min(ratios):6.2f} {max(ratios):6.2f}"
            f" {statistics.mean(scores[name]):11.4f} {statistics.stdev(scores[name]):7.4f}"
        )


if __name__ == "__main__":
    main()
