"""Leases: an exact budget, trials that outlive their workers, and connections cut at every statement."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import optuna
import psycopg2
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from frem_search.errors import LeaseLostError, StudyNotFoundError
from frem_search.storage.database import open_storage
from frem_search.storage.leases import leases as leases_module
from frem_search.storage.leases.claims import Held
from frem_search.storage.leases.leases import Leases
from frem_search.study.samplers import make_sampler

SPACE = {"B": IntDistribution(1, 512), "X": FloatDistribution(1.0, 1000.0, log=True)}
DONE = {"attrs": {"result": 1}, "curve": {"epoch": [1, 2]}}


def make_study(storage, *, n_trials=1, name="study", sampler="random", pruner=None):
    study = optuna.create_study(
        storage=storage.optuna,
        study_name=name,
        direction="maximize",
        sampler=make_sampler(sampler, space=SPACE, seed=0, n_startup_trials=4),
        pruner=pruner or optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    study.set_user_attr("n_trials", n_trials)
    return study


def make_leases(storage, study, **settings):
    return Leases(storage, study, distributions=SPACE, **settings)


def lease_row(storage, held):
    with storage.engine.connect() as connection:
        query = sa.text("SELECT *, expires_at > now() AS is_live FROM frem_lease WHERE trial_id = :id")
        return connection.execute(query, {"id": held.id}).one()


def expire(storage, held):
    with storage.engine.begin() as connection:
        query = sa.text("UPDATE frem_lease SET expires_at = now() - interval '1 second' WHERE trial_id = :id")
        connection.execute(query, {"id": held.id})


def stored(storage, name="study"):
    """Every trial as another process would read it."""
    with open_storage(storage.engine.url.render_as_string(hide_password=False)) as other:
        return optuna.load_study(study_name=name, storage=other.optuna, sampler=optuna.samplers.RandomSampler()).trials


@pytest.fixture
def other_storage(storage_url):
    with open_storage(storage_url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_claim_draws_every_parameter_and_writes_the_lease(storage):
    study = make_study(storage)
    held = make_leases(storage, study, device="cpu, 1 threads").claim()
    trial = stored(storage)[0]
    assert trial.state == TrialState.RUNNING
    assert set(trial.params) == {"B", "X"}
    row = lease_row(storage, held)
    assert (row.token, row.pid, row.attempts, row.device) == (held.token, os.getpid(), 1, "cpu, 1 threads")
    assert row.is_live


def test_claim_takes_enqueued_trials_first_and_beyond_the_budget(storage):
    study = make_study(storage, n_trials=2)
    study.enqueue_trial({"B": 7, "X": 3.0})
    study.enqueue_trial({"B": 8})
    study.enqueue_trial({"B": 9})
    leases = make_leases(storage, study)
    taken = [leases.claim() for _ in range(3)]
    assert [(held.number, held.trial.params["B"]) for held in taken] == [(0, 7), (1, 8), (2, 9)]
    assert taken[0].trial.params["X"] == 3.0
    assert all(set(held.trial.params) == {"B", "X"} for held in taken)
    for held in taken:
        leases.tell(held, state=TrialState.COMPLETE, value=1.0, **DONE)
    assert leases.claim() == "spent"
    assert len(stored(storage)) == 3


def test_an_enqueued_trial_counts_for_the_budget(storage):
    study = make_study(storage, n_trials=2)
    study.enqueue_trial({"B": 7})
    leases = make_leases(storage, study)
    assert [leases.claim().number, leases.claim().number] == [0, 1]
    assert leases.claim() == "busy"
    assert len(stored(storage)) == 2


def test_busy_while_others_hold_trials_and_spent_after(storage, other_storage):
    mine = make_leases(storage, make_study(storage))
    others = make_leases(other_storage, make_study(other_storage))
    held = mine.claim()
    assert others.claim() == "busy"
    mine.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE)
    assert others.claim() == "spent"


def test_a_deleted_study_ends_the_claim(storage):
    study = make_study(storage)
    leases = make_leases(storage, study)
    optuna.delete_study(study_name="study", storage=storage.optuna)
    with pytest.raises(StudyNotFoundError, match="study: the study was deleted"):
        leases.claim()


def test_a_released_trial_is_adopted_with_number_parameters_and_reports(storage, other_storage):
    mine = make_leases(storage, make_study(storage))
    held = mine.claim()
    mine.report(held, 0.25, step=2)
    mine.release(held, reason="stopped")
    others = make_leases(other_storage, make_study(other_storage))
    adopted = others.claim()
    assert adopted.is_adopted
    assert (adopted.number, adopted.trial.params) == (held.number, held.trial.params)
    assert adopted.reported == 2
    assert adopted.token != held.token
    others.report(adopted, 0.9, step=2)  # silent up to the last stored step
    assert stored(storage)[0].intermediate_values == {2: 0.25}
    others.tell(adopted, state=TrialState.COMPLETE, value=0.75, **DONE)
    assert [trial.value for trial in stored(storage)] == [0.75]


def test_a_trial_is_adopted_after_its_lease_ran_out(storage, other_storage):
    mine = make_leases(storage, make_study(storage), lease_s=1.0)
    others = make_leases(other_storage, make_study(other_storage))
    held = mine.claim()
    assert others.claim() == "busy"
    time.sleep(1.05)
    assert others.claim().number == held.number


def test_renewal_keeps_a_lease_beyond_its_time(storage, other_storage):
    others = make_leases(other_storage, make_study(other_storage))
    with make_leases(storage, make_study(storage), lease_s=1.0) as mine:
        held = mine.claim()
        held.epoch = 7
        time.sleep(1.6)
        assert others.claim() == "busy"
        assert lease_row(storage, held).epoch == 7
        assert not held.is_lost
    time.sleep(1.05)
    assert others.claim().number == held.number


def test_renewal_survives_a_lost_connection(storage, other_storage, postgres):
    others = make_leases(other_storage, make_study(other_storage))
    with make_leases(storage, make_study(storage), lease_s=1.5) as mine:
        held = mine.claim()
        for _ in range(5):
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND datname = "
                f"'{storage.engine.url.database}'"
            )
            time.sleep(0.4)
        assert others.claim() == "busy"
        assert not held.is_lost


def test_renewal_notices_that_the_trial_was_taken(storage, other_storage):
    with make_leases(storage, make_study(storage), lease_s=0.6) as mine:
        held = mine.claim()
        with other_storage.engine.begin() as connection:
            connection.execute(sa.text("UPDATE frem_lease SET token = 'another'"))
        time.sleep(0.5)
        assert held.is_lost


def test_a_worker_whose_lease_was_taken_can_change_nothing(storage, other_storage):
    mine = make_leases(storage, make_study(storage))
    others = make_leases(other_storage, make_study(other_storage))
    held = mine.claim()
    expire(storage, held)
    adopted = others.claim()
    others.report(adopted, 0.5, step=1)
    others.checkpointed(adopted, epoch=1, curve={"epoch": [1]})
    before = stored(storage), lease_row(storage, held)
    with pytest.raises(LeaseLostError, match="trial 0: another worker holds it now"):
        mine.report(held, 0.9, step=3)
    assert held.is_lost
    with pytest.raises(LeaseLostError):
        mine.checkpointed(held, epoch=9, curve={"epoch": [9]})
    with pytest.raises(LeaseLostError):
        mine.tell(held, state=TrialState.COMPLETE, value=0.9, attrs={"reason": "late"}, curve={"epoch": [9]})
    mine.release(held, reason="late")
    assert (stored(storage), lease_row(storage, held)) == before
    others.tell(adopted, state=TrialState.COMPLETE, value=0.5, **DONE)
    before = stored(storage), lease_row(storage, held)
    with pytest.raises(LeaseLostError):
        mine.tell(held, state=TrialState.FAIL, attrs={"reason": "late"})
    assert (stored(storage), lease_row(storage, held)) == before


def test_a_claim_waits_for_the_one_before_it(storage, other_storage):
    mine = make_leases(storage, make_study(storage))
    others = make_leases(other_storage, make_study(other_storage))
    has_asked, may_commit, take = threading.Event(), threading.Event(), mine._claims._take

    def take_slowly(*args, **kwargs):
        has_asked.set()
        may_commit.wait(10)
        return take(*args, **kwargs)

    mine._claims._take = take_slowly
    claimed = []
    first = threading.Thread(target=lambda: claimed.append(mine.claim()))
    first.start()
    assert has_asked.wait(10)
    second = threading.Thread(target=lambda: claimed.append(others.claim()))
    second.start()
    time.sleep(0.3)
    assert claimed == []
    may_commit.set()
    first.join()
    second.join()
    assert {type(claim) for claim in claimed} == {Held, str}
    assert "busy" in claimed
    assert len(stored(storage)) == 1


def test_who_takes_a_trial_waits_for_a_report_that_is_under_way(storage, other_storage):
    """And so finds it, instead of a row that appears behind its back."""
    mine = make_leases(storage, make_study(storage))
    others = make_leases(other_storage, make_study(other_storage))
    held = mine.claim()
    expire(storage, held)
    is_checked, may_store, store = threading.Event(), threading.Event(), mine._store_unsent

    def store_slowly(*args):
        is_checked.set()
        may_store.wait(10)
        store(*args)

    mine._store_unsent = store_slowly
    reporter = threading.Thread(target=mine.report, args=(held, 0.5), kwargs={"step": 4})
    reporter.start()
    assert is_checked.wait(10)
    claimed = []
    claimer = threading.Thread(target=lambda: claimed.append(others.claim()))
    claimer.start()
    time.sleep(0.3)
    assert claimed == []
    may_store.set()
    reporter.join()
    claimer.join()
    assert (claimed[0].number, claimed[0].reported) == (0, 4)


@pytest.mark.parametrize("action", ["report", "checkpointed", "require", "tell"])
def test_a_trial_that_somebody_else_finished_or_deleted_is_let_go(storage, other_storage, action):
    """By the dashboard, say, or by Optuna's own program."""
    mine = make_leases(storage, make_study(storage, n_trials=2))
    actions = {
        "report": lambda held: mine.report(held, 0.5, step=1),
        "checkpointed": lambda held: mine.checkpointed(held, epoch=1, curve={}),
        "require": mine.require,
        "tell": lambda held: mine.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE),
    }
    finished, deleted = mine.claim(), mine.claim()
    other_storage.optuna.set_trial_state_values(finished.id, TrialState.FAIL)
    with pytest.raises(LeaseLostError, match="trial 0: somebody else has finished it"):
        actions[action](finished)
    assert finished.is_lost
    other_storage.optuna.delete_study(mine._study_id)
    with pytest.raises(LeaseLostError, match="trial 1: it was deleted with its study"):
        actions[action](deleted)


