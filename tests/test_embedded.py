"""The embedded PostgreSQL: there for whoever needs it, gone with the last one, whatever ends the commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from frem_search import embedded
from frem_search.embedded import embedded_postgres, folder
from frem_search.errors import StorageError

USE = """
import sys
from frem_search.storage import open_storage
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
    from frem_search.storage import open_storage

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
    embedded._remove_stale_locks(tmp_path)
    assert not file.exists()
    embedded._remove_stale_locks(tmp_path)


def test_the_pid_file_of_a_server_that_runs_stays(postgres):
    file = postgres.folder / "postmaster.pid"
    content = file.read_text()
    embedded._remove_stale_locks(postgres.folder)
    assert file.read_text() == content


def test_a_signal_during_the_start_waits_and_leaves_no_server(home, monkeypatch):
    start = embedded._start

    def start_slowly(data):
        server = start(data)
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
    from frem_search.storage import open_storage

    (home / name).mkdir(mode=0o755)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / name))
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
