"""Workers killed and a database restarted again and again: what is left of a study, with frem-search and plain Optuna.

Four workers train 60 trials of two seconds. Until so many are complete, every two seconds one is killed and replaced,
the database is restarted five times, and one worker is stopped for longer than its lease and then continued. Plain
Optuna has its heartbeat, its retry callback, pre-ping and MaxTrialsCallback; a worker that ends with an error is
replaced in both.

    python -m benchmarks.storm [--trials 60] [--workers 4] [--kill-every 2] [--restarts 5] [--longest 200] [--seed 0]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import optuna
import psycopg2.errors
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from frem_search.errors import FremSearchError
from frem_search.search.worker import Worker
from frem_search.seeds import generator
from frem_search.storage.database import open_storage
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.space import Range
from frem_search.study.stored import open_study

NAME = "storm"
SPACE = {"B": Range(1, 512), "X": Range(1.0, 1000.0)}
N_EPOCHS, EPOCH_S = 8, 0.25
LEASE_S = 8.0  # of frem-search; of plain Optuna the grace period
HEARTBEAT_S = 2


def value(params: Mapping[str, Any]) -> float:
    """Return a score that depends on both parameters."""
    return -((params["B"] / 512 - 0.3) ** 2) - (params["X"] / 1000 - 0.6) ** 2


class Report(NamedTuple):
    """What an objective tells of an epoch; the real one would bring PyTorch into each of the many processes."""

    key: int
    epoch: int
    best_score: float
    is_done: bool
    is_finite: bool = True
    error: Exception | None = None


class Result(NamedTuple):
    """What an objective tells of a finished trial."""

    score: float
    result: dict[str, Any]
    shown: None = None


@dataclass
class Slow:
    """A member whose epochs take a quarter of a second and leave a number on disk."""

    params: Mapping[str, Any]
    epoch: int = 0
    curve: dict[str, list[Any]] = field(default_factory=lambda: {"epoch": [], "score": [], "best_score": []})
    best_score: float = -1.0
    in_sequence: bool = False
    set_aside: str = ""

    @property
    def is_done(self) -> bool:
        return self.epoch >= N_EPOCHS

    def train(self) -> None:
        time.sleep(EPOCH_S)
        self.epoch += 1
        self.best_score = value(self.params) + 0.01 * self.epoch
        for name, each in (("epoch", self.epoch), ("score", self.best_score), ("best_score", self.best_score)):
            self.curve[name].append(each)


class SlowObjective:
    """An objective that sleeps, with checkpoints in a folder that all workers share."""

    searches_shapes = False

    def __init__(self, folder: Path) -> None:
        self._folder, self.members = folder, dict[int, Slow]()

    def admit(self, number: int, params: Mapping[str, Any]) -> Slow:
        member = self.members[number] = Slow(params)
        if (path := self._folder / str(number)).exists():
            member.curve = json.loads(path.read_text())
            member.epoch, member.best_score = member.curve["epoch"][-1], member.curve["best_score"][-1]
        return member

    def epochs(self) -> Iterator[Report]:
        while active := [each for each in self.members.items() if not each[1].is_done]:
            for number, member in active:
                member.train()
                yield Report(number, member.epoch, member.best_score, is_done=member.is_done)

    def trial(self, number: int) -> Slow:
        return self.members[number]

    def train_in_turn(self) -> bool:
        return False

    def sweep(self, finished: Collection[int]) -> None: ...

    def save_checkpoint(self, number: int) -> None:
        path = self._folder / f"{number}.{os.getpid()}"
        path.write_text(json.dumps(self.members[number].curve))
        path.rename(self._folder / str(number))

    def finish(self, number: int) -> Result:
        scores = {"mean_iou": 0.5, "per_class": {"cell": 0.5}}
        return Result(self.members[number].best_score, {"best_epoch": 1, "val": scores})

    def provenance(self, number: int) -> dict[str, Any]:  # noqa: ARG002
        return {"seconds": N_EPOCHS * EPOCH_S}

    def release(self, number: int) -> None:
        self.members.pop(number, None)

    def discard(self, number: int, *, weights: bool) -> None: ...


def work_ours(url: str, n_trials: int, folder: Path) -> None:
    """Be a worker of frem-search."""
    with open_storage(url) as storage:
        file = StudyFile(NAME, Path(), "", "", "none", "none", n_trials=n_trials, n_epochs=N_EPOCHS, space=SPACE)
        study = open_study(storage, file, {"contract_version": 1, "precision": "fp32"})
        leases = Leases(storage, study.optuna, distributions=distributions(SPACE), lease_s=LEASE_S)
        with leases:
            worker = Worker(leases, SlowObjective(folder), space=SPACE, n_epochs=N_EPOCHS, checkpoint_every_s=0)
            for _ in worker.work():
                pass


def work_plain(url: str, n_trials: int) -> None:
    """Be a worker of plain Optuna, with all that it offers against failures."""

    def objective(trial: optuna.Trial) -> float:
        params = {"B": trial.suggest_int("B", 1, 512), "X": trial.suggest_float("X", 1.0, 1000.0)}
        for epoch in range(1, N_EPOCHS + 1):
            time.sleep(EPOCH_S)
            trial.report(value(params) + 0.01 * epoch, epoch)
        return value(params) + 0.01 * N_EPOCHS

    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs={"pool_pre_ping": True},
        heartbeat_interval=HEARTBEAT_S,
        grace_period=int(LEASE_S),
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize", load_if_exists=True)
    study.optimize(objective, callbacks=[MaxTrialsCallback(n_trials, states=(TrialState.COMPLETE,))])


class Team:
    """Workers as processes; whoever ends before the work is done is replaced."""

    def __init__(self, command: list[str], n: int, log: Path) -> None:
        self._command, self._log = command, log.open("ab")
        self.processes = [self._start() for _ in range(n)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)

    def kill_one(self, rng: np.random.Generator, *, but: subprocess.Popen[bytes] | None) -> int:
        candidates = [each for each in self.processes if each is not but and each.poll() is None]
        if not candidates:  # who has left, has found the work done
            return 0
        victim = candidates[rng.integers(len(candidates))]
        victim.kill()
        self.processes[self.processes.index(victim)] = self._start()
        return 1

    def replace_failed(self) -> int:
        failed = [each for each in self.processes if each.poll() not in (None, 0)]
        for each in failed:
            self.processes[self.processes.index(each)] = self._start()
        return len(failed)

    def is_done(self) -> bool:
        return all(each.poll() == 0 for each in self.processes)

    def end(self) -> None:
        for each in self.processes:
            if each.poll() is None:
                each.send_signal(signal.SIGCONT)
                each.kill()
            each.wait()


def n_complete(server: Any, database: str) -> int:
    """Return how many trials of the study are complete."""
    try:
        return int(server.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'", database=database)[0][0])
    except psycopg2.errors.UndefinedTable:  # nobody has begun the study yet
        return 0


def n_held(server: Any, database: str, pid: int) -> int:
    """Return how many trials a worker of frem-search holds."""
    query = "SELECT count(*) FROM frem_lease WHERE pid = %s AND token IS NOT NULL"
    return int(server.execute(query, database=database, values=[pid])[0][0])


def storm(role: str, server: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a study through the storm and return what is left of it."""
    database = server.create()
    # As SQLAlchemy spells it: by itself it would look for another driver.
    url = server.url(database=database).replace("postgresql:", "postgresql+psycopg2:")
    command = [sys.executable, "-m", "benchmarks.storm", "--role", role, "--trials", str(options.trials)]
    os.environ |= {"STORM_URL": url, "STORM_FOLDER": str(folder)}
    team, rng = Team(command, options.workers, folder.parent / f"{role}.log"), generator(options.seed, "storm")
    started = time.monotonic()
    next_kill, next_restart, n_restarts, n_kills, n_failed = started + 6, started + 10, 0, 0, 0
    stopped, is_stopped_done, continue_at, is_reached, stopped_held = None, False, 0.0, False, 0
    while time.monotonic() - started < options.longest and not team.is_done():
        now = time.monotonic()
        if now > next_restart and n_restarts < options.restarts:
            server.restart("fast", away_s=1.0)
            n_restarts, next_restart = n_restarts + 1, time.monotonic() + 8
        if now > next_kill and not is_reached:
            is_reached = n_complete(server, database) >= options.trials
            n_kills += 0 if is_reached else team.kill_one(rng, but=None if is_stopped_done else team.processes[0])
            next_kill = now + options.kill_every
        if not is_stopped_done and stopped is None and now > started + 15:
            stopped, continue_at = team.processes[0], now + LEASE_S + 4
            stopped.send_signal(signal.SIGSTOP)
            stopped_held = n_held(server, database, stopped.pid) if role == "ours" else 0
        if stopped is not None and now > continue_at:
            stopped.send_signal(signal.SIGCONT)
            stopped, is_stopped_done = None, True
        n_failed += team.replace_failed()
        time.sleep(0.1)
    is_ended, seconds = team.is_done(), time.monotonic() - started
    team.end()
    study = optuna.load_study(study_name=NAME, storage=optuna.storages.RDBStorage(url))
    states = Counter(trial.state.name for trial in study.trials)
    reasons = Counter(trial.user_attrs["reason"] for trial in study.trials if "reason" in trial.user_attrs)
    for reason, n in reasons.items():
        print(f"{role}: {n} trials ended with: {reason}")
    return {
        "ended by themselves": is_ended,
        "seconds": round(seconds),
        "workers killed": n_kills,
        "restarts of the database": n_restarts,
        "trials of the worker that was stopped": stopped_held if role == "ours" else "not known",
        "workers that ended with an error": n_failed,
        "numbers": len(study.trials),
        **{state: states[state] for state in ("COMPLETE", "RUNNING", "FAIL", "WAITING")},
        "steps lacking": sum(
            N_EPOCHS - len(t.intermediate_values) for t in study.trials if t.state == TrialState.COMPLETE
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill-every", type=float, default=2.0)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--longest", type=float, default=200.0, help="seconds after which a study is cut")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed")
    parser.add_argument("--role", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.role:
        url, folder = os.environ["STORM_URL"], Path(os.environ["STORM_FOLDER"])
        try:
            work_ours(url, options.trials, folder) if options.role == "ours" else work_plain(url, options.trials)
        except FremSearchError as error:
            sys.exit(str(error))
        return
    from tests.servers import TcpServer, find_binaries, user_for_server

    with TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "server").mkdir()
        server = TcpServer(root / "server", find_binaries(), user_for_server())
        server.initialise()
        # As anybody's server: tests/servers.py spares the disk and logs all statements.
        server.execute(
            "ALTER SYSTEM SET fsync = on", "ALTER SYSTEM SET log_statement = 'none'", "SELECT pg_reload_conf()"
        )
        results = {}
        try:
            for role in ("ours", "plain"):
                (root / role).mkdir()
                results[role] = storm(role, server, options, root / role)
        finally:
            server.stop("immediate")
    print(f"optuna {optuna.__version__}, {options.workers} workers, budget {options.trials} trials of 2 s")
    print(f"{'':34} {'frem-search':>12} {'plain Optuna':>13}")
    for key in results["ours"]:
        print(f"{key:34} {results['ours'][key]!s:>12} {results['plain'][key]!s:>13}")


if __name__ == "__main__":
    main()
