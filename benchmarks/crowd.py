"""Many workers at once on one PostgreSQL: is the budget exact, how long does a claim take, how many connections?

Their trials do nothing, so that all of them claim all the time. Workers are threads with connections of their own,
spread over a few processes.

    python -m benchmarks.crowd [--workers 64] [--trials 2000] [--finished 0] [--max-connections 100] [--sampler tpe]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import psycopg2

from benchmarks.storage_overhead import SPACE, DoNothing
from frem_search.search.worker import Worker
from frem_search.storage.database import open_storage
from frem_search.storage.leases.claims import Held
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import Sampler, StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.stored import open_study

NAME, URL = "crowd", "CROWD_URL"
CONTRACT = {"contract_version": 1, "precision": "fp32"}
FILL = """
    WITH filled AS (
        INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)
        SELECT i, study_id, 'COMPLETE', now(), now() FROM studies, generate_series(0, %(n)s - 1) i
        RETURNING trial_id, number
    ), valued AS (
        INSERT INTO trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, 0, sin(number), 'FINITE' FROM filled
    )
    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial_id, name, 1 + number * factor %% top, distribution
    FROM filled, (VALUES ('B', 37, 512, %(B)s), ('X', 53, 999, %(X)s)) AS p (name, factor, top, distribution)
"""


class TimedLeases(Leases):
    """Leases that note how long a claim took."""

    seconds: list[float]

    def claim(self) -> object:  # type: ignore[override]
        started = time.perf_counter()
        claimed = super().claim()
        if isinstance(claimed, Held):
            self.seconds.append(time.perf_counter() - started)
        return claimed


def study_file(n_trials: int, sampler: str) -> StudyFile:
    """Return the study of the crowd."""
    settings = {"n_trials": n_trials, "n_epochs": 1, "space": SPACE, "sampler": Sampler(sampler)}
    return StudyFile(NAME, Path(), "", "", "none", "none", **settings)  # type: ignore[arg-type]


def work(file: StudyFile, seconds: list[float], ready: threading.Barrier, errors: list[str]) -> None:
    """Be one worker."""
    try:
        with open_storage(os.environ[URL]) as storage:
            study = open_study(storage, file, CONTRACT)
            with TimedLeases(storage, study.optuna, distributions=distributions(SPACE)) as leases:
                leases.seconds = seconds
                worker = Worker(leases, DoNothing(), space=SPACE, n_epochs=1)
                ready.wait(300)
                for _ in worker.work():
                    pass
    except Exception as error:  # noqa: BLE001 told at the end
        errors.append(f"{type(error).__name__}: {error}")
        ready.abort()


def host(file: StudyFile, n_workers: int) -> None:
    """Be a process with some of the workers, which begin when a line comes in."""
    seconds, errors, ready = list[float](), list[str](), threading.Barrier(n_workers + 1)
    threads = [threading.Thread(target=work, args=(file, seconds, ready, errors)) for _ in range(n_workers)]
    for thread in threads:
        thread.start()
    while ready.n_waiting < n_workers and not errors:
        time.sleep(0.05)
    print("ready", flush=True)
    sys.stdin.readline()
    if not errors:
        ready.wait()
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": seconds, "errors": errors}))


def start_hosts(options: argparse.Namespace, n_trials: int) -> list[subprocess.Popen[str]]:
    """Start the processes, each with a share of the workers, and wait until all workers have opened the study."""
    shares = [len(range(i, options.workers, options.processes)) for i in range(options.processes)]
    command = [sys.executable, "-m", "benchmarks.crowd", "--trials", str(n_trials), "--sampler", options.sampler]
    hosts = [
        subprocess.Popen([*command, "--host", str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in shares
    ]
    for each in hosts:
        assert each.stdout is not None
        each.stdout.readline()
    return hosts


def crowd(server: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Let the workers spend a budget, and return what came of it."""
    database, n_trials = server.create(), options.finished + options.trials
    os.environ[URL] = server.url(database=database)
    with open_storage(os.environ[URL]) as storage:
        open_study(storage, study_file(n_trials, options.sampler), CONTRACT)
    known = {name: optuna.distributions.distribution_to_json(each) for name, each in distributions(SPACE).items()} | {
        "n": options.finished
    }
    server.execute(FILL, database=database, values=known)
    server.execute("ANALYZE", database=database)
    hosts, most, ends = start_hosts(options, n_trials), 0, list[dict[str, Any]]()
    started = time.perf_counter()
    try:
        for each in hosts:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        while any(each.poll() is None for each in hosts) and time.perf_counter() - started < options.longest:
            connected = server.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'frem_owner'")
            most = max(most, connected[0][0])
            time.sleep(0.2)
        elapsed = time.perf_counter() - started
    finally:
        for each in hosts:
            is_cut = each.poll() is None
            each.kill()
            told, _ = each.communicate()
            ends.append({"seconds": [], "errors": ["cut"]} if is_cut else json.loads(told))
    seconds = sorted(one for end in ends for one in end["seconds"]) or [float("nan")] * 2
    states = server.execute("SELECT state::text, count(*) FROM trials GROUP BY 1 ORDER BY 1", database=database)
    return {
        "workers": options.workers,
        "finished before": options.finished,
        "budget": n_trials,
        "trials": dict(states),
        "errors": [error for end in ends for error in end["errors"]],
        "seconds": round(elapsed, 1),
        "claims/s": round(len(seconds) / elapsed, 1),
        "claim p50, p95, longest / ms": [
            round(1000 * each)
            for each in (statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1], seconds[-1])
        ],
        "connections at most": most,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=2000, help="that the workers train")
    parser.add_argument("--finished", type=int, default=0, help="that the study has before")
    parser.add_argument("--max-connections", type=int, default=100, help="of the server; 100 is PostgreSQL's own")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--longest", type=float, default=220.0, help="seconds after which the workers are killed")
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.host:
        host(study_file(options.trials, options.sampler), options.host)
        return
    from tests.servers import TcpServer, find_binaries, user_for_server

    with TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        server = TcpServer(root, find_binaries(), user_for_server())
        server.initialise()
        try:
            # As others run one: the tests' server forgets what a power cut interrupts, and notes every statement.
            for setting in ("fsync = on", "log_statement = 'none'", f"max_connections = {options.max_connections}"):
                server.execute(f"ALTER SYSTEM SET {setting}")
            server.restart()
            found = crowd(server, options)
        finally:
            server.stop("immediate")
    print(f"optuna {optuna.__version__}, psycopg2 {psycopg2.__version__}, {os.cpu_count()} cores, {options.sampler}")
    for key, value in found.items():
        print(f"{key:30} {value}")


if __name__ == "__main__":
    main()