def test_each_attempt_is_on_the_trial_with_the_reason_of_its_end(storage, other_storage):
    mine = make_leases(storage, make_study(storage), max_attempts=2)
    others = make_leases(other_storage, make_study(other_storage), max_attempts=2)
    held = mine.claim()
    held.epoch = 3
    mine.checkpointed(held, epoch=3, curve={})
    mine.release(held, reason="stopped")
    held = others.claim()
    assert (held.epoch, held.attempt) == (3, 1)
    expire(storage, held)
    held = mine.claim()
    here = f"{socket.gethostname()}:{os.getpid()}"
    first, second = ({"worker": here, "epoch": 3, "ended": ended} for ended in ("stopped", "its lease ran out"))
    assert stored(storage)[0].user_attrs == {"attempts": [first, second]}
    mine.release(held, reason="no space", is_forgiven=False)
    assert others.claim() == "spent"
    assert others.given_up == {0: "2 attempts in a row advanced no checkpoint; the last ended: no space"}
    (trial,) = stored(storage)
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["attempts"] == [first, second, {"worker": here, "epoch": 3, "ended": "no space"}]


def test_a_trial_that_another_program_began_gets_the_parameters_that_it_lacks(storage):
    study = make_study(storage, n_trials=2)
    study.ask({"B": SPACE["B"]})
    held = make_leases(storage, study).claim()
    assert (held.number, held.is_adopted, set(held.trial.params)) == (0, True, {"B", "X"})
    assert stored(storage)[0].params == held.trial.params


