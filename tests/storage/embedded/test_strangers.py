"""Nobody else gets in: no connection, no reading of data, sockets or locks, wherever the home lies."""

import fcntl
import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from strangers import STRANGER, become, copy_psql, modes

from frem_search.errors import StorageError
from frem_search.storage.embedded import sockets
from frem_search.storage.embedded.account import Account, account_for
from frem_search.storage.embedded.embedded import embedded_postgres, serve
from frem_search.storage.embedded.server import find_running, has_ended

LONG = "long" * 40
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")


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
    with pytest.raises(StorageError, match=r"too long for a socket, .* Set FREM_SEARCH_HOME to a shorter path"):
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
    with (home / "postgres.users").open("a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="other users of this machine can reach"), embedded_postgres():
            pytest.fail("it was joined")
    assert earlier_server.process.is_running()


def test_a_server_whose_socket_is_gone_is_told(home):
    with embedded_postgres() as url:
        sockets.socket_in(home / "postgres").unlink()
        with pytest.raises(StorageError, match=f"{url.query['host']}/.s.PGSQL.5432: .* the socket is gone. End the"):
            use_once()
    use_once()


def use_once():
    with embedded_postgres() as url:
        assert sockets.socket_in(Path(url.query["host"])).exists()


@as_root
@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_root_follows_no_link_of_a_stranger(home, mode):
    """In a folder where everybody may write, or in the stranger's own."""
    victim, theirs = home / "victim", home / "theirs"
    for folder in (victim, theirs):
        folder.mkdir()
        folder.chmod(0o755)
    before = modes(victim)
    theirs.chmod(mode)
    (theirs / "postgres").symlink_to(victim)
    os.lchown(theirs / "postgres", STRANGER, STRANGER)
    if mode == 0o755:
        os.chown(theirs, STRANGER, STRANGER)
    with (
        pytest.raises(StorageError, match=rf"{theirs}/postgres: expected .* got one of user {STRANGER} in a folder of"),
        serve(theirs / "postgres"),
    ):
        pytest.fail("it was followed")
    assert modes(victim) == before
    assert not list(victim.iterdir())


@as_root
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_root_gives_nothing_away_that_lies_where_a_stranger_may_write(home, kind):
    """The stranger can have renamed a folder of root, or a link, in a folder of his own."""
    (home / "theirs").mkdir()
    victim = home / ("theirs/postgres" if kind == "folder" else "victim")
    victim.mkdir()
    if kind == "link":
        (home / "theirs" / "postgres").symlink_to(victim)
    os.chown(home / "theirs", STRANGER, STRANGER)
    with (
        pytest.raises(StorageError, match=f"in a folder of user {STRANGER} with mode .* that root alone may change"),
        serve(home / "theirs" / "postgres"),
    ):
        pytest.fail("it was given away")
    assert victim.stat().st_uid == 0
    assert not list(victim.iterdir())


@as_root
def test_a_lock_that_a_stranger_made_first_is_refused(home):
    home.chmod(0o1777)
    lock = home / "postgres.lock"
    lock.touch()
    lock.chmod(0o644)
    os.chown(lock, STRANGER, STRANGER)
    with lock.open() as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=f"lock: expected .* got one of user {STRANGER}, .* Remove it, or"):
            use_once()
    assert stat.S_IMODE(lock.stat().st_mode) == 0o644
