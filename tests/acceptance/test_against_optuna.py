"""Failures that plain Optuna 5.0.0 shows on this PostgreSQL, each beside what frem-search does in the same place.

In each test the first half is plain Optuna's, and fails once a later Optuna mends what it shows. More of ours is in:

| failure of plain Optuna | tests of frem-search |
|---|---|
| a killed worker leaves its trial RUNNING | test_leases (killed, zombie), test_worker_real (killed again and again) |
| SIGTERM does so too | test_embedded (a signal to a search), test_containers (a worker that is stopped) |
| a retry is a copy without reports: a pruner begins anew | test_pruners (a decision follows from the reports) |
| a late worker ends with AssertionError | test_worker, test_worker_slots (lost), test_leases (stands still) |
| the database is away | test_leases (a cut at every statement), test_outage, test_roles (outlives a restart) |
| the budget is overshot | test_leases (the budget is exact); benchmarks/overshoot.py, crowd.py and storm.py |
| tables made by eight processes at once | test_storage (eight processes), test_roles (eight owners) |
| isolation level and time zone | test_storage (isolation and clock), test_roles (settings of the role) |
| one seed for all workers and restarts | test_samplers (three restarts, side by side) |
| other settings than a study was begun with | test_study (another study file, other conditions) |
| lack of memory is forgotten | test_worker and test_worker_slots (out of memory) |
| passwords in URLs and arguments | test_storage (a password), test_roles (seen nowhere), test_cli |
| files torn, or announced before they are there | test_artifacts, test_dashboard (a completed trial) |
| a dashboard without a login | test_gate, test_dashboard (with write) |
| many reports make a study slow to load | test_worker (at most fifty reports) |

On PostgreSQL 5.0.0 does not show what is told of others: an enqueued trial taken twice, a dead worker's trial retried
twice, a report stored twice. Their tests say so.
"""

import contextlib
import io
import os
import signal
import threading
import time
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import optuna
import psycopg2
import pytest
import rivals
import sqlalchemy as sa
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from rivals import FORKS, load_ours, load_plain, of_optuna, spend, suggest
from searches import SEARCHED, SPACE, make_search, raising

from frem_search.dashboard.server import make_app
from frem_search.errors import ArtifactError, ContractError, DeviceMemoryError, LeaseLostError, UsageError
from frem_search.storage.database import open_storage
from frem_search.storage.leases import leases as leases_module
from frem_search.storage.schema import TABLES_LOCK
from frem_search.study.file import Sampler
from frem_search.study.record import read_record
from frem_search.study.space import Range

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
RETRY = optuna.storages.RetryHeartbeatStaleTrialCallback
# Nobody beats again while a test runs, unless it says so; time passes where `hours_pass` says so.
HEARTBEAT = {"heartbeat_interval": 600, "grace_period": 1200}
RUNNING, WAITING, FAIL, COMPLETE = TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL, TrialState.COMPLETE


class Process:
    """A process of `rivals`, and the end of the pipe to it."""

    def __init__(self, target, *args, **settings):
        self._pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=target, args=(theirs, *args), kwargs=settings, daemon=True)
        self.process.start()
        theirs.close()

    def told(self):
        assert self._pipe.poll(30), "the process says nothing"
        return self._pipe.recv()

    def go_on(self):
        self._pipe.send("go on")

    def end(self, number=signal.SIGKILL):
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture
def start():
    """Start a process of `rivals`; what is left of it is killed at the test's end."""
    rivals.start_forking()
    started = []

    def start(target, *args, **settings):
        started.append(Process(target, *args, **settings))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


@pytest.fixture
def plain(storage_url):
    """Plain Optuna on the database: `plain(heartbeat_interval=60)` is its study, by a storage of its own."""
    opened = []

    def load(**settings):
        opened.append(load_plain(storage_url, **settings))
        return opened[-1]

    yield load
    for study in opened:
        study._storage.remove_session()
        backend_of(study).engine.dispose()


def backend_of(study):
    return study._storage._backend