def test_renewal_outlives_any_error(storage, other_storage, monkeypatch):
    from frem_search.storage.leases.renewal import Renewal

    renew, n_failed = Renewal._renew, []

    def fail_first(self):
        if len(n_failed) < 3:
            n_failed.append(1)
            raise ZeroDivisionError
        renew(self)

    monkeypatch.setattr(Renewal, "_renew", fail_first)
    with make_leases(storage, make_study(storage), lease_s=1.2) as mine:
        held = mine.claim()
        time.sleep(1.5)
        assert lease_row(storage, held).is_live
        assert make_leases(other_storage, make_study(other_storage)).claim() == "busy"


def test_the_standing_counts_what_ended_and_names_the_best(storage):
    leases = make_leases(storage, make_study(storage, n_trials=5))
    for value in (0.5, 0.7, 0.6):
        leases.tell(leases.claim(), state=TrialState.COMPLETE, value=value, **DONE)
    leases.tell(leases.claim(), state=TrialState.PRUNED, **DONE)
    leases.claim()
    assert leases.standing(most=2) == (4, [1, 2])
    assert sorted(leases.finished()) == [0, 1, 2, 3]


@pytest.mark.parametrize("max_attempts", [3, 1])
def test_a_claim_while_a_late_worker_tells_leaves_the_trial_as_told(storage, other_storage, max_attempts, monkeypatch):
    mine = make_leases(storage, make_study(storage))
    others = make_leases(other_storage, make_study(other_storage), max_attempts=max_attempts)
    held = mine.claim()
    expire(storage, held)
    is_told, may_commit, finish = threading.Event(), threading.Event(), leases_module.finish

    def finish_slowly(*args, **kwargs):
        finish(*args, **kwargs)
        is_told.set()
        may_commit.wait(10)

    monkeypatch.setattr(leases_module, "finish", finish_slowly)
    teller = threading.Thread(
        target=mine.tell, args=(held,), kwargs={"state": TrialState.COMPLETE, "value": 0.5} | DONE
    )
    teller.start()
    assert is_told.wait(10)
    claimed = []
    claimer = threading.Thread(target=lambda: claimed.append(others.claim()))
    claimer.start()
    time.sleep(0.3)
    may_commit.set()
    teller.join()
    claimer.join()
    assert claimed[0] in ("busy", "spent")
    assert others.claim() == "spent"
    assert [trial.value for trial in stored(storage)] == [0.5]
    assert lease_row(storage, held).token is None


