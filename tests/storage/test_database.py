"""The storage: URLs and passwords, sessions, transactions that Optuna shares, and what of Optuna this rests on."""

import logging
import os
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace

import optuna
import psycopg2
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import exc

from frem_search.errors import StorageError, UsageError
from frem_search.storage.database import Storage, is_lost_connection, open_storage
from frem_search.storage.url import normalise_url
from frem_search.study.samplers import make_sampler

SPACE = {"B": IntDistribution(1, 9), "X": FloatDistribution(1.0, 10.0)}
SECRET = "s{e}c@r%t/:?#"
ENCODED = "s%7Be%7Dc%40r%25t%2F%3A%3F%23"


def make_study(storage, name="study"):
    return optuna.create_study(
        storage=storage.optuna,
        study_name=name,
        direction="maximize",
        sampler=make_sampler("random", space=SPACE, seed=0, n_startup_trials=4),
        pruner=optuna.pruners.NopPruner(),
    )


def count(storage, table):
    with storage.engine.connect() as connection:
        return connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar()


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_spelling_of_postgresql_gets_our_driver(scheme):
    url = normalise_url(f"{scheme}://me:{ENCODED}@db.example:6543/frem?sslmode=require")
    assert url.drivername == "postgresql+psycopg2"
    assert (url.username, url.password, url.host, url.port, url.database) == ("me", SECRET, "db.example", 6543, "frem")
    assert url.query == {"sslmode": "require"}


