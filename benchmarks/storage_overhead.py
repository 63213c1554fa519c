"""Wall time of trials that do nothing: plain Optuna against frem-search, on the same embedded database in one run.

python benchmarks/storage_overhead.py [--trials 100] [--repeats 5]
"""

import argparse
import statistics
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import psycopg2
import sqlalchemy as sa

from frem_search.search.worker import Worker
from frem_search.storage.database import Storage
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.space import Range
from frem_search.study.stored import open_study
from frem_search.training.member import EpochReport
from frem_search.training.objective import Outcome

SPACE = {"B": Range(1, 512), "X": Range(1.0, 1000.0)}


@dataclass
class Nothing:
    """A member without a network."""

    params: Mapping[str, Any]
    epoch: int = 0
    best_score: float = 0.5
    in_sequence: bool = False
    set_aside: str = ""
    curve: dict[str, list[Any]] = field(default_factory=lambda: {"epoch": [1], "score": [0.5]})


class DoNothing:
    """An objective that reports one epoch and is done."""

    searches_shapes = False

    def __init__(self) -> None:
        self.members: dict[int, Nothing] = {}

    def admit(self, number: int, params: Mapping[str, Any]) -> Nothing:
        self.members[number] = Nothing(params)
        return self.members[number]

    def epochs(self) -> Iterator[EpochReport]:
        for number in list(self.members):
            yield EpochReport(number, 1, 0.0, 0.5, 0.5, is_finite=True, is_done=True, seconds=0.0)

    def trial(self, number: int) -> Nothing:
        return self.members[number]

    def train_in_turn(self) -> bool:
        return False

    def sweep(self, finished: Collection[int]) -> None: ...

    def finish(self, number: int) -> Outcome:
        scores = {"mean_iou": 0.5, "per_class": {"cell": 0.5}}
        return Outcome(value(self.members[number].params), {"best_epoch": 1, "val": scores, "test": scores})

    def save_checkpoint(self, number: int) -> None: ...

    def discard(self, number: int, *, weights: bool) -> None: ...

    def release(self, number: int) -> None:
        del self.members[number]

    def provenance(self, number: int) -> dict[str, Any]:
        return {"frem_search": "0", "torch": "0", "device": "none", "seconds": 0.0, "images": number}


def value(params: Mapping[str, Any]) -> float:
    """Return a score that depends on both parameters."""
    return -((params["B"] / 512 - 0.3) ** 2) - (params["X"] / 1000 - 0.6) ** 2


def time_plain(url: str, n_trials: int) -> float:
    """Return the seconds that plain Optuna takes: ask, two suggestions, tell."""
    storage = optuna.storages.RDBStorage(url)
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, constant_liar=True)
    study = optuna.create_study(storage=storage, study_name=uuid.uuid4().hex, direction="maximize", sampler=sampler)
    started = time.perf_counter()
    for _ in range(n_trials):
        trial = study.ask()
        params = {"B": trial.suggest_int("B", 1, 512), "X": trial.suggest_float("X", 1.0, 1000.0)}
        study.tell(trial, value(params))
    seconds = time.perf_counter() - started
    storage.engine.dispose()
    return seconds


def time_ours(storage: Storage, n_trials: int) -> float:
    """Return the seconds that our worker takes, leases, curves and provenance included."""
    name = uuid.uuid4().hex
    study_file = StudyFile(name, Path(), "", "", "none", "none", n_trials=n_trials, n_epochs=1, space=SPACE)
    study = open_study(storage, study_file, {"contract_version": 1})
    with Leases(storage, study.optuna, distributions=distributions(SPACE)) as leases:
        worker = Worker(leases, DoNothing(), space=SPACE, n_epochs=1)
        started = time.perf_counter()
        finished = sum(event.kind == "complete" for event in worker.work())
        seconds = time.perf_counter() - started
    assert finished == n_trials
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plain, ours = [], []
    with embedded_postgres() as url:
        storage = Storage(url)
        text = url.render_as_string(hide_password=False)
        for _ in range(options.repeats):
            plain.append(time_plain(text, options.trials))
            ours.append(time_ours(storage, options.trials))
        with storage.engine.connect() as connection:
            version = connection.execute(sa.text("SHOW server_version")).scalar()
        storage.close()
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(
        f"optuna {optuna.__version__}, PostgreSQL {version}, psycopg2 {psycopg2.__version__},"
        f" {options.trials} trials, n = {options.repeats}"
    )
    for name, seconds in (("plain Optuna", plain), ("frem-search", ours)):
        each = 1000 / options.trials
        middle, low, high = statistics.median(seconds) * each, min(seconds) * each, max(seconds) * each
        print(f"{name:14} {middle:6.1f} ms a trial ({low:.1f} to {high:.1f})")
    print(f"ratio          {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    import os

    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.environ["FREM_SEARCH_HOME"] = folder
        main()