def statements_of(storage, action):
    seen = []
    sa.event.listen(storage.engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    action()
    return seen


def reads_trials(statement):
    return "trials_datetime_complete" in statement and "WHERE trials.study_id" in statement


def test_a_claim_reads_the_trials_before_it_holds_up_others(storage, other_storage):
    leases = make_leases(storage, make_study(storage, n_trials=9))
    for _ in range(6):
        leases.tell(leases.claim(), state=TrialState.COMPLETE, value=0.5, **DONE)
    late = make_leases(other_storage, make_study(other_storage, n_trials=9, sampler="tpe"))
    seen = statements_of(other_storage, late.claim)
    locked = next(i for i, statement in enumerate(seen) if "FOR UPDATE OF s" in statement)
    params = [
        i for i, statement in enumerate(seen) if "FROM trial_params \nWHERE trial_params.trial_id IN" in statement
    ]
    assert len(params) == 1
    assert params[0] < locked  # all that is read under the lock is what has changed: nothing


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_a_claim_reads_what_others_did_once(storage, other_storage, sampler):
    """However often the sampler looks; what it is told of is what was stored when the study was locked."""
    leases = make_leases(storage, make_study(storage, n_trials=20, sampler=sampler))
    others = make_leases(other_storage, make_study(other_storage, n_trials=20, sampler=sampler))
    for _ in range(5):
        leases.tell(leases.claim(), state=TrialState.COMPLETE, value=0.5, **DONE)
        others.tell(others.claim(), state=TrialState.PRUNED, **DONE)
        others.claim()
    seen = statements_of(storage, leases.claim)
    assert sum(map(reads_trials, seen)) == 1
    known = leases._study.get_trials(deepcopy=False)
    assert [trial.state.name for trial in known] == ["COMPLETE", "PRUNED", "RUNNING"] * 5 + ["RUNNING"]


def test_reading_once_changes_no_suggestion(storage, other_storage, monkeypatch):
    def params(name, opened):
        leases = make_leases(opened, make_study(opened, n_trials=16, name=name, sampler="tpe"))
        held = [leases.claim(), leases.claim()]  # two trials side by side, of which TPE keeps clear
        while held:
            done = held.pop(0)
            value = -((done.trial.params["B"] - 99) ** 2)
            leases.tell(done, state=TrialState.COMPLETE, value=value, **DONE)
            if isinstance(claimed := leases.claim(), Held):
                held.append(claimed)
        return [trial.params for trial in stored(storage, name)]

    once = params("once", storage)
    monkeypatch.setattr(type(other_storage), "reading_once", lambda _: nullcontext())
    assert params("each time", other_storage) == once


def test_a_second_tell_of_the_same_worker_changes_nothing(storage):
    leases = make_leases(storage, make_study(storage))
    held = leases.claim()
    leases.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE)
    before = stored(storage)
    leases.tell(held, state=TrialState.FAIL, attrs={"reason": "again"})
    assert stored(storage) == before


