"""What tests against plain Optuna share: workers of both kinds as processes, forked from one that has imported all."""

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.trial import TrialState
from searches import SPACE

from frem_search.storage.database import open_storage
from frem_search.storage.leases.claims import Held
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.stored import make_contract, open_study

FORKS = multiprocessing.get_context("forkserver")


def start_forking():
    """Start the process that all others are forked from; by itself it would not find the modules of the tests."""
    from multiprocessing import forkserver

    FORKS.set_forkserver_preload([__name__, "alembic.command", "psycopg2", "sqlalchemy.dialects.postgresql"])
    usual = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if usual is None else os.environ.update(PYTHONPATH=usual)


def of_optuna(url):
    """The URL as SQLAlchemy spells it: by itself it would look for another driver."""
    return url.replace("postgresql:", "postgresql+psycopg2:")


def suggest(trial):
    return trial.suggest_int("B", 1, 512), trial.suggest_float("X", 1.0, 1000.0, log=True)


def load_plain(url, *, sampler=None, **of_storage):
    """The study "plain", as a program that uses plain Optuna opens it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(of_optuna(url), **of_storage)
    return optuna.create_study(
        storage=storage, study_name="plain", direction="maximize", sampler=sampler, load_if_exists=True
    )


@contextmanager
def load_ours(url, *, n_trials=1, settings=None, **of_leases):
    """Leases of a worker of frem-search on the study "ours", whose file says what `settings` change."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    of_file = {"n_trials": n_trials, "n_epochs": 1, "space": SPACE} | (settings or {})
    file = StudyFile("ours", Path(), "", "ours", "none", "none", **of_file)
    given = {"precision": "fp32", "dataset": "none", "dataset_fingerprint": "0", "class_names": []}
    with open_storage(url) as storage:
        study = open_study(storage, file, make_contract(file, **given))
        with Leases(storage, study.optuna, distributions=distributions(file.space), **of_leases) as leases:
            yield leases


def spend(leases):
    """Take and finish trials until there is none to take; return their numbers and the last answer."""
    numbers = []
    while isinstance(held := leases.claim(), Held):
        leases.tell(held, state=TrialState.COMPLETE, value=float(held.number), attrs={})
        numbers.append(held.number)
    return numbers, held


# ---- What a process does; it begins with the end of a pipe, by which it tells how far it is and is told to go on.


def open_tables(pipe, kind, url):
    """Open a database that may have no tables yet."""
    pipe.send("ready")
    pipe.recv()
    try:
        if kind == "plain":
            optuna.storages.RDBStorage(of_optuna(url))
        else:
            open_storage(url).__enter__()
    except Exception as error:  # noqa: BLE001 told to the test
        pipe.send(type(error).__name__)
    else:
        pipe.send("open")


def optimize(pipe, url, *, environment=None, exits_on_term=False, dies_before_heartbeat=False, **of_storage):
    """Be a worker of plain Optuna that trains one trial, which ends when the test says so."""
    os.environ.update(environment or {})
    threading.excepthook = lambda ended: pipe.send(f"its thread ended: {ended.exc_type.__name__}")
    if exits_on_term:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if dies_before_heartbeat:
        optuna.storages.RDBStorage.record_heartbeat = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def objective(trial):
        suggest(trial)
        trial.report(0.5, 1)
        pipe.send(trial.number)
        pipe.recv()
        return 0.5

    try:
        load_plain(url, **of_storage).optimize(objective, n_trials=1)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    pipe.send("done")


def train(pipe, url, *, environment=None, dies_after_claim=False, **of_leases):
    """Be a worker of frem-search that trains one trial, which ends when the test says so."""
    os.environ.update(environment or {})
    with load_ours(url, **of_leases) as leases:
        held = leases.claim()
        if dies_after_claim:
            os.kill(os.getpid(), signal.SIGKILL)
        leases.report(held, 0.5, step=1)
        pipe.send(held.number)
        pipe.recv()
        leases.tell(held, state=TrialState.COMPLETE, value=0.5, attrs={})
        pipe.send("done")
