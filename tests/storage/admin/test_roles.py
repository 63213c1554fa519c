"""Roles on a server of its own, with passwords: what each may do, and that no password is ever seen."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import quote

import optuna
import psutil
import psycopg2
import pytest
import sqlalchemy as sa
from places import REPOSITORY

from frem_search.doctor import examine, secrets_of
from frem_search.errors import StorageError, UsageError
from frem_search.storage.admin.backup import back_up, restore
from frem_search.storage.admin.roles import READER, VERSIONS, WORKER, make_roles
from frem_search.storage.database import open_storage
from frem_search.study.record import read_record

DOCS = REPOSITORY / "docs"
SECRET = "w{0}rk%s@er:/?#' \"\\$x"
READER_SECRET = "r{e}ad%er@:/"


@pytest.fixture
def password_file(tmp_path):
    file = tmp_path / "worker password"
    file.write_text(SECRET + "\n")
    return file


@pytest.fixture
def server(tcp_server, tcp_database):
    """The server, whose database has been set up for workers and readers: nobody has a right that `db init` gives."""
    tcp_server.execute(
        f"REVOKE CONNECT ON DATABASE {tcp_database} FROM PUBLIC",
        "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
        "GRANT CREATE ON SCHEMA public TO PUBLIC",  # as before PostgreSQL 15
        database=tcp_database,
    )
    with open_storage(tcp_server.url(database=tcp_database)) as storage:
        make_roles(storage, {WORKER: SECRET, READER: READER_SECRET})
    tcp_server.passwords |= {WORKER: SECRET, READER: READER_SECRET}
    return tcp_server


@pytest.fixture
def _no_roles(tcp_server):
    """As if the server had never heard of our roles."""

    def has_role(role):
        return bool(tcp_server.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", values=[role]))

    for role in filter(has_role, (WORKER, READER)):
        tcp_server.execute(f"ALTER ROLE {role} RENAME TO {role}_aside")
    yield
    for role in (WORKER, READER):
        if has_role(role):
            tcp_server.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")
        if has_role(f"{role}_aside"):
            tcp_server.execute(f"ALTER ROLE {role}_aside RENAME TO {role}")


@pytest.fixture
def url(server, tcp_database):
    return lambda role: server.url(role, database=tcp_database)


def as_role(server, role, database, *statements):
    return server.execute(*statements, role=role, database=database)


def test_init_takes_passwords_from_files_and_may_be_repeated(
    tcp_server, tcp_database, run_cli, password_file, tmp_path
):
    (tmp_path / "reader").write_text(READER_SECRET)
    (tmp_path / "owner").write_text(tcp_server.passwords["frem_owner"])
    files = ("--worker-password-file", password_file, "--reader-password-file", tmp_path / "reader")
    address = tcp_server.url(database=tcp_database, has_password=False)
    for given, is_new in ((files, True), ((), False)):
        told = run_cli("db", "init", "--storage", address, *given, FREM_SEARCH_PASSWORD_FILE=tmp_path / "owner")
        assert told.returncode == 0, told.stderr
        password = "password set" if is_new else "password as before"
        lines = told.stdout.splitlines()[1:]
        assert [line.rpartition(", ")[2] for line in lines] == [password] * 2
        assert [line.split()[1].strip(":") for line in lines] == [WORKER, READER]
        assert not any(secret in told.stdout + told.stderr for secret in (SECRET, READER_SECRET))
    tcp_server.passwords |= {WORKER: SECRET, READER: READER_SECRET}
    for role in (WORKER, READER):
        assert as_role(tcp_server, role, tcp_database, "SELECT 1") == [(1,)]


def test_passwords_reach_the_server_as_verifiers_only(server, tcp_database):
    stored = server.execute(f"SELECT rolname, rolpassword FROM pg_authid WHERE rolname IN ('{WORKER}', '{READER}')")
    assert {verifier.split("$")[0] for _, verifier in stored} == {"SCRAM-SHA-256"}
    log = server.log.read_text()
    assert 'ALTER ROLE "frem_worker" PASSWORD' in log  # all statements are logged here
    assert not any(part in log for part in (SECRET, SECRET.replace("'", "''"), READER_SECRET, "w{0}rk"))


def test_a_changed_password_replaces_the_old_one(server, tcp_database, url):
    with open_storage(url("frem_owner")) as storage:
        made = make_roles(storage, {WORKER: "another"})
    assert [(role.is_new, role.has_new_password) for role in made] == [(False, True), (False, False)]
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        as_role(server, WORKER, tcp_database, "SELECT 1")
    server.passwords[WORKER] = "another"
    assert as_role(server, WORKER, tcp_database, "SELECT 1") == [(1,)]


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE frem_curve", "DROP TABLE trials CASCADE", "CREATE TABLE mine (n integer)", "TRUNCATE trials",
        "ALTER TABLE frem_lease ADD COLUMN mine text", "CREATE INDEX mine ON trials (number)", "CREATE SCHEMA mine",
        "CREATE ROLE mine", "GRANT ALL ON trials TO PUBLIC WITH GRANT OPTION", "UPDATE frem_schema SET version = 99",
        "UPDATE alembic_version SET version_num = 'v99'", "DELETE FROM version_info", "COPY trials TO PROGRAM 'cat'",
        f"ALTER ROLE {READER} SET default_transaction_read_only = off", "ALTER TYPE trialstate ADD VALUE 'MINE'",
    ],
)  # fmt: skip
def test_a_worker_changes_rows_and_nothing_else(server, tcp_database, statement):
    with pytest.raises((psycopg2.errors.InsufficientPrivilege, psycopg2.errors.InvalidGrantOperation)):
        as_role(server, WORKER, tcp_database, statement)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO studies (study_name) VALUES ('mine')", "DELETE FROM trials", "UPDATE frem_lease SET token = NULL",
        "CREATE TEMPORARY TABLE mine (n integer)", "SELECT nextval('trials_trial_id_seq')",
    ],
)  # fmt: skip
def test_a_reader_writes_nothing(server, tcp_database, statement):
    for first in ((), ("SET default_transaction_read_only = off",)):
        with pytest.raises((psycopg2.errors.InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction)):
            as_role(server, READER, tcp_database, *first, statement)


def test_tables_of_later_versions_get_their_rights_by_themselves(server, tcp_database):
    as_role(server, "frem_owner", tcp_database, "CREATE TABLE frem_later (n serial, m integer)")
    assert as_role(server, WORKER, tcp_database, "INSERT INTO frem_later (m) VALUES (7) RETURNING n") == [(1,)]
    assert as_role(server, READER, tcp_database, "SELECT m FROM frem_later") == [(7,)]
    assert as_role(server, READER, tcp_database, "SELECT last_value FROM frem_later_n_seq") == [(1,)]  # for backups


def test_a_worker_without_tables_is_told_who_makes_them(server, tcp_server):
    empty = tcp_server.create()
    try:
        for role in (WORKER, READER):
            with (
                pytest.raises(StorageError, match=r"denied for schema public\. Run `frem-search db init` as the"),
                open_storage(server.url(role, database=empty)),
            ):
                pass
        assert tcp_server.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", database=empty) == [
            (0,)
        ]
        log = tcp_server.log.read_text()
        assert "ERROR:  permission denied for schema public" not in log.rpartition(empty)[2]
    finally:
        tcp_server.drop(empty)


@pytest.mark.usefixtures("_no_roles")
def test_an_owner_without_the_right_to_make_roles_is_told_what_to_do(tcp_server, run_cli):
    name = tcp_server.create()
    tcp_server.execute("CREATE ROLE frem_plain LOGIN PASSWORD 'plain'", f"ALTER DATABASE {name} OWNER TO frem_plain")
    tcp_server.passwords["frem_plain"] = "plain"
    try:
        told = run_cli("db", "init", FREM_SEARCH_STORAGE=tcp_server.url("frem_plain", database=name))
        assert told.returncode == 1
        assert "permission denied to create role. Run this as the database's owner with CREATEROLE" in told.stderr
        tcp_server.execute(f"CREATE ROLE {WORKER} LOGIN", f"CREATE ROLE {READER} LOGIN")
        # An administrator made them: the owner grants. What a reader's transactions are is not the owner's to say.
        told = run_cli("db", "init", FREM_SEARCH_STORAGE=tcp_server.url("frem_plain", database=name))
        assert told.returncode == 0, told.stderr
        assert f"role {WORKER}: was there" in told.stdout
    finally:
        tcp_server.drop(name)
        tcp_server.execute("DROP ROLE frem_plain")


@pytest.mark.usefixtures("_no_roles")
def test_a_role_without_a_password_is_told_to_be_of_no_use_yet(tcp_server, tcp_database, run_cli):
    told = run_cli("db", "init", FREM_SEARCH_STORAGE=tcp_server.url(database=tcp_database))
    assert told.returncode == 0, told.stderr
    assert f"role {WORKER}: made, no password: it cannot log in yet\n" in told.stdout


def test_no_other_role_of_the_server_enters_unless_it_is_let_in(tcp_server, tcp_database):
    example = re.findall(
        r"^    ((?:CREATE|GRANT) .*frem_viewer.*);$", (DOCS / "dashboard.md").read_text(), re.MULTILINE
    )
    assert len(example) == 3
    tcp_server.execute(example[0])
    tcp_server.passwords["frem_viewer"] = "change-me"
    try:
        assert as_role(tcp_server, "frem_viewer", tcp_database, "SELECT 1") == [(1,)]  # any role enters a new one
        with open_storage(tcp_server.url(database=tcp_database)) as storage:
            make_roles(storage, {})
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            as_role(tcp_server, "frem_viewer", tcp_database, "SELECT 1")
        statements = [statement.replace("DATABASE frem ", f"DATABASE {tcp_database} ") for statement in example[1:]]
        tcp_server.execute(*statements, database=tcp_database)
        assert as_role(tcp_server, "frem_viewer", tcp_database, "SELECT count(*) FROM trials") == [(0,)]
    finally:
        tcp_server.execute("DROP OWNED BY frem_viewer", database=tcp_database)
        tcp_server.execute("DROP ROLE frem_viewer")


def test_who_is_not_the_owner_is_told_who_is(server, tcp_database, url, run_cli, tmp_path):
    server.execute(f"REVOKE INSERT ON trials FROM {WORKER}", database=tcp_database)
    told = run_cli("db", "init", FREM_SEARCH_STORAGE=url(WORKER))
    assert told.returncode == 1
    assert f"role {WORKER} does not own the tables; frem_owner does. Run `frem-search db` as frem_owner" in told.stderr
    assert "ALTER TABLE" not in told.stderr  # a worker is not meant to own them
    with open_storage(url(READER), is_read_only=True) as storage:
        back_up(storage, tmp_path / "a.dump")
    told = run_cli("db", "restore", tmp_path / "a.dump", FREM_SEARCH_STORAGE=url(WORKER))
    assert told.returncode == 1
    assert f"role {WORKER} does not own the tables; frem_owner does" in told.stderr
    query = f"SELECT has_table_privilege('{WORKER}', 'trials', 'INSERT')"
    assert server.execute(query, database=tcp_database) == [(False,)]
    assert run_cli("db", "init", FREM_SEARCH_STORAGE=url("frem_owner")).returncode == 0
    assert server.execute(query, database=tcp_database) == [(True,)]


def test_rights_that_the_server_does_not_grant_are_told(server, tcp_database, url, run_cli):
    # To grant what is somebody else's is a warning of the server, and nothing happens.
    server.execute(
        f"ALTER DATABASE {tcp_database} OWNER TO postgres", "GRANT USAGE, CREATE ON SCHEMA public TO frem_owner",
        f"GRANT CONNECT ON DATABASE {tcp_database} TO frem_owner",
        f"REVOKE CONNECT ON DATABASE {tcp_database} FROM {READER}",
        database=tcp_database,
    )  # fmt: skip
    told = run_cli("db", "init", FREM_SEARCH_STORAGE=url("frem_owner"))
    assert told.returncode == 1
    assert f"role {READER} still lacks CONNECT on the database, which is not this role's to grant" in told.stderr


def test_upgrade_looks_at_the_version_first(server, tcp_database, url, run_cli):
    for role in (WORKER, READER):
        told = run_cli("db", "upgrade", FREM_SEARCH_STORAGE=url(role))
        assert (told.returncode, "the tables are up to date" in told.stdout) == (0, True), told.stderr
    server.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'", database=tcp_database)
    told = run_cli("db", "upgrade", FREM_SEARCH_STORAGE=url(WORKER))
    assert told.returncode == 1
    assert f"role {WORKER} does not own the tables; frem_owner does" in told.stderr


def test_tables_that_another_owner_makes_after_an_upgrade_get_their_rights(server, tcp_database, url, run_cli):
    told = run_cli("db", "upgrade", FREM_SEARCH_STORAGE=url("postgres"))
    assert told.returncode == 0, told.stderr
    as_role(server, "postgres", tcp_database, "CREATE TABLE frem_later (n serial, m integer)")
    assert as_role(server, WORKER, tcp_database, "INSERT INTO frem_later (m) VALUES (7) RETURNING n") == [(1,)]
    assert as_role(server, READER, tcp_database, "SELECT m FROM frem_later") == [(7,)]


def test_doctor_makes_no_tables(tcp_server, tcp_database, run_cli):
    told = run_cli("doctor", FREM_SEARCH_STORAGE=tcp_server.url("postgres", database=tcp_database))
    assert told.returncode == 0, told.stdout
    assert "warn  schema       no tables yet. Made by the first search, or by `frem-search db init`" in told.stdout
    query = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert tcp_server.execute(query, database=tcp_database) == [(0,)]
    told = run_cli("db", "init", FREM_SEARCH_STORAGE=tcp_server.url(database=tcp_database))
    assert told.returncode == 0, told.stderr


def test_tables_of_somebody_else_can_be_handed_over(tcp_server, tcp_database, run_cli, tmp_path):
    with open_storage(tcp_server.url("postgres", database=tcp_database)):
        pass
    address = tcp_server.url(database=tcp_database)
    for command in (("init",), ("upgrade",)):
        told = run_cli("db", *command, FREM_SEARCH_STORAGE=address)
        assert told.returncode == 1
        assert "role frem_owner does not own the tables; postgres does. Run `frem-search db` as postgres" in told.stderr
        assert "give each table to frem_owner: ALTER TABLE ... OWNER TO frem_owner (docs/containers.md" in told.stderr
    (statement,) = re.findall(
        r"^    (SELECT format\((?:.|\n)*?) \\gexec$", (DOCS / "containers.md").read_text(), re.MULTILINE
    )
    for (each,) in tcp_server.execute(statement.replace("OWNER TO frem", "OWNER TO frem_owner"), database=tcp_database):
        tcp_server.execute(each, database=tcp_database)
    told = run_cli("db", "init", FREM_SEARCH_STORAGE=address)
    assert told.returncode == 0, told.stderr
    with open_storage(address) as storage:  # which drops and makes anew whatever there is
        back_up(storage, tmp_path / "a.dump")
        assert restore(storage, tmp_path / "a.dump") == (0, 0)


@pytest.mark.parametrize(("level", "zone"), [("repeatable read", "Asia/Tokyo"), ("serializable", "America/New_York")])
def test_settings_of_the_role_and_pgtz_change_nothing_of_a_search(
    server, tcp_database, url, run_cli, tiny_study, level, zone
):
    settings = {"default_transaction_isolation": level, "timezone": zone}
    for name, value in settings.items():
        server.execute(f"ALTER ROLE {WORKER} IN DATABASE {tcp_database} SET {name} = '{value}'")
    told = run_cli("run", "--study", tiny_study, "--n-trials", 2, FREM_SEARCH_STORAGE=url(WORKER), PGTZ=zone)
    assert told.returncode == 0, told.stderr
    with open_storage(url(READER)) as storage:
        record = read_record(storage, "tiny")
        assert [(trial.number, trial.state) for trial in record.trials] == [(0, "complete"), (1, "complete")]
        seconds = (record.trials[1].finished - record.trials[0].started).total_seconds()
        assert 0 < seconds < 100
    told = run_cli("doctor", "--json", FREM_SEARCH_STORAGE=url(WORKER), PGTZ=zone)
    found = {each["check"]: each for each in json.loads(told.stdout)}
    assert found["session"]["state"] == found["clock"]["state"] == "ok"


def test_eight_owners_at_once_set_up_an_empty_database(tcp_server, tcp_database, tmp_path):
    (tmp_path / "password").write_text(SECRET)
    code = (
        "import sys; import frem_search.storage.admin.roles, frem_search.storage.database\n"
        "from frem_search.cli import main\n"
        "print('ready', flush=True); sys.stdin.readline(); sys.argv[0] = 'frem-search'; main()"
    )
    path = os.pathsep.join(filter(None, [str(REPOSITORY), *sys.path]))
    environment = os.environ | {
        "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FREM_SEARCH_STORAGE": tcp_server.url(database=tcp_database),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, "db", "init", "--worker-password-file", str(tmp_path / "password")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(8)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 8
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 8, ended
    assert tcp_server.execute("SELECT count(*) FROM frem_schema", database=tcp_database) == [(1,)]


def test_a_worker_searches_and_a_reader_looks(server, url, run_cli, tiny_study, tmp_path):
    told = run_cli("run", "--study", tiny_study, FREM_SEARCH_STORAGE=url(WORKER))
    assert told.returncode == 0, told.stderr
    for command in (
        ("status", "--study", tiny_study), ("trials", "--study", tiny_study), ("study", "list", "--stored"),
        ("figures", "--study", tiny_study, "--format", "html", "--out", tmp_path / "figures"),
        ("db", "backup", "--out", tmp_path / "a.dump"),
    ):  # fmt: skip
        told = run_cli(*command, FREM_SEARCH_STORAGE=url(READER))
        assert told.returncode == 0, told.stderr
    told = run_cli("run", "--study", tiny_study, "--n-trials", 9, FREM_SEARCH_STORAGE=url(READER))
    assert told.returncode == 1
    assert "Workers need the role frem_worker" in told.stderr
    assert "Traceback" not in told.stderr
    told = run_cli("study", "delete", "tiny", "--yes", FREM_SEARCH_STORAGE=url(READER))
    assert (told.returncode, "Traceback" in told.stderr) == (1, False)


def test_roles_keep_their_rights_after_a_restore(server, tcp_database, url, run_cli, tiny_study, tmp_path):
    assert run_cli("run", "--study", tiny_study, "--n-trials", 1, FREM_SEARCH_STORAGE=url(WORKER)).returncode == 0
    with open_storage(url("frem_owner")) as storage:
        back_up(storage, tmp_path / "a.dump")
        restore(storage, tmp_path / "a.dump", force=True)
    assert run_cli("run", "--study", tiny_study, "--n-trials", 2, FREM_SEARCH_STORAGE=url(WORKER)).returncode == 0
    assert as_role(server, READER, tcp_database, "SELECT count(*) FROM trials") == [(2,)]
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        as_role(server, WORKER, tcp_database, f"DELETE FROM {VERSIONS[0]}")


# ---- passwords


def spellings(secret):
    return [secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], secret[:6]]


def test_a_password_is_seen_nowhere_while_a_search_runs(
    server, tcp_database, start_cli, run_cli, tiny_study, password_file, tmp_path, home
):
    tiny_study.write_text(tiny_study.read_text().replace("n_epochs = 3", "n_epochs = 2000"))
    settings = {
        "FREM_SEARCH_STORAGE": server.url(WORKER, database=tcp_database, has_password=False),
        "FREM_SEARCH_PASSWORD_FILE": password_file,
    }
    process = start_cli("run", "--study", tiny_study, "--workers", 2, "--device", "cpu", **settings)
    seen, deadline = set(), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            seen.add(Path(f"/proc/{each.pid}/cmdline").read_text())
        running = server.execute("SELECT count(*) FROM frem_lease WHERE token IS NOT NULL", database=tcp_database)
        if running == [(2,)]:
            break
        time.sleep(0.3)
    told = run_cli("status", "--study", tiny_study, **settings)
    assert told.returncode == 0, told.stderr
    assert len(seen) == 2, seen  # the command, and its workers, which are called alike
    process.send_signal(signal.SIGTERM)
    shown = "".join(process.communicate(timeout=60)) + told.stdout + told.stderr + "".join(seen)
    for file in [*home.rglob("*"), *(path for path in tmp_path.rglob("*") if path != password_file)]:
        shown += file.read_bytes().decode(errors="replace") if file.is_file() else ""
    assert WORKER in shown
    assert [text for text in spellings(SECRET) if text in shown] == []
    assert server.execute("SELECT count(*) FROM frem_lease", database=tcp_database) == [(2,)]


def test_a_password_is_in_no_argument_of_pg_dump(server, url, tmp_path, monkeypatch):
    calls, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **settings: calls.append(command) or run(command, **settings)
    )
    with open_storage(url("frem_owner")) as storage:
        back_up(storage, tmp_path / "a.dump")
        restore(storage, tmp_path / "a.dump")
    arguments = " ".join(str(word) for command in calls for word in command)
    assert arguments.count("--dbname=") == 2
    assert "frem_owner" in arguments
    assert [text for text in spellings(server.passwords["frem_owner"]) if text in arguments] == []


def test_a_wrong_password_is_refused_and_not_repeated(server, tcp_database, tmp_path, monkeypatch, caplog, run_cli):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "wrong").write_text(SECRET + "!")
    monkeypatch.setenv("FREM_SEARCH_PASSWORD_FILE", str(tmp_path / "wrong"))
    address = server.url(WORKER, database=tcp_database, has_password=False)
    with pytest.raises(StorageError, match="password authentication failed") as caught, open_storage(address):
        pass
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    findings = list(examine(lambda: open_storage(address), artifacts=str(tmp_path / "a"), secrets=secrets_of(address)))
    shown += "".join(finding.line() for finding in findings)
    told = run_cli("doctor", FREM_SEARCH_STORAGE=address)
    assert told.returncode == 1
    assert [text for text in spellings(SECRET) if text in shown + told.stdout + told.stderr] == []


def test_a_password_file_is_read_where_the_url_has_none(
    server, tcp_database, url, password_file, monkeypatch, tmp_path
):
    address = server.url(WORKER, database=tcp_database, has_password=False)
    with pytest.raises(StorageError), open_storage(address):
        pass
    monkeypatch.setenv("FREM_SEARCH_PASSWORD_FILE", str(password_file))
    with open_storage(address) as storage:
        assert storage.engine.url.username == WORKER
    with open_storage(url(READER)) as storage:
        assert storage.engine.url.username == READER
    assert SECRET in secrets_of(address)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read: No such file"), ("", "an empty file"), ("\n", "an empty file"), ("a\nb\n", "but got 2")],
)
def test_a_password_file_that_is_no_line_is_refused(tcp_server, tmp_path, monkeypatch, content, reason):
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("FREM_SEARCH_PASSWORD_FILE", str(file))
    with (
        pytest.raises(UsageError, match=f"FREM_SEARCH_PASSWORD_FILE: .*{reason}"),
        open_storage(tcp_server.url(has_password=False)),
    ):
        pass


def test_doctor_says_what_a_role_may_do(server, tcp_database, url, tmp_path):
    def rights(role):
        findings = examine(lambda: open_storage(url(role)), artifacts=str(tmp_path / "artifacts"))
        return next(finding.line() for finding in findings if finding.check == "rights")

    assert rights(WORKER) == "ok    rights       role frem_worker reads, writes and deletes; makes no tables"
    assert rights(READER).startswith(
        "FAIL  rights       role frem_reader lacks DELETE, INSERT, UPDATE, USAGE on frem_curve"
    )
    assert "for status, trials, figures and dashboard reading is enough" in rights(READER)
    assert rights("frem_owner") == "ok    rights       role frem_owner reads, writes and deletes; makes tables"
    assert rights("postgres").startswith("warn  rights       role postgres is a superuser")
    server.execute(f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {WORKER}", database=tcp_database)
    assert rights(WORKER).startswith("FAIL  rights       role frem_worker lacks USAGE on studies_study_id_seq and ")
    assert "`frem-search db init`, run by the owner, grants" in rights(WORKER)


def test_doctor_tells_a_worker_without_tables_who_makes_them(server, tcp_server, run_cli):
    empty = tcp_server.create()
    try:
        told = run_cli("doctor", FREM_SEARCH_STORAGE=server.url(WORKER, database=empty))
    finally:
        tcp_server.drop(empty)
    assert told.returncode == 1
    expected = "role frem_worker may not make the tables, and there are none yet. Run `frem-search db init` as the"
    assert f"FAIL  rights       {expected}" in told.stdout


def test_a_search_outlives_a_restart_of_the_server(server, url, start_cli, tiny_study, tcp_database):
    tiny_study.write_text(tiny_study.read_text().replace("n_epochs = 3", "n_epochs = 120"))
    process = start_cli("run", "--study", tiny_study, "--checkpoint-every", 0, FREM_SEARCH_STORAGE=url(WORKER))
    deadline = time.monotonic() + 60
    while server.execute("SELECT count(*) FROM trials", database=tcp_database) == [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for mode in ("fast", "immediate"):
        server.restart(mode, away_s=0.5)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    states = server.execute("SELECT number, state FROM trials ORDER BY number", database=tcp_database)
    assert states == [(0, "COMPLETE"), (1, "COMPLETE"), (2, "COMPLETE")]


def test_the_isolation_level_of_a_transaction_is_ours(server, url, tcp_database):
    server.execute(f"ALTER ROLE {WORKER} SET default_transaction_isolation = 'serializable'")
    try:
        with open_storage(url(WORKER)) as storage, storage.transaction() as connection:
            optuna.create_study(storage=storage.optuna, study_name="a")
            assert connection.execute(sa.text("SHOW transaction_isolation")).scalar() == "read committed"
    finally:
        server.execute(f"ALTER ROLE {WORKER} RESET default_transaction_isolation")