def test_a_finished_trial_keeps_its_epoch_and_no_old_reason(storage):
    leases = make_leases(storage, make_study(storage))
    leases.release(leases.claim(), reason="stopped")
    held = leases.claim()
    assert lease_row(storage, held).reason is None
    held.epoch = 12
    leases.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE)
    row = lease_row(storage, held)
    assert (row.epoch, row.reason, row.token) == (12, None, None)


def crash(leases, held):
    leases.release(held, reason="out of luck", is_forgiven=False)


def test_attempts_without_a_checkpoint_end_in_fail_with_the_reason(storage):
    leases = make_leases(storage, make_study(storage), max_attempts=3)
    for attempt in (1, 2, 3):
        held = leases.claim()
        assert held.attempt == attempt
        crash(leases, held)
    assert leases.claim() == "spent"
    (trial,) = stored(storage)
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"] == "3 attempts in a row advanced no checkpoint; the last ended: out of luck"


def test_forgiven_releases_never_count(storage):
    leases = make_leases(storage, make_study(storage), max_attempts=2)
    for _ in range(7):
        held = leases.claim()
        assert held.attempt == 1
        leases.release(held, reason="stopped")
    crash(leases, leases.claim())
    leases.release(leases.claim(), reason="stopped")
    assert leases.claim().attempt == 2


def test_a_checkpoint_that_advances_resets_the_attempts(storage):
    leases = make_leases(storage, make_study(storage), max_attempts=2)
    for epoch in (5, 10, 15):
        crash(leases, leases.claim())
        held = leases.claim()
        assert held.attempt == 2
        leases.checkpointed(held, epoch=epoch, curve={"epoch": [epoch]})
        crash(leases, held)
    crash(leases, leases.claim())
    held = leases.claim()
    leases.checkpointed(held, epoch=15, curve={})  # no further than before
    crash(leases, held)
    assert leases.claim() == "spent"
    assert stored(storage)[0].state == TrialState.FAIL