@pytest.fixture
def ours(storage_url):
    """Workers of frem-search on the database: `ours(n_trials=2)` gives leases."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(load_ours(storage_url, **settings))


@pytest.fixture
def database(postgres, storage_url):
    return Database(postgres, sa.make_url(storage_url).database)


class Database:
    """What happens to a database from outside."""

    def __init__(self, server, name):
        self._server, self.name = server, name

    def execute(self, *statements):
        return self._server.execute(*statements, database=self.name)

    def isolate(self, level):
        """Let transactions of our role be of this level."""
        of_role = f"ALTER ROLE postgres IN DATABASE {self.name}"
        self.execute(f"{of_role} SET default_transaction_isolation TO '{level}'")

    def hours_pass(self):
        """Let the last signs of life of all workers lie an hour back."""
        self.execute(
            "UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'",
            "UPDATE frem_lease SET expires_at = expires_at - interval '1 hour'",
        )

    def cut(self):
        """End every connection."""
        of_others = f"datname = '{self.name}' AND pid != pg_backend_pid()"
        self._server.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {of_others}")

    def close(self):
        """End every connection and let nobody connect."""
        self._server.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false")
        self.cut()

    def open(self):
        self._server.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS true")

    @contextlib.contextmanager
    def holding(self, *statements):
        """A transaction of somebody else that has done this and not ended yet."""
        connection = self._server.connect(self.name)
        connection.autocommit = False
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
            yield
            connection.commit()
        finally:
            connection.close()

    def wait_until_blocked(self, n):
        """Wait until n connections wait for a lock."""
        query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{self.name}' AND wait_event_type = 'Lock'"
        until(lambda: self._server.execute(query) == [(n,)])


def until(condition, *, timeout_s=30.0):
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def at_once(*actions):
    """Do several things in threads; return what each returned or raised."""
    results = [None] * len(actions)

    def act(i):
        try:
            results[i] = actions[i]()
        except BaseException as error:  # noqa: BLE001 handed to the test
            results[i] = error

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    return threads, results


def all_at_once(*actions):
    threads, results = at_once(*actions)
    for thread in threads:
        thread.join()
    return results


def states(study):
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def objective(trial):
    suggest(trial)
    return 0.5


def diverging(params, epoch):
    return 0.5 if epoch == 1 else float("nan")


@pytest.fixture
def search(storage, do_nothing):
    return make_search(storage, do_nothing)


# ---- Who is dead.


def test_a_killed_worker_without_heartbeats(start, plain, ours, storage_url):
    worker = start(rivals.optimize, storage_url)
    assert worker.told() == 0
    worker.end()
    study = plain()
    study.optimize(objective, n_trials=3)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [RUNNING, COMPLETE, COMPLETE, COMPLETE]

    worker = start(rivals.train, storage_url, n_trials=4)
    assert worker.told() == 0
    worker.end()
    assert spend(ours(n_trials=4)) == ([0, 1, 2, 3], "spent")


def test_the_death_of_the_last_worker(start, plain, ours, storage, storage_url, database):
    """With heartbeats it is noticed when somebody asks for a trial, and only then."""
    last, another = start(rivals.optimize, storage_url, **HEARTBEAT), start(rivals.optimize, storage_url, **HEARTBEAT)
    assert {last.told(), another.told()} == {0, 1}
    last.end()
    database.hours_pass()
    another.go_on()
    assert another.told() == "done"
    assert sorted(states(plain(**HEARTBEAT))) == [RUNNING, COMPLETE]

    last = start(rivals.train, storage_url, n_trials=2)
    assert last.told() == 0
    leases = ours(n_trials=2)
    assert spend(leases) == ([1], "busy")
    last.end()
    assert [trial.state for trial in read_record(storage, "ours").trials] == ["waiting", "complete"]
    assert spend(leases) == ([0], "spent")


def test_a_worker_killed_before_its_first_heartbeat(start, plain, ours, storage_url, database):
    worker = start(rivals.optimize, storage_url, dies_before_heartbeat=True, **HEARTBEAT)
    worker.process.join(30)
    database.hours_pass()
    study = plain(**HEARTBEAT)
    study.optimize(objective, n_trials=1)
    assert states(study) == [RUNNING, COMPLETE]

    worker = start(rivals.train, storage_url, dies_after_claim=True)
    worker.process.join(30)
    assert spend(ours()) == ([0], "spent")


def test_what_becomes_of_the_trial_of_a_killed_worker(start, plain, ours, storage_url, database):
    settings = HEARTBEAT | {"heartbeat_stale_trial_callback": RETRY()}
    worker = start(rivals.optimize, storage_url, **HEARTBEAT)
    worker.told()
    worker.end()
    database.hours_pass()
    study = plain(**settings)
    optuna.storages.fail_stale_trials(study)
    trials = study.get_trials()
    assert [(trial.state, trial.intermediate_values) for trial in trials] == [(FAIL, {1: 0.5}), (WAITING, {})]
    assert trials[0].params == trials[1].params

    worker = start(rivals.train, storage_url)
    worker.told()
    worker.end()
    leases = ours()
    held = leases.claim()
    assert (held.number, held.is_adopted, held.reported) == (0, True, 1)
    assert [trial.intermediate_values for trial in leases._study.trials] == [{1: 0.5}]


def killed_again(study, database, n):
    """The numbers under which plain Optuna trains a trial whose worker is killed n times."""
    numbers = []
    for _ in range(n):
        trial = study.ask()
        suggest(trial)
        study._storage.record_heartbeat(trial._trial_id)
        numbers.append(trial.number)
        database.hours_pass()
        optuna.storages.fail_stale_trials(study)
    return numbers


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
def test_a_trial_whose_workers_are_killed_again_and_again(plain, ours, database):
    study = plain(heartbeat_stale_trial_callback=RETRY(), **HEARTBEAT)
    assert killed_again(study, database, 6) == [0, 1, 2, 3, 4, 5]
    assert states(study) == [FAIL] * 6 + [WAITING]  # and so on for ever

    leases = ours()
    for _ in range(3):
        leases.release(leases.claim(), reason="killed", is_forgiven=False)
    assert leases.claim() == "spent"
    assert states(leases._study) == [FAIL]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
def test_a_trial_that_advances_between_the_deaths_of_its_workers(plain, ours, database):
    study = plain(heartbeat_stale_trial_callback=RETRY(max_retry=2), **HEARTBEAT)
    assert killed_again(study, database, 3) == [0, 1, 2]
    assert states(study) == [FAIL] * 3  # given up

    leases = ours(max_attempts=3)
    for epoch in range(1, 6):
        held = leases.claim()
        leases.checkpointed(held, epoch=epoch, curve={"epoch": list(range(1, epoch + 1))})
        leases.release(held, reason="killed", is_forgiven=False)
    assert spend(leases) == ([0], "spent")


def test_an_error_of_the_machine_in_the_middle_of_a_trial(plain, search, do_nothing):
    fails = raising(OSError(5, "I/O error"))
    study = plain(heartbeat_stale_trial_callback=RETRY(), **HEARTBEAT)
    with pytest.raises(OSError, match="I/O"):
        study.optimize(fails, n_trials=2)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [FAIL]

    with pytest.raises(OSError, match="I/O"):
        list(search(do_nothing(before_epoch=fails), n_trials=1).work())
    list(search(n_trials=1).work())
    assert states(search.study) == [COMPLETE]


def test_who_may_look_for_dead_workers(start, plain, ours, storage_url, database):
    """Optuna's own command and dashboard open a storage without heartbeats, and say nothing."""
    worker = start(rivals.optimize, storage_url, **HEARTBEAT)
    worker.told()
    worker.end()
    database.hours_pass()
    study = plain()
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [RUNNING]

    worker = start(rivals.train, storage_url)
    worker.told()
    worker.end()
    assert ours().claim().is_adopted


