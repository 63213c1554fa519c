"""The embedded PostgreSQL: there for whoever needs it, gone with the last one, whatever ends the commands."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from frem_search.errors import StorageError
from frem_search.storage.embedded import embedded, server
from frem_search.storage.embedded.account import account_for
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.server import StartError


def end(process):
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def server_of(home):
    """Return the server's process, or None."""
    running = server.find_running(home / "postgres")
    return running and running.process


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
        embedded._remove_remains(tmp_path, account_for(tmp_path), users)
        assert not file.exists()
        embedded._remove_remains(tmp_path, account_for(tmp_path), users)


def test_the_pid_file_of_a_server_that_runs_stays(postgres, tmp_path):
    file = postgres.folder / "postmaster.pid"
    content = file.read_text()
    with (tmp_path / "users").open("a") as users:
        embedded._remove_remains(postgres.folder, account_for(postgres.folder), users)
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


@pytest.fixture
def never_ready(monkeypatch):
    """How many looks at a server show it as one that is not ready yet; nothing is in the list once it is."""
    find_running, looks = server.find_running, []

    def find(data):
        running = find_running(data)
        return dataclasses.replace(running, is_ready=False) if running and looks and looks.pop() else running

    monkeypatch.setattr(server, "find_running", find)
    return looks


def test_a_server_that_recovers_slowly_is_waited_for(home, never_ready):
    never_ready += [True] * 50
    with embedded_postgres():
        assert server_of(home)
    assert server_of(home) is None
    assert not never_ready


def test_a_server_that_never_gets_ready_is_ended(home, never_ready, monkeypatch):
    never_ready += [True] * 10_000
    monkeypatch.setattr(server, "START_TIMEOUT_S", 0.5)
    with pytest.raises(StorageError, match=r"not ready in .* when the machine has less to do"), embedded_postgres():
        pytest.fail("it was not refused")
    assert server_of(home) is None


def test_a_server_that_others_stop_is_waited_for_and_started_anew(home, use):
    killed = use()
    killed.stdout.readline()
    killed.kill()
    stopping = server_of(home)
    stopping.send_signal(signal.SIGINT)
    with embedded_postgres():
        assert server_of(home).pid != stopping.pid
    assert server_of(home) is None


def test_a_server_whose_folder_was_removed_does_not_disturb_the_next(home, use):
    killed = use()
    killed.stdout.readline()
    killed.kill()
    left = server_of(home)
    shutil.rmtree(home / "postgres")
    with embedded_postgres():
        server.stop(left)
        with embedded_postgres():
            assert server_of(home).pid != left.pid


def test_a_home_that_was_moved_under_its_server_does_not_disturb_a_new_one_at_the_old_path(home, monkeypatch, use):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "a"))
    first = use()
    first.stdout.readline()
    (home / "a").rename(home / "b")
    with embedded_postgres():
        end(first)
        assert server_of(home / "b") is None
        with embedded_postgres():
            assert server_of(home / "a")
    assert server_of(home / "a") is None


def test_homes_whose_data_are_one_folder_have_one_lock(home, monkeypatch, use):
    for name in "xy":
        (home / name).mkdir()
        (home / name / "postgres").symlink_to(home / "shared")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "x"))
    with embedded_postgres():
        running = server_of(home / "x")
        monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "y"))
        end(use())
        assert not server.has_ended(running)
    assert server.has_ended(running)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Set FREM_SEARCH_HOME"),
        (OSError(errno.ENOSPC, "No space left on device"), "Free disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Free disk space"),
        (StartError("FATAL:  could not write: No space left on device"), "Free disk space"),
        (StartError("FATAL:  bad"), "Mend that, or use a server of your own"),
        (
            StartError("initdb: error: could not look up effective user ID 7: no such user"),
            r"a name in /etc/passwd, or",
        ),
    ],
)
def test_a_failed_start_offers_the_remedy_that_fits(home, monkeypatch, error, remedy):
    def fail(*_):
        raise error

    monkeypatch.setattr(server, "make_database", fail)
    with pytest.raises(StorageError, match=f"does not start: .* {remedy}") as told, embedded_postgres():
        pytest.fail("it did start")
    assert ("disk space" in str(told.value)) == ("space" in str(error) or "quota" in str(error))
    assert "See " not in str(told.value)  # nothing was logged