WORKER = """
import sys, time, warnings
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
optuna.logging.set_verbosity(optuna.logging.ERROR)
import frem_search.storage.database
from frem_search.storage.database import open_storage
from frem_search.storage.leases import leases as leases_module
from frem_search.storage.leases.leases import Leases
from frem_search.study.samplers import make_sampler
SPACE = {"B": IntDistribution(1, 512), "X": FloatDistribution(1.0, 1000.0, log=True)}
storage = open_storage(sys.argv[1]).__enter__()
sampler = make_sampler("random", space=SPACE, seed=0, n_startup_trials=4)
pruner = optuna.pruners.NopPruner()
study = optuna.load_study(study_name="study", storage=storage.optuna, sampler=sampler, pruner=pruner)
leases = Leases(storage, study, distributions=SPACE).__enter__()
"""


def start_worker(url, body):
    from_here = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER + body, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | from_here, text=True)


def test_a_killed_worker_is_noticed_at_once(storage, storage_url):
    leases = make_leases(storage, make_study(storage))
    worker = start_worker(storage_url, "print(leases.claim().number, flush=True); time.sleep(600)")
    assert worker.stdout.readline() == "0\n"
    assert leases.claim() == "busy"
    worker.send_signal(signal.SIGKILL)
    while worker.poll() is None:
        time.sleep(0.01)
    assert leases.claim().number == 0
    worker.communicate()


def test_a_zombie_counts_as_gone(storage, storage_url):
    leases = make_leases(storage, make_study(storage))
    worker = start_worker(storage_url, "print(leases.claim().number, flush=True); time.sleep(600)")
    worker.stdout.readline()
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while (claimed := leases.claim()) == "busy":  # nobody has waited for the process yet
        assert time.monotonic() < deadline
    assert claimed.number == 0
    worker.communicate()


def test_a_claimer_that_stands_still_does_not_hold_others_up(storage, storage_url, other_storage, monkeypatch):
    monkeypatch.setattr(
        "frem_search.storage.database.SESSION",
        "SET idle_in_transaction_session_timeout = '1s'; SET lock_timeout = '20s';",
    )
    make_study(storage)
    body = """
frem_search.storage.database.SESSION = "SET idle_in_transaction_session_timeout = '1s'"
storage.engine.dispose()
leases._claims._take = lambda *args, **kwargs: (print("in the middle", flush=True), time.sleep(600))
leases.claim()
"""
    worker = start_worker(storage_url, body)
    assert worker.stdout.readline() == "in the middle\n"
    worker.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        held = make_leases(other_storage, make_study(other_storage)).claim()
        assert time.monotonic() - started < 5
        assert held.number == 0
        assert len(stored(storage)) == 1
    finally:
        worker.kill()
        worker.communicate()


def test_the_server_ends_idle_transactions_of_ours(storage):
    with storage.engine.connect() as connection:
        shown = connection.execute(sa.text("SHOW idle_in_transaction_session_timeout")).scalar()
    assert shown == "30s"


def test_the_budget_is_exact_with_workers_that_crash(storage, storage_url):
    make_study(storage, n_trials=25)
    errors = []

    def work(seed):
        luck = np.random.default_rng(seed)
        try:
            with open_storage(storage_url) as mine:
                leases = make_leases(mine, make_study(mine, n_trials=25), lease_s=0.3, max_attempts=99)
                while (held := leases.claim()) != "spent":
                    if held == "busy":
                        time.sleep(0.05)
                    elif luck.random() < 0.3:
                        leases = make_leases(mine, make_study(mine, n_trials=25), lease_s=0.3, max_attempts=99)
                    else:
                        leases.tell(held, state=TrialState.COMPLETE, value=float(held.number), **DONE)
        except Exception as error:  # noqa: BLE001 shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    trials = stored(storage)
    assert [trial.number for trial in trials] == list(range(25))
    assert [trial.value for trial in trials] == list(map(float, range(25)))
    assert len({trial.params["X"] for trial in trials}) == 25


