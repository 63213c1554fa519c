"""Trials beyond the budget when eight workers spend it at once: frem-search against Optuna's MaxTrialsCallback.

python -m benchmarks.overshoot [--runs 20] [--workers 8] [--trials 20]
"""

import argparse
import os
import statistics
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from benchmarks.storage_overhead import SPACE, DoNothing, value
from frem_search.search.worker import Worker
from frem_search.storage.database import Storage, open_storage
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.stored import open_study


def work_ours(url: str, name: str, n_trials: int) -> None:
    """Be a worker of frem-search."""
    file = StudyFile(name, Path(), "", "", "none", "none", n_trials=n_trials, n_epochs=1, space=SPACE)
    with open_storage(url) as storage:
        study = open_study(storage, file, {"contract_version": 1, "precision": "fp32"})
        with Leases(storage, study.optuna, distributions=distributions(SPACE)) as leases:
            for _ in Worker(leases, DoNothing(), space=SPACE, n_epochs=1).work():
                pass


def work_plain(url: str, name: str, n_trials: int) -> None:
    """Be a worker of plain Optuna."""
    storage = optuna.storages.RDBStorage(url)
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    study.optimize(
        lambda trial: value({"B": trial.suggest_int("B", 1, 512), "X": trial.suggest_float("X", 1.0, 1000.0)}),
        callbacks=[MaxTrialsCallback(n_trials, states=(TrialState.COMPLETE,))],
    )
    storage.engine.dispose()


def overshoot(work: Callable[[str, str, int], None], url: str, *, workers: int, n_trials: int) -> int:
    """Let the workers spend one budget, and return how many trials there are too many."""
    name = uuid.uuid4().hex
    threads = [threading.Thread(target=work, args=(url, name, n_trials)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage = optuna.storages.RDBStorage(url)
    n_complete = len(optuna.load_study(study_name=name, storage=storage).get_trials(states=(TrialState.COMPLETE,)))
    storage.engine.dispose()
    return n_complete - n_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with embedded_postgres() as embedded:
        url = embedded.render_as_string(hide_password=False)
        Storage(embedded).close()
        print(f"optuna {optuna.__version__}, {options.workers} workers, budget {options.trials}, n = {options.runs}")
        for label, work in (("frem-search", work_ours), ("plain Optuna", work_plain)):
            beyond = [
                overshoot(work, url, workers=options.workers, n_trials=options.trials) for _ in range(options.runs)
            ]
            middle = statistics.median(beyond)
            print(
                f"{label:13} beyond the budget: median {middle:g}, {min(beyond)} to {max(beyond)}, in all {sum(beyond)}"
            )


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.environ["FREM_SEARCH_HOME"] = folder
        main()