@pytest.mark.parametrize("text", ["sqlite:///file.db", "mysql://db/frem"])
def test_other_databases_are_refused(text):
    with pytest.raises(UsageError, match=r"Searches need PostgreSQL; leave --storage out"):
        normalise_url(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "frem.db", f"postgresql://me:{SECRET}@db/frem", "postgresql://me:secret@db:port/x",
        "postgresql://secret:123456789", "postgresql://me@db/frem#secret",
        "postgresql://me:secret%00@db/frem",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused_without_being_repeated(text):
    with pytest.raises(UsageError) as caught:
        normalise_url(text)
    assert "Percent-encode special characters" in str(caught.value)
    assert "c@r" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_statement_of_ours_waits_for_ever(storage):
    with storage.engine.connect() as connection:
        for name in ("statement_timeout", "lock_timeout"):
            assert connection.execute(sa.text(f"SHOW {name}")).scalar() == "1min"
        assert connection.execute(sa.text("SHOW idle_in_transaction_session_timeout")).scalar() in ("30s", "2min")


@pytest.mark.parametrize("name", ["sslpassword", "Password", "passwd", "dsn", "dbname"])
def test_a_setting_that_may_hold_a_secret_is_refused_without_being_repeated(name):
    with pytest.raises(UsageError, match=rf"but got {name}\. A password stands before the host") as caught:
        normalise_url(f"postgresql://me@db/frem?sslmode=require&{name}=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"postgresql://me:{ENCODED}@127.0.0.1:1/frem", f"postgresql://me@127.0.0.1:1/frem?password={ENCODED}"]
)
def test_an_unreachable_server_is_named_without_the_password(url, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StorageError, match=r"storage postgresql://me.*127.0.0.1:1/frem.*Check that it runs") as caught:
        Storage(normalise_url(url))
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in told
    assert ENCODED not in told


@pytest.mark.parametrize("encoded", [ENCODED, "100%25"])
def test_a_password_of_special_characters_reaches_the_server_and_nobody_else(storage_url, encoded, monkeypatch):
    connect, seen = psycopg2.connect, []
    with monkeypatch.context() as patch, open_storage(storage_url.replace("@", f":{encoded}@")) as storage:
        patch.setattr(psycopg2, "connect", lambda **settings: seen.append(settings["password"]) or connect(**settings))
        storage.engine.dispose()
        make_study(storage).ask(fixed_distributions=SPACE)
        secret = sa.make_url(f"postgresql://a:{encoded}@b/c").password
        assert set(seen) == {secret}
        shown = f"{storage!r} {storage.label} {storage.engine!r} {storage.engine.url!r} {storage.optuna!r}"
        assert secret not in shown
        assert encoded not in shown


def test_a_role_that_may_not_create_tables_is_told_so(empty_database_url, postgres):
    name = empty_database_url.split("/")[3].split("?")[0]
    postgres.execute("DROP ROLE IF EXISTS frem_reader", "CREATE ROLE frem_reader LOGIN")
    with pytest.raises(StorageError, match="permission denied for schema public"):
        Storage(normalise_url(empty_database_url.replace("postgres@", "frem_reader@")))
    # Optuna's tables are there, ours are not.
    RDBStorage(normalise_url(empty_database_url).render_as_string(hide_password=False)).engine.dispose()
    postgres.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO frem_reader", database=name)
    with pytest.raises(StorageError, match="permission denied for schema public"):
        Storage(normalise_url(empty_database_url.replace("postgres@", "frem_reader@")))
    postgres.execute("DROP OWNED BY frem_reader", database=name)
    postgres.execute("DROP ROLE frem_reader")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_isolation_and_clock_do_not_depend_on_the_role_or_on_pgtz(storage_url, postgres, monkeypatch, level, zone):
    name = storage_url.split("/")[3].split("?")[0]
    postgres.execute(
        f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'",
        f"ALTER DATABASE {name} SET timezone = '{zone}'",
    )
    monkeypatch.setenv("PGTZ", zone)
    with open_storage(storage_url) as storage:
        with storage.engine.connect() as connection:
            assert connection.execute(sa.text("SHOW transaction_isolation")).scalar() == "read committed"
            assert connection.execute(sa.text("SHOW timezone")).scalar() == "UTC"
        with storage.transaction() as connection:
            assert connection.execute(sa.text("SHOW transaction_isolation")).scalar() == "read committed"
        with storage._backend.scoped_session() as session:
            assert session.execute(sa.text("SHOW transaction_isolation")).scalar() == "read committed"
            assert session.execute(sa.text("SHOW timezone")).scalar() == "UTC"


OPEN = """
import sys
from frem_search.storage.database import open_storage
print("ready", flush=True)
sys.stdin.readline()
with open_storage(sys.argv[1]) as storage:
    from optuna import get_all_study_names
    assert get_all_study_names(storage.optuna) == []
"""


def test_eight_processes_at_once_open_an_empty_database(empty_database_url):
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, empty_database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(8)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 8
    for process in started:  # communicate() would wait for each before the next one begins
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 8, ended


def test_tables_half_made_by_a_killed_process_are_completed(empty_database_url):
    RDBStorage(normalise_url(empty_database_url).render_as_string(hide_password=False)).engine.dispose()
    with open_storage(empty_database_url) as storage:
        assert count(storage, "frem_lease") == count(storage, "frem_curve") == 0
        make_study(storage)
    with open_storage(empty_database_url) as storage:
        assert count(storage, "studies") == 1


def test_a_rollback_leaves_nothing_of_optuna_or_ours(storage):
    study = make_study(storage)
    kept = study.ask(fixed_distributions=SPACE)

    def fail():
        with storage.transaction() as connection:
            trial = study.ask(fixed_distributions=SPACE)
            trial.report(0.5, 1)
            study.set_user_attr("key", "value")
            study.tell(kept, 1.0)
            connection.execute(sa.text("INSERT INTO frem_curve VALUES (:id, '{}')"), {"id": trial._trial_id})
            assert count_in(connection, "trials") == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert count(storage, "trials") == 1
    assert count(storage, "trial_params") == 2
    for table in ("trial_intermediate_values", "study_user_attributes", "frem_curve", "trial_values"):
        assert count(storage, table) == 0


def count_in(connection, table):
    return connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar()


def test_the_cache_forgets_what_was_rolled_back(storage):
    study = make_study(storage)
    kept = study.ask(fixed_distributions=SPACE)
    try:
        with storage.transaction():
            study.ask(fixed_distributions=SPACE)
            study.tell(kept, 1.0)
            assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE, TrialState.RUNNING]
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [trial.state for trial in study.get_trials()] == [TrialState.RUNNING]
    again = study.ask(fixed_distributions=SPACE)
    assert again.number == 1
    study.tell(kept, 2.0)
    study.tell(again, 3.0)
    assert [trial.value for trial in study.get_trials()] == [2.0, 3.0]


def test_others_see_a_transaction_whole_or_not_at_all(storage, storage_url):
    study = make_study(storage)
    with open_storage(storage_url) as other, storage.transaction() as connection:
        trial = study.ask(fixed_distributions=SPACE)
        connection.execute(sa.text("INSERT INTO frem_curve VALUES (:id, '{}')"), {"id": trial._trial_id})
        assert count(other, "trials") == count(other, "trial_params") == count(other, "frem_curve") == 0
    assert (count(storage, "trials"), count(storage, "trial_params"), count(storage, "frem_curve")) == (1, 2, 1)