def test_the_budget_is_exact_with_processes_that_are_killed(storage, storage_url):
    make_study(storage, n_trials=12)
    body = """
while (held := leases.claim()) != "spent":
    if held != "busy":
        time.sleep(0.05)
        leases.tell(held, state=TrialState.COMPLETE, value=1.0, attrs={})
"""
    workers = [start_worker(storage_url, body) for _ in range(3)]
    deadline = time.monotonic() + 60
    while sum(trial.state.is_finished() for trial in storage_trials(storage)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers[0].kill()
    time.sleep(0.1)
    workers[1].kill()
    for worker in workers:
        worker.communicate(timeout=60)
    trials = stored(storage)
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def storage_trials(storage):
    return optuna.load_study(
        study_name="study", storage=storage.optuna, sampler=optuna.samplers.RandomSampler()
    ).get_trials(deepcopy=False)


# ---- The connection is cut at every point.


class Cuts:
    """Cuts a storage's connection at the n-th point at which it could be lost; `points` names those it came by."""

    def __init__(self, storage, observer):
        self.points, self.at, self.is_armed, self._observer = [], None, False, observer
        sa.event.listen(storage.engine, "before_cursor_execute", self._before)
        sa.event.listen(storage.engine, "after_cursor_execute", self._after)
        dialect = storage.engine.dialect
        self._do_commit = dialect.do_commit
        dialect.do_commit = self._commit

    def _before(self, connection, cursor, statement, *_):
        self._pass(cursor.connection, f"before {statement}")

    def _after(self, connection, cursor, statement, *_):
        self._pass(cursor.connection, f"after {statement}")

    def _commit(self, dbapi_connection):
        self._pass(dbapi_connection, "before COMMIT")
        self._do_commit(dbapi_connection)
        if self._pass(dbapi_connection, "after COMMIT, before its answer"):
            message = "server closed the connection unexpectedly"
            raise psycopg2.OperationalError(message)

    def _pass(self, dbapi_connection, point):
        if not self.is_armed:
            return False
        self.points.append(point)
        if len(self.points) != self.at:
            return False
        self._end(dbapi_connection.get_backend_pid())
        return True

    def _end(self, pid):
        with self._observer.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))
            while cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)) or cursor.fetchone():
                time.sleep(0.001)

    def during(self, action, *, at=None):
        self.points, self.at, self.is_armed = [], at, True
        try:
            return action()
        finally:
            self.is_armed = False


@pytest.fixture
def cuts(storage, postgres, monkeypatch):
    clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "monotonic")}, sleep=lambda _: None)
    monkeypatch.setattr("optuna.storages._rdb.storage.time", clock)
    monkeypatch.setattr("frem_search.storage.database.time", clock)
    monkeypatch.setattr(leases_module, "BLINK_S", 30.0)
    observer = postgres.connect("postgres")
    yield Cuts(storage, observer)
    observer.close()


def every_cut(cuts, prepare):
    """Yield what happened for a cut at every point: `prepare(name)` returns the action and a check of its result."""
    action, check = prepare("whole")
    check(cuts.during(action))
    n_points = len(cuts.points)
    assert n_points >= 4
    for at in range(1, n_points + 1):
        action, check = prepare(f"cut-{at}")
        result = cuts.during(action, at=at)
        assert len(cuts.points) >= at
        try:
            check(result)
        except BaseException as error:
            error.add_note(f"The connection was cut at point {at} of {n_points}: {cuts.points[at - 1]}")
            raise


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_claim_survives_a_cut_at_every_statement(storage, cuts, sampler):
    def prepare(name):
        study = make_study(storage, name=name, sampler=sampler)
        leases = make_leases(storage, study)

        def check(held):
            assert isinstance(held, Held)
            trials = study.get_trials(deepcopy=False)
            assert [trial.number for trial in trials] == [0]
            assert set(trials[0].params) == {"B", "X"}
            assert trials[0].params == held.trial.params
            assert lease_row(storage, held).token == held.token
            assert leases.claim() == "busy"
            leases.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE)
            assert leases.claim() == "spent"

        return leases.claim, check

    every_cut(cuts, prepare)


