"""Nobody else gets in: no connection, no reading of data, sockets or locks, wherever the home lies."""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from strangers import STRANGER, become, copy_psql

from frem_search.errors import StorageError
from frem_search.storage.embedded import sockets
from frem_search.storage.embedded.account import Account, account_for
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.server import find_running, has_ended

LONG = "long" * 40


@pytest.fixture
def stranger():
    """Run a command as a user whom nothing here belongs to."""
    beginning = become(STRANGER)

    def run(*command):
        return subprocess.run(
            [*beginning, *map(str, command)], capture_output=True, text=True, check=False, cwd="/", timeout=60
        )

    return run


@pytest.fixture
def psql(home, stranger):
    """Ask a server as a stranger, by a client that works."""
    program = copy_psql(home)
    assert stranger(program, "--version").returncode == 0
    return lambda folder: stranger(program, "-h", folder, "-U", "postgres", "-d", "postgres", "-c", "SELECT 1")


def readable_by(stranger, *folders):
    files = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    script = 'for f; do if [ -d "$f" ]; then ls "$f"; else true <"$f"; fi >/dev/null 2>&1 && echo "$f"; done; true'
    told = stranger("sh", "-c", script, "sh", *files)
    assert told.returncode == 0
    return told.stdout.splitlines()


@pytest.mark.parametrize("name", ["short", LONG, "com,ma"])
def test_nobody_else_connects_or_reads(home, monkeypatch, stranger, psql, name):
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    folder = home / name
    monkeypatch.setenv("FREM_SEARCH_HOME", str(folder))
    with embedded_postgres() as url:
        told = psql(url.query["host"])
        assert told.returncode == 2
        assert "Permission denied" in told.stderr
        listens_in = Path(url.query["host"])
        assert stat.S_IMODE(listens_in.stat().st_mode) == 0o700
        assert stat.S_IMODE(sockets.socket_in(listens_in).stat().st_mode) == 0o700
        assert readable_by(stranger, folder / "postgres", listens_in) == []
        assert readable_by(stranger, folder) == [str(folder)]
    assert not list(home.glob(f"{sockets.SHORT_FOLDER}*"))


def test_nobody_else_connects_to_a_home_that_was_moved(home, monkeypatch, stranger, psql):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "before"))
    with embedded_postgres():
        (home / "before").rename(home / "after")
        monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "after"))
        with embedded_postgres() as url:
            assert url.query["host"] == str(home / "after" / "postgres")
            assert "Permission denied" in psql(url.query["host"]).stderr
            assert readable_by(stranger, home / "after" / "postgres") == []


def test_a_client_that_works_connects_where_it_may(postgres, stranger, psql):
    """Else the other tests would show nothing."""
    for path in (postgres.folder, sockets.socket_in(postgres.folder)):
        path.chmod(0o777)
    try:
        assert psql(postgres.folder).returncode == 0
    finally:
        postgres.folder.chmod(0o700)
        sockets.socket_in(postgres.folder).chmod(0o700)


def test_two_homes_with_long_paths_have_each_its_own_socket(home, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / LONG))
    with embedded_postgres() as one:
        monkeypatch.setenv("FREM_SEARCH_HOME", str(home / f"{LONG}s"))
        with embedded_postgres() as other:
            assert one.query["host"] != other.query["host"]
            with embedded_postgres() as joined:
                assert joined == other


def test_a_killed_servers_socket_folder_is_removed(home, monkeypatch, use):
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / LONG))
    user = use()
    user.stdout.readline()
    user.kill()
    user.wait()
    find_running(home / LONG / "postgres").process.kill()
    assert len(list(home.glob(f"{sockets.SHORT_FOLDER}*"))) == 1
    with embedded_postgres():
        assert len(list(home.glob(f"{sockets.SHORT_FOLDER}*"))) == 1
    assert not list(home.glob(f"{sockets.SHORT_FOLDER}*"))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_where_others_could_put_another_takes_no_socket(home, monkeypatch, mode):
    base = home / "tmp"
    base.mkdir()
    base.chmod(mode)
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    account = account_for(home / "none")
    folder = sockets.choose_folder(home / LONG, account)
    assert folder.parent == (base if mode & stat.S_ISVTX else Path("/tmp"))
    assert folder.stat().st_uid == account.uid
    sockets.remove_folder(folder, account)
    assert not folder.exists()


def test_where_no_folder_is_safe_the_remedy_is_told(home, monkeypatch):
    monkeypatch.setattr(sockets, "_is_safe", lambda *_: False)
    with pytest.raises(StorageError, match=r"too long for a socket .* Set FREM_SEARCH_HOME to a shorter path"):
        sockets.choose_folder(home / LONG, Account(os.geteuid(), os.getegid()))


@pytest.mark.parametrize(
    ("folder", "socket", "is_closed"),
    [(0o700, 0o777, True), (0o750, 0o700, True), (0o755, 0o700, True), (0o750, 0o777, False), (0o777, 0o700, False)],
)
def test_a_socket_that_others_can_reach_or_replace_is_not_closed(home, folder, socket, is_closed):
    home.chmod(folder)
    sockets.socket_in(home).touch()
    sockets.socket_in(home).chmod(socket)
    account = Account(os.geteuid(), os.getegid())
    assert sockets.is_closed(home, sockets.PORT, account) == is_closed
    assert not sockets.is_closed(home, sockets.PORT, Account(STRANGER, STRANGER))


@pytest.fixture
def earlier_server(home, monkeypatch, make_database):
    """A server whose socket an earlier version put where every user reaches it, as it did for long paths."""
    data = make_database(home / "postgres")
    folder = home / "open"
    folder.mkdir()
    monkeypatch.setattr(sockets, "choose_folder", lambda *_: folder)
    from frem_search.storage.embedded import server

    account = account_for(data)
    os.chown(folder, account.uid, account.gid)
    running = server.start(data, account)
    folder.chmod(0o777)
    monkeypatch.undo()
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home))
    yield running
    server.stop(running.process)


def test_an_earlier_versions_server_that_others_can_reach_is_started_anew(home, earlier_server):
    with embedded_postgres() as url:
        assert url.query["host"] == str(home / "postgres")
        assert has_ended(earlier_server.process)


def test_an_earlier_versions_server_that_others_can_reach_is_not_joined(home, earlier_server):
    import fcntl

    with (home / "postgres.users").open("a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="other users of this machine can reach"), embedded_postgres():
            pytest.fail("it was joined")
    assert earlier_server.process.is_running()