def test_two_workers_that_notice_a_death_at_once(start, plain, ours, storage_url, database):
    """Plain Optuna retries the trial once, as it should."""
    for target, settings in ((rivals.optimize, HEARTBEAT), (rivals.train, {})):
        worker = start(target, storage_url, **settings)
        worker.told()
        worker.end()
    database.hours_pass()
    studies = [plain(heartbeat_stale_trial_callback=RETRY(), **HEARTBEAT) for _ in range(2)]
    meet_before("FOR UPDATE", [backend_of(study).engine for study in studies])
    all_at_once(*[lambda study=study: optuna.storages.fail_stale_trials(study) for study in studies])
    assert states(studies[0]) == [FAIL, WAITING]

    workers = [ours(), ours()]
    meet_before("FOR UPDATE", [leases._storage.engine for leases in workers])
    assert "busy" in all_at_once(*[leases.claim for leases in workers])
    assert spend(ours()) == ([], "busy")


@pytest.mark.parametrize("how", [signal.SIGTERM, "exit"])
def test_sigterm(start, plain, storage_url, how):
    """Ours: embedded/test_embedded.py and acceptance/test_containers.py; the trial waits, with its checkpoint."""
    worker = start(rivals.optimize, storage_url, exits_on_term=how == "exit")
    worker.told()
    worker.end(signal.SIGTERM)
    assert states(plain()) == [RUNNING]