def test_an_enqueued_claim_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        study = make_study(storage, name=name)
        study.enqueue_trial({"B": 3})
        leases = make_leases(storage, study)

        def check(held):
            (trial,) = study.get_trials(deepcopy=False)
            assert held.trial.params == trial.params
            assert trial.params["B"] == 3
            assert set(trial.params) == {"B", "X"}
            assert lease_row(storage, held).token == held.token

        return leases.claim, check

    every_cut(cuts, prepare)


def test_an_adoption_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        study = make_study(storage, name=name)
        first = make_leases(storage, study)
        lost = first.claim()
        first.report(lost, 0.5, step=3)
        first.release(lost, reason="stopped")
        leases = make_leases(storage, study)

        def check(held):
            assert (held.is_adopted, held.reported, held.id) == (True, 3, lost.id)
            assert held.trial.params == lost.trial.params
            row = lease_row(storage, held)
            assert (row.token, row.attempts) == (held.token, 1)

        return leases.claim, check

    every_cut(cuts, prepare)


def test_a_tell_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        study = make_study(storage, name=name)
        leases = make_leases(storage, study)
        held = leases.claim()

        def check(_):
            (trial,) = study.get_trials(deepcopy=False)
            assert (trial.state, trial.value, trial.user_attrs) == (TrialState.COMPLETE, 0.5, {"result": 1})
            with storage.engine.connect() as connection:
                query = sa.text("SELECT curve FROM frem_curve WHERE trial_id = :id")
                assert connection.execute(query, {"id": held.id}).scalars().all() == [{"epoch": [1, 2]}]
            assert leases.claim() == "spent"

        return lambda: leases.tell(held, state=TrialState.COMPLETE, value=0.5, **DONE), check

    every_cut(cuts, prepare)


def test_a_report_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        study = make_study(storage, name=name)
        leases = make_leases(storage, study)
        held = leases.claim()

        def check(_):
            (trial,) = study.get_trials(deepcopy=False)
            assert trial.intermediate_values == {4: 0.25}
            assert held.reported == 4

        return lambda: leases.report(held, 0.25, step=4), check

    every_cut(cuts, prepare)


def test_a_checkpoint_note_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        leases = make_leases(storage, make_study(storage, name=name))
        held = leases.claim()

        def check(_):
            row = lease_row(storage, held)
            assert (row.checkpoint_epoch, row.attempts, row.token) == (6, 0, held.token)

        return lambda: leases.checkpointed(held, epoch=6, curve={"epoch": [6]}), check

    every_cut(cuts, prepare)


def test_a_release_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        leases = make_leases(storage, make_study(storage, name=name))
        held = leases.claim()

        def check(_):
            row = lease_row(storage, held)
            assert (row.token, row.reason, row.attempts) == (None, "stopped", 0)

        return lambda: leases.release(held, reason="stopped"), check

    every_cut(cuts, prepare)


def test_giving_up_survives_a_cut_at_every_statement(storage, cuts):
    def prepare(name):
        study = make_study(storage, name=name)
        leases = make_leases(storage, study, max_attempts=1)
        crash(leases, leases.claim())

        def check(claimed):
            assert claimed == "spent"
            (trial,) = study.get_trials(deepcopy=False)
            assert trial.state == TrialState.FAIL
            assert trial.user_attrs["reason"].endswith("the last ended: out of luck")

        return leases.claim, check

    every_cut(cuts, prepare)