def test_optunas_commits_inside_a_transaction_are_savepoints(storage):
    study, statements, commits = make_study(storage), [], []
    sa.event.listen(storage.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    sa.event.listen(storage.engine, "commit", lambda _: commits.append(len(statements)))
    with storage.transaction():
        study.ask(fixed_distributions=SPACE)
        assert commits == []
    assert len(commits) == 1
    assert sum(statement.startswith("SAVEPOINT") for statement in statements) >= 4
    assert not any(statement.startswith("ROLLBACK") for statement in statements)


def test_after_a_transaction_optuna_commits_by_itself_again(storage, storage_url):
    with storage.transaction():
        study = make_study(storage)
    study.set_user_attr("key", "value")
    with open_storage(storage_url) as other:
        assert optuna.load_study(study_name="study", storage=other.optuna).user_attrs == {"key": "value"}


def test_a_transaction_uses_one_connection(storage):
    study = make_study(storage)
    with storage.transaction():
        study.ask(fixed_distributions=SPACE)
        assert storage.engine.pool.checkedout() == 1
    assert storage.engine.pool.checkedout() == 0


def test_retrying_goes_on_until_the_database_is_back(storage, monkeypatch):
    pauses, answers = (
        [],
        iter([exc.OperationalError("", {}, Exception()), exc.InterfaceError("", {}, Exception()), None]),
    )
    monkeypatch.setattr(
        "frem_search.storage.database.time", SimpleNamespace(monotonic=lambda: 0.0, sleep=pauses.append)
    )

    def act():
        if (answer := next(answers)) is not None:
            raise answer
        return "done"

    assert storage.retrying(act) == "done"
    assert len(pauses) == 2
    assert pauses[0] < pauses[1]


def test_retrying_gives_up_with_a_message(storage):
    def act():
        raise optuna.exceptions.StorageInternalError("x") from exc.OperationalError("", {}, Exception("server closed"))

    started = time.monotonic()
    with pytest.raises(StorageError, match=r"the database cannot be reached or refuses: server closed\. Check"):
        storage.retrying(act, patience_s=0.2)
    assert time.monotonic() - started < 2


def test_retrying_does_not_repeat_other_errors(storage):
    calls = []

    def act():
        calls.append(1)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 the very one that was raised
        storage.retrying(act)
    assert calls == [1]


def test_every_connection_of_the_pool_may_be_lost_between_two_actions(storage, postgres):
    study = make_study(storage)
    for _ in range(2):
        postgres.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            f"WHERE datname = '{storage.engine.url.database}'"
        )
        study.ask(fixed_distributions=SPACE)  # without a retry: the pool asks before it hands out
    assert count(storage, "trials") == 2


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (exc.OperationalError("", {}, Exception()), True),
        (psycopg2.OperationalError(), True),
        (exc.PendingRollbackError(), True),
        (exc.ProgrammingError("", {}, Exception()), False),
        (exc.ProgrammingError("", {}, Exception(), connection_invalidated=True), True),
        (exc.IntegrityError("", {}, Exception()), False),
        (ValueError(), False),
    ],
)
def test_which_errors_mean_a_lost_connection(error, is_lost):
    assert is_lost_connection(error) is is_lost
    wrapped = optuna.exceptions.StorageInternalError()
    wrapped.__cause__ = error
    assert is_lost_connection(wrapped) is is_lost


# ---- What of Optuna this rests on, beyond its documentation.


def test_optuna_reads_its_session_from_the_attribute_that_we_set(storage):
    backend = storage._backend
    assert isinstance(backend, RDBStorage)
    assert backend.engine is storage.engine
    used, usual = [], backend.scoped_session
    backend.scoped_session = lambda: used.append(1) or usual()
    storage.optuna.get_all_studies()
    assert used


def test_optuna_does_not_use_its_heartbeat(storage):
    assert storage._backend.get_heartbeat_interval() is None


def test_a_running_trial_is_reopened_with_all_that_it_had(storage, storage_url):
    trial = make_study(storage).ask(fixed_distributions=SPACE)
    trial.report(0.25, 3)
    trial.set_user_attr("key", [1, None])
    with open_storage(storage_url) as other:
        study = optuna.load_study(study_name="study", storage=other.optuna, sampler=optuna.samplers.RandomSampler())
        again = optuna.trial.Trial(study, trial._trial_id)
        assert (again.number, again.params, again.user_attrs) == (trial.number, trial.params, {"key": [1, None]})
        assert study.trials[0].intermediate_values == {3: 0.25}
        again.report(0.5, 4)
        study.tell(again, 0.5)
        (frozen,) = study.trials
    assert (frozen.state, frozen.value, frozen.intermediate_values) == (TrialState.COMPLETE, 0.5, {3: 0.25, 4: 0.5})


def test_ask_draws_all_fixed_distributions_before_it_returns(storage):
    make_study(storage).ask(fixed_distributions=SPACE)
    assert count(storage, "trial_params") == 2


def test_an_intermediate_value_may_be_stored_twice(storage):
    study = make_study(storage)
    trial = study.ask(fixed_distributions=SPACE)
    for _ in range(2):
        storage.optuna.set_trial_intermediate_value(trial._trial_id, 1, 0.5)
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_without_a_url_the_environment_decides(storage_url, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    with open_storage() as storage:
        assert storage.engine.url.database == storage_url.split("/")[3].split("?")[0]