def test_a_worker_that_stood_still_for_too_long(plain, ours, search, do_nothing, storage_url, database):
    """Stopped, swapped out or cut off: others took its trial, and then it goes on."""

    def stand_still(trial):
        suggest(trial)
        database.hours_pass()
        optuna.storages.fail_stale_trials(plain(**settings))
        return 0.5

    settings = HEARTBEAT | {"heartbeat_stale_trial_callback": RETRY()}
    study = plain(**settings)
    with pytest.raises(AssertionError, match="Should not reach"):
        study.optimize(stand_still, n_trials=5)
    assert states(study) == [FAIL, WAITING]

    mine, others = ours(n_trials=2), ours(n_trials=2)
    held = mine.claim()
    database.hours_pass()
    assert spend(others) == ([0, 1], "spent")
    with pytest.raises(LeaseLostError, match="trial 0: somebody else has finished it"):
        mine.tell(held, state=COMPLETE, value=9.0, attrs={"result": "late"})
    done = [(trial.value, "result" in trial.user_attrs) for trial in others._study.trials]
    assert done == [(0.0, False), (1.0, False)]
    assert mine.claim() == "spent"


@pytest.mark.parametrize("outage", ["cut", "close"])
def test_a_healthy_worker_whose_database_was_away_once(start, plain, ours, storage_url, database, outage):
    """Connections were cut, in a pool that does not look at them; or nobody could connect, in one that does."""
    interrupt, ping = getattr(database, outage), {"engine_kwargs": {"pool_pre_ping": outage == "close"}}
    worker = start(rivals.optimize, storage_url, heartbeat_interval=0.1, grace_period=1200, **ping)
    worker.told()
    interrupt()
    assert worker.told() == "its thread ended: StorageInternalError"
    database.open()
    database.hours_pass()
    study = plain(heartbeat_stale_trial_callback=RETRY(), **HEARTBEAT)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [FAIL, WAITING]
    worker.go_on()
    assert worker.told() == "AssertionError: Should not reach."

    worker = start(rivals.train, storage_url, lease_s=3.0)
    assert worker.told() == 0
    interrupt()
    time.sleep(0.6)  # it is renewed every half second
    database.open()
    (before,) = database.execute("SELECT expires_at FROM frem_lease")
    until(lambda: database.execute("SELECT expires_at FROM frem_lease") != [before])
    assert ours().claim() == "busy"
    worker.go_on()
    assert worker.told() == "done"
    assert ours().claim() == "spent"


def test_workers_west_of_who_looks(start, plain, ours, storage_url):
    west = {"PGTZ": "America/New_York"}
    worker = start(rivals.optimize, storage_url, environment=west, **HEARTBEAT)
    worker.told()
    study = plain(**HEARTBEAT)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [FAIL]  # a second after its heartbeat

    worker = start(rivals.train, storage_url, environment=west)
    worker.told()
    assert ours().claim() == "busy"


def test_workers_east_of_who_looks(start, plain, ours, storage_url, database):
    east = {"PGTZ": "Asia/Tokyo"}
    worker = start(rivals.optimize, storage_url, environment=east, **HEARTBEAT)
    worker.told()
    worker.end()
    database.hours_pass()
    study = plain(**HEARTBEAT)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == [RUNNING]  # and so for eight hours more

    worker = start(rivals.train, storage_url, environment=east)
    worker.told()
    database.execute("UPDATE frem_lease SET boot_id = 'another machine'")
    assert ours().claim() == "busy"
    database.hours_pass()
    assert ours().claim().number == 0


# ---- How many trials there are.


def overshooting(study, together):
    """Let a worker of plain Optuna train trials that all end at the same time."""

    def objective(trial):
        suggest(trial)
        together.wait(30)
        return 0.5

    study.optimize(objective, callbacks=[MaxTrialsCallback(1, states=(COMPLETE,))])


def test_workers_that_end_at_the_same_time(plain, ours):
    together = threading.Barrier(4)
    all_at_once(*[lambda study=study: overshooting(study, together) for study in [plain() for _ in range(4)]])
    assert len(plain().trials) == 4  # of a budget of 1

    claimed = all_at_once(*[leases.claim for leases in [ours() for _ in range(4)]])
    assert sorted(map(str, claimed))[1:] == ["busy"] * 3
    assert len(ours()._study.trials) == 1


def test_workers_that_begin_when_the_budget_is_spent(plain, ours):
    for n in (1, 2, 3):
        plain().optimize(objective, callbacks=[MaxTrialsCallback(1)])
        assert len(plain().trials) == n

    assert spend(ours()) == ([0], "spent")
    assert spend(ours()) == spend(ours()) == ([], "spent")
    assert len(ours()._study.trials) == 1


