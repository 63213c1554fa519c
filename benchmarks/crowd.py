"""Many workers at once on one PostgreSQL: is the budget exact, how long does a claim take, how many connections?

Workers are threads, each with connections of its own; their trials do nothing, so that all of them claim all the time.

    python -m benchmarks.crowd [--workers 64] [--trials 2000] [--finished 10000]
"""

import argparse
import os
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import psycopg2

from benchmarks.storage_overhead import SPACE, DoNothing, value
from frem_search.leases import Held, Leases
from frem_search.space import distributions
from frem_search.storage import open_storage
from frem_search.study import open_study
from frem_search.study_file import Sampler, StudyFile
from frem_search.worker import Worker
from tests.servers import OWNER, TcpServer, find_binaries, user_for_server


class TimedLeases(Leases):
    """Leases that note how long a claim took."""

    seconds: list[float]

    def claim(self) -> object:  # type: ignore[override]
        started = time.perf_counter()
        claimed = super().claim()
        if isinstance(claimed, Held):
            self.seconds.append(time.perf_counter() - started)
        return claimed


def work(url: str, n_trials: int, seconds: list[float], ready: threading.Barrier, errors: list[Exception]) -> None:
    """Be one worker."""
    try:
        file = StudyFile(
            "crowd", Path(), "", "", "none", "none", n_trials=n_trials, n_epochs=1, space=SPACE,
            sampler=Sampler("random"),
        )  # fmt: skip
        with open_storage(url) as storage:
            study = open_study(storage, file, {"contract_version": 1, "precision": "fp32"})
            with TimedLeases(storage, study.optuna, distributions=distributions(SPACE)) as leases:
                leases.seconds = seconds
                worker = Worker(leases, DoNothing(), space=SPACE, n_epochs=1)
                ready.wait(300)
                for _ in worker.work():
                    pass
    except Exception as error:  # noqa: BLE001 told at the end
        errors.append(error)


def crowd(server: TcpServer, database: str, *, workers: int, n_trials: int) -> str:
    """Let the workers spend a budget, and return a row of the table."""
    url, seconds, errors = server.url(OWNER, database=database), list[float](), list[Exception]()
    ready = threading.Barrier(workers + 1)
    before = count(server, database)
    threads = [threading.Thread(target=work, args=(url, n_trials, seconds, ready, errors)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    ready.wait(300)
    started, most = time.perf_counter(), 0
    while any(thread.is_alive() for thread in threads):
        asked = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'frem_owner'"
        most = max(most, server.execute(asked)[0][0])
        time.sleep(0.2)
    elapsed, trials = time.perf_counter() - started, count(server, database)
    p50, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    return (
        f"{workers:8} {before:9} {n_trials:7} {trials:9} {len(errors):7} {elapsed:8.1f} {1000 * p50:10.0f}"
        f" {1000 * p95:10.0f} {most:12}"
    )


def count(server: TcpServer, database: str) -> int:
    """Return how many trials have a score."""
    try:
        rows = server.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'", database=database)
    except psycopg2.errors.UndefinedTable:
        return 0
    return int(rows[0][0])


def fill(server: TcpServer, database: str, n: int) -> None:
    """Add finished trials to the study."""
    storage = optuna.storages.RDBStorage(server.url(database=database).replace("postgresql:", "postgresql+psycopg2:"))
    study = optuna.load_study(study_name="crowd", storage=storage)
    known = distributions(SPACE)
    for i in range(n):
        params = {"B": 1 + i % 512, "X": 1.0 + i % 999}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=value(params)))
    storage.engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--finished", type=int, default=10_000)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    with TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        server = TcpServer(root, find_binaries(), user_for_server())
        server.initialise()
        try:
            database = server.create()
            # The usual max_connections of 100 must do for 40 workers.
            rows.append(crowd(server, database, workers=40, n_trials=200))
            server.execute("ALTER SYSTEM SET max_connections = 300")
            server.restart()
            database = server.create()
            rows.append(crowd(server, database, workers=options.workers, n_trials=options.trials))
            fill(server, database, options.finished - options.trials)
            rows.append(crowd(server, database, workers=options.workers, n_trials=options.finished + 200))
        finally:
            server.stop("immediate")
    print(f"optuna {optuna.__version__}, psycopg2 {psycopg2.__version__}, {os.cpu_count()} cores")
    print(" workers  finished  budget  complete  errors  seconds  claim p50  claim p95  connections")
    print(f"{'':49} {'ms':>18} {'ms':>10} {'at most':>12}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