def test_a_failed_start_names_the_log_and_its_first_complaint(home):
    with embedded_postgres():
        pass
    (home / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\nnor_this = 2\n")
    with pytest.raises(StorageError) as told, embedded_postgres():
        pytest.fail("it did start")
    assert re.search(r"not start: FATAL: .* contains errors\. See .*/postgres/log, or", str(told.value)), told.value
    assert (home / "postgres" / "log").exists()


def test_data_that_others_may_enter_are_told_by_their_path(home):
    with embedded_postgres():
        pass
    home.chmod(0o700)
    (home / "postgres").chmod(0o755)
    with pytest.raises(StorageError) as told, embedded_postgres():
        pytest.fail("it did start")
    assert f'data directory "{home}/postgres" has invalid permissions' in str(told.value)
    assert str(told.value).endswith(f"Close it to other users: chmod 700 {home}/postgres")


def test_a_database_of_another_version_is_told(home):
    with embedded_postgres():
        pass
    (home / "postgres" / "PG_VERSION").write_text("16\n")
    with (
        pytest.raises(StorageError, match="expected a database of PostgreSQL 18, but got one of 16"),
        embedded_postgres(),
    ):
        pytest.fail("it did start")


def test_an_initdb_that_was_killed_leaves_nothing_that_is_taken_for_a_database(home):
    (home / "postgres.begun-01234567").mkdir()
    (home / "postgres.begun-01234567" / "PG_VERSION").write_text("18\n")
    with embedded_postgres():
        assert server_of(home)
    assert not list(home.glob("postgres.begun*"))


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_empty_folder_in_the_place_of_the_data_is_used(home, kind):
    (home / "elsewhere").mkdir()
    (home / "postgres").mkdir() if kind == "folder" else (home / "postgres").symlink_to("elsewhere")
    with embedded_postgres():
        pass
    assert (home / "postgres" / "PG_VERSION").exists()
    assert (home / "postgres").is_symlink() == (kind == "link")


def test_what_postgresql_says_of_a_failed_start_is_one_line(home, run_cli):
    (home / "postgres").mkdir()
    (home / "postgres" / "in the way").write_text("")
    told = run_cli("study", "list", "--stored")
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1, told.stderr
    assert re.search(r"does not start: initdb: error: directory .* is not empty\. Mend ", told.stderr)


def test_the_embedded_database_is_named_by_its_folder(home):
    from frem_search.storage.database import open_storage

    with open_storage() as storage:
        assert storage.label == f"embedded, in {home / 'postgres'}"


def test_no_space_is_told_whoever_met_it_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    assert embedded._remedy(StartError("?"), tmp_path, account_for(tmp_path)) == "Free disk space."


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


@pytest.mark.parametrize(
    "name",
    [
        "caf\udce9",
        "line\u2028end",
        "return\rs",
        "plus+and%41percent",
        "ünï",
        "long" * 40,
        """my jane's "home\"""",
        "a&b;$(c)`d`|<e>[f]*?!#",
        "a,b",
        "{x}\\y:1 ",
    ],
)
def test_unusual_folders_work(home, monkeypatch, name):
    from frem_search.storage.database import open_storage

    (home / name).mkdir(mode=0o755)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / name))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    with open_storage() as storage, storage.engine.connect() as connection:
        shown = connection.exec_driver_sql("SHOW data_directory").scalar()
        own = f"/proc/{server_of(home / name).pid}/cwd"
        assert Path(own if shown == str(server.OWN_FOLDER) else shown).samefile(home / name / "postgres")
    assert server_of(home / name) is None


def test_a_folder_with_a_line_break_is_refused(home, monkeypatch):
    """PostgreSQL's pid file has a path on each line."""
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "my\nhome"))
    with pytest.raises(StorageError, match=r"cannot have line breaks\. Set FREM_SEARCH_HOME"), embedded_postgres():
        pytest.fail("it was not refused")
    assert not (home / "my\nhome").exists()


def test_a_file_in_the_place_of_the_folder_is_told(home):
    (home / "postgres").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written: .* Set FREM_SEARCH_HOME"), embedded_postgres():
        pytest.fail("it was not refused")


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