def test_a_number_of_trials_for_several_workers(plain, ours):
    for _ in range(2):
        plain().optimize(objective, n_trials=2)
    assert len(plain().trials) == 4

    assert [spend(ours(n_trials=2)) for _ in range(2)] == [([0, 1], "spent"), ([], "spent")]


def test_a_budget_of_which_every_trial_is_pruned(plain, search, do_nothing):
    def prune(trial):
        suggest(trial)
        if trial.number == 9:
            study.stop()  # only this ends it
        raise optuna.TrialPruned

    study = plain()
    study.optimize(prune, callbacks=[MaxTrialsCallback(3, states=(COMPLETE,))])
    assert len(study.trials) == 10

    list(search(do_nothing(score=diverging), n_trials=3).work())
    assert states(search.study) == [TrialState.PRUNED] * 3


def test_an_enqueued_trial_and_two_workers_on_sqlite(tmp_path, plain, ours):
    """SQLite has no row locks: both take it. On PostgreSQL plain Optuna takes it once, and so does frem-search."""
    url = f"sqlite:///{tmp_path}/study.db"
    studies = [optuna.create_study(storage=url, study_name="s", load_if_exists=True) for _ in range(2)]
    studies[0].enqueue_trial({"x": 1.0})
    meet_before("UPDATE trials", [backend_of(study).engine for study in studies])
    taken = all_at_once(*[study.ask for study in studies])
    assert [trial.number for trial in taken] == [0, 0]
    for study in studies:
        backend_of(study).engine.dispose()
    with pytest.raises(UsageError, match="Searches need PostgreSQL"), open_storage(url):
        pass

    plain().enqueue_trial({"B": 7, "X": 2.0})
    taken = all_at_once(*[study.ask for study in (plain(), plain())])
    assert sorted(trial.number for trial in taken) == [0, 1]
    workers = [ours(n_trials=2) for _ in range(2)]
    workers[0]._study.enqueue_trial({"B": 7, "X": 2.0})
    claimed = all_at_once(*[leases.claim for leases in workers])
    assert sorted(held.number for held in claimed) == [0, 1]
    assert [held.trial.params["B"] == 7 for held in claimed].count(True) == 1


# ---- Connections.


def test_a_connection_dropped_between_two_trials(plain, ours, database):
    study, leases = plain(), ours(n_trials=2)
    study.optimize(objective, n_trials=1)
    held = leases.claim()
    database.cut()
    with pytest.raises(StorageInternalError):
        study.ask()
    assert states(plain()) == [COMPLETE]  # nothing was lost, but the worker has ended

    leases.tell(held, state=COMPLETE, value=0.5, attrs={})
    database.cut()
    assert leases.claim().number == 1


@pytest.fixture
def search_on(storage, do_nothing, monkeypatch):
    """A worker of frem-search that asks for the database with every epoch."""
    monkeypatch.setattr(leases_module, "AWAY_PAUSE_S", 0.0)
    monkeypatch.setattr(leases_module, "BLINK_S", 0.0)
    return make_search(storage, do_nothing)


@pytest.mark.parametrize("outage", ["cut", "closed"])
def test_a_database_that_is_away_in_the_middle_of_a_trial(plain, search_on, do_nothing, database, outage):
    def train(trial):
        suggest(trial)
        for step in range(1, 6):
            if step == 3:
                database.cut() if outage == "cut" else database.close()
            if step == 5:
                database.open()
            trial.report(0.5, step)
        return 0.5

    study = plain(engine_kwargs={"pool_pre_ping": outage == "closed"})
    with pytest.raises(StorageInternalError if outage == "cut" else UnboundLocalError):  # in Optuna's own handling
        study.optimize(train, n_trials=1)
    database.open()
    (trial,) = plain().trials
    assert list(trial.intermediate_values) == [1, 2]
    assert trial.state == {"cut": FAIL, "closed": RUNNING}[outage]  # for ever, both

    def hook(number, epoch):
        if epoch == 3:
            database.cut() if outage == "cut" else database.close()
        if epoch == 5:
            database.open()

    list(search_on(do_nothing(5, before_epoch=hook), n_trials=1).work())
    (trial,) = search_on.study.trials
    assert (trial.state, list(trial.intermediate_values)) == (COMPLETE, [1, 2, 3, 4, 5])


def lose_the_answer(engine, which):
    """Let the server commit the next transaction with such a statement, and its answer never arrive."""
    dialect, seen = engine.dialect, []
    usual = dialect.do_commit

    def commit(connection):
        usual(connection)
        if seen:
            dialect.do_commit = usual
            sa.event.remove(engine, "before_cursor_execute", look)
            connection.close()
            message = "server closed the connection unexpectedly"
            raise psycopg2.OperationalError(message)

    def look(connection, cursor, statement, *_):
        seen.extend([statement] * statement.startswith(which))

    sa.event.listen(engine, "before_cursor_execute", look)
    dialect.do_commit = commit


def test_a_tell_that_arrived_and_whose_answer_did_not(plain, ours):
    study = plain()
    trial = study.ask()
    lose_the_answer(backend_of(study).engine, "UPDATE trials SET state")
    with pytest.raises(StorageInternalError):
        study.tell(trial, 0.5)
    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        study.tell(trial, 0.5)

    leases = ours()
    held = leases.claim()
    lose_the_answer(leases._storage.engine, "UPDATE trials SET state")
    leases.tell(held, state=COMPLETE, value=0.5, attrs={"result": 1})
    assert [(trial.value, trial.user_attrs) for trial in leases._study.trials] == [(0.5, {"result": 1})]
    assert leases.claim() == "spent"


def test_a_report_that_arrived_and_whose_answer_did_not(plain, ours):
    """Plain Optuna stores it once, but only who catches the error can repeat it."""
    study, leases = plain(), ours()
    trial, held = study.ask(), leases.claim()
    lose_the_answer(backend_of(study).engine, "INSERT INTO trial_intermediate_values")
    with pytest.raises(StorageInternalError):
        trial.report(0.5, 1)
    trial.report(0.5, 1)
    assert plain().trials[0].intermediate_values == {1: 0.5}

    lose_the_answer(leases._storage.engine, "INSERT INTO trial_intermediate_values")
    leases.report(held, 0.5, step=1)
    assert leases._study.trials[0].intermediate_values == {1: 0.5}


def test_a_new_trial_whose_answer_did_not_arrive(plain, ours, monkeypatch):
    monkeypatch.setattr("optuna.storages._rdb.storage.time", SimpleNamespace(sleep=lambda _: None))
    study = plain()
    lose_the_answer(backend_of(study).engine, "INSERT INTO trials")
    trial = study.ask()
    study.tell(trial, 0.5)
    assert (trial.number, states(plain())) == (1, [RUNNING, COMPLETE])  # 0 for ever

    leases = ours()
    lose_the_answer(leases._storage.engine, "INSERT INTO trials")
    assert leases.claim().number == 0
    assert states(leases._study) == [RUNNING]


# ---- Settings of the server.


def open_eight(start, kind, url, engine, *before):
    """Let eight processes open a database while another one is making its tables; return what becomes of each."""
    workers = [start(rivals.open_tables, kind, url) for _ in range(8)]
    assert [worker.told() for worker in workers] == ["ready"] * 8
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    looker = engine.execution_options(isolation_level="AUTOCOMMIT")
    with looker.connect() as looking, engine.begin() as connection:
        for statement in before:
            connection.execute(sa.text(statement))
        optuna.storages._rdb.models.BaseModel.metadata.create_all(connection)
        for worker in workers:
            worker.go_on()
        until(lambda: looking.execute(sa.text(waiting)).scalar() == 8)
    return [worker.told() for worker in workers]


def test_eight_processes_at_once_on_an_empty_database(start, empty_database_url):
    engine = sa.create_engine(of_optuna(empty_database_url))
    assert open_eight(start, "plain", empty_database_url, engine) == ["IntegrityError"] * 8
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))

    held = f"SELECT pg_advisory_xact_lock({TABLES_LOCK})"
    assert open_eight(start, "ours", empty_database_url, engine, held) == ["open"] * 8
    engine.dispose()


def test_a_role_whose_transactions_are_repeatable_read(plain, ours, database):
    database.isolate("repeatable read")
    studies = [plain(), plain()]
    with database.holding("SELECT FROM studies FOR UPDATE"):
        threads, trials = at_once(*[study.ask for study in studies])
        database.wait_until_blocked(2)
    for thread in threads:
        thread.join()
    assert [trial.number for trial in trials] == [0, 0]
    for study, trial in zip(studies, trials, strict=True):
        study.tell(trial, 0.5)
    assert len(plain().trials) == 1  # of two that were trained

    workers = [ours(n_trials=2), ours(n_trials=2)]
    with database.holding("SELECT FROM studies FOR UPDATE"):
        threads, claimed = at_once(*[leases.claim for leases in workers])
        database.wait_until_blocked(2)
    for thread in threads:
        thread.join()
    assert sorted(held.number for held in claimed) == [0, 1]
    for leases, held in zip(workers, claimed, strict=True):
        leases.tell(held, state=COMPLETE, value=0.5, attrs={})
    assert len(ours()._study.trials) == 2


def test_a_role_whose_transactions_are_serializable(plain, ours, database):
    database.isolate("serializable")
    studies = [plain(), plain()]
    trials = [study.ask() for study in studies]
    meet_before("INSERT INTO trial_values", [backend_of(study).engine for study in studies])
    told = all_at_once(*[lambda s=s, t=t: s.tell(t, 0.5) for s, t in zip(studies, trials, strict=True)])
    assert sorted(states(plain())) == [RUNNING, COMPLETE]
    (error,) = [each for each in told if isinstance(each, StorageInternalError)]
    assert "could not serialize access" in str(error.__cause__)

    workers = [ours(n_trials=2), ours(n_trials=2)]
    claimed = [leases.claim() for leases in workers]
    meet_before("INSERT INTO trial_values", [leases._storage.engine for leases in workers])
    tells = [
        lambda leases=leases, held=held: leases.tell(held, state=COMPLETE, value=0.5, attrs={})
        for leases, held in zip(workers, claimed, strict=True)
    ]
    assert all_at_once(*tells) == [None, None]
    assert states(ours()._study) == [COMPLETE, COMPLETE]


def meet_before(which, engines):
    """Let the transactions of several engines wait for each other before such a statement, the first time."""
    together = threading.Barrier(len(engines))
    for engine in engines:
        met = []

        def meet(connection, cursor, statement, *_, met=met):
            if which in statement and not met:
                met.append(statement)
                together.wait(30)

        sa.event.listen(engine, "before_cursor_execute", meet)


# ---- What is suggested.


def test_workers_with_one_seed(plain, ours):
    trials = [plain(sampler=TPESampler(seed=42)).ask() for _ in range(4)]
    assert len({suggest(trial) for trial in trials}) == 1

    assert len({ours(n_trials=4).claim().trial.params["X"] for _ in range(4)}) == 4


def test_a_search_that_goes_on_with_its_seed(plain, storage_url):
    for _ in range(2):
        plain(sampler=TPESampler(seed=42)).optimize(objective, n_trials=3)
    params = [trial.params for trial in plain().trials]
    assert params[3:] == params[:3]

    for n in (3, 6):
        with load_ours(storage_url, n_trials=n) as leases:
            spend(leases)
    assert len({trial.params["X"] for trial in leases._study.trials}) == 6


def test_what_a_sampler_learns_from_trials_that_do_not_fit_the_device(plain, search, do_nothing):
    def no_memory(trial):
        suggest(trial)
        raise RuntimeError

    plain(sampler=RandomSampler(seed=0)).optimize(no_memory, n_trials=5, catch=(RuntimeError,))
    untaught = RandomSampler(seed=7).sample_independent(None, None, "X", SEARCHED["X"])
    taught = plain(sampler=TPESampler(seed=7, n_startup_trials=1, multivariate=False)).ask()
    assert taught.suggest_float("X", 1.0, 1000.0, log=True) == untaught  # as if there had been none

    big = do_nothing(before_epoch=raising(DeviceMemoryError("no memory")))
    big.searches_shapes = True
    list(search(big, n_trials=5).work())
    sixth, usual = [], search.study.sampler
    for state in (TrialState.PRUNED, FAIL):
        study = optuna.create_study(sampler=usual, direction="maximize")
        for trial in search.study.trials:
            trial.state = state
            study.add_trial(trial)
        sixth.append(study.ask(fixed_distributions=SEARCHED).params)
    assert states(search.study) == [TrialState.PRUNED] * 5
    assert sixth[0] != sixth[1]


# ---- What a study is begun with.


def test_another_direction(plain, storage, storage_url):
    for name in ("plain", "ours"):
        optuna.create_study(storage=storage.optuna, study_name=name, direction="minimize")
    assert plain().direction.name == "MINIMIZE"  # asked to maximize

    with pytest.raises(ContractError, match="ours: the storage holds a study"), load_ours(storage_url):
        pass


def test_other_settings_than_a_study_was_begun_with(plain, storage_url):
    plain(sampler=RandomSampler(seed=0)).optimize(objective, n_trials=2)
    study = plain(sampler=TPESampler(seed=1))
    study.optimize(lambda t: t.suggest_int("B", 1, 512) + t.suggest_float("X", 1.0, 500.0, log=True), n_trials=1)
    assert set(IntersectionSearchSpace().calculate(study)) == {"B"}  # X is drawn by itself from now on

    with load_ours(storage_url):
        pass
    asha = {"pruner": "asha", "pruner_settings": {"min_epochs": 1, "factor": 3}}
    for changed in ({"space": SPACE | {"X": Range(1.0, 500.0)}}, {"sampler": Sampler("random")}, asha):
        says = rf"begun with other settings.*\n  {next(iter(changed))}: stored"
        with pytest.raises(ContractError, match=says), load_ours(storage_url, settings=changed):
            pass


# ---- Scores, files and secrets.


def test_scores_that_are_no_numbers(plain, search, do_nothing):
    study = plain()
    study.optimize(lambda trial: [float("nan"), float("inf"), 0.5][trial.number], n_trials=3)
    assert states(study) == [FAIL, COMPLETE, COMPLETE]
    assert study.best_value == float("inf")
    assert study.trials[0].user_attrs == {}

    list(search(do_nothing(score=diverging), n_trials=1).work())
    (trial,) = search.study.trials
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.5)
    assert trial.user_attrs["reason"] == "the training loss was no number in epoch 2"


def test_a_file_that_cannot_be_written(plain, search, do_nothing, tmp_path):
    study = plain()
    trial, store = study.ask(), FileSystemArtifactStore(tmp_path / "full")
    (tmp_path / "weights").write_bytes(b"w")
    with pytest.raises(FileNotFoundError):
        upload_artifact(artifact_store=store, file_path=str(tmp_path / "weights"), study_or_trial=trial)
    (announced,) = get_all_artifact_meta(trial, storage=study._storage)
    assert announced.filename == "weights"  # and nothing is there

    full = do_nothing()
    full.finish = raising(ArtifactError("no space"))
    with pytest.raises(ArtifactError):
        list(search(full, n_trials=1).work())
    assert states(search.study) == [RUNNING]
    assert [key for key in search.study.trials[0].system_attrs if key.startswith("artifacts:")] == []


def test_a_file_that_follows_the_end_of_its_trial(plain, search, tmp_path):
    """Ours are announced in the transaction that ends the trial: tests/dashboard/test_server.py."""
    study = plain()
    trial = study.ask()
    study.tell(trial, 0.5)
    (tmp_path / "weights").write_bytes(b"w")
    store = FileSystemArtifactStore(tmp_path)
    with pytest.raises(UpdateFinishedTrialError):
        upload_artifact(artifact_store=store, file_path=str(tmp_path / "weights"), study_or_trial=trial)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("postgresql://postgres@/{}?host={}", ImportError),  # another driver than the one that is installed
        ("postgres://postgres@/{}?host={}", sa.exc.NoSuchModuleError),
        ("postgresql+psycopg2://postgres:a{{b}}@/{}?host={}", KeyError),  # a password with braces
    ],
)
def test_spellings_of_a_url(storage_url, url, error):
    at = sa.make_url(storage_url)
    text = url.format(at.database, at.query["host"])
    with pytest.raises(error):
        optuna.storages.RDBStorage(text)

    with open_storage(text) as storage:
        assert storage.engine.url.database == at.database


def test_a_password_after_the_question_mark(storage_url):
    url = of_optuna(storage_url) + "&password=secret"
    storage = optuna.storages.RDBStorage(url)
    assert "secret" in repr(storage.engine)
    assert "secret" in storage.url
    storage.engine.dispose()

    with open_storage(url) as storage:
        assert "secret" not in repr(storage.engine) + storage.label + repr(vars(storage.optuna))


def test_who_may_delete_a_study_in_the_dashboard(plain, ours, storage, tmp_path):
    from optuna_dashboard import wsgi

    study, leases = plain(), ours()
    assert request("DELETE", f"/api/studies/{study._study_id}", wsgi(study._storage)) == 204
    gate = make_app(storage, artifacts=str(tmp_path), token="t" * 32, is_writable=False, hosts=frozenset())
    assert request("DELETE", f"/api/studies/{leases._study_id}", gate) == 401
    assert optuna.get_all_study_names(storage.optuna) == ["ours"]


def request(method, path, app):
    answer = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0"}
    setup_testing_defaults(environ)
    list(app(environ, lambda status, headers, error=None: answer.append(int(status[:3]))))
    return answer[0]
