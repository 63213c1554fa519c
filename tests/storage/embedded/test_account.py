"""Who runs the server: this user; for root, the owner of the data, who gets nothing of root's."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from places import REPOSITORY
from strangers import STRANGER

from frem_search.errors import StorageError
from frem_search.storage.embedded import account as accounts
from frem_search.storage.embedded.account import Account, account_for
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.server import find_running

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")


def test_an_ordinary_users_server_is_that_users(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid or STRANGER)
    assert account_for(home / "postgres").uid == os.geteuid()


def test_data_of_somebody_else_are_told(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    with pytest.raises(StorageError, match=r"belongs to user \w+\. Run frem-search as \w+, or set FREM_SEARCH_HOME"):
        account_for(home)


@as_root
def test_the_server_has_neither_roots_groups_nor_roots_environment(home, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_ARTIFACTS", "s3://key:secret@store")
    monkeypatch.setenv("PGPORT", "6000")
    with embedded_postgres() as url:
        assert url.port == 5432
        process = find_running(home / "postgres").process
        assert set(process.environ()) <= {"PATH", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PWD", "OLDPWD", "_", "SHLVL"} | {
            name for name in process.environ() if name.startswith("PG")
        }
        assert process.environ().get("PGPORT") is None
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        owner = (home / "postgres").stat()
        assert status["Groups"].split() == []
        assert status["Uid"].split() == [str(owner.st_uid)] * 4
        assert status["Gid"].split() == [str(owner.st_gid)] * 4
        assert owner.st_uid != 0


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o775])
def test_data_of_another_owner_are_used_where_only_root_could_put_them(home, make_database, mode):
    """In a container made anew our user may have another number."""
    data = make_database(home / "postgres")
    subprocess.run(["chown", "-R", f"{STRANGER}:{STRANGER}", data], check=True)
    home.chmod(mode)
    if mode & 0o022:
        with pytest.raises(StorageError, match=f"where others may put something else, and belongs to user {STRANGER}"):
            account_for(data)
        return
    with embedded_postgres():
        assert find_running(data).process.uids().real == STRANGER
    assert data.stat().st_uid == STRANGER


@as_root
def test_a_folder_of_root_with_something_in_it_keeps_its_owner(home):
    (home / "postgres").mkdir()
    (home / "postgres" / "mine").touch()
    with pytest.raises(StorageError, match="is not empty"), embedded_postgres():
        pytest.fail("it did start")
    assert (home / "postgres").stat().st_uid == 0


@as_root
def test_data_that_root_copied_are_told(home, make_database):
    data = make_database(home / "postgres")
    subprocess.run(["chown", "-R", "root:", data], check=True)
    with pytest.raises(StorageError, match=f"got data of root, .* chown -R pgserver: {data}"), embedded_postgres():
        pytest.fail("it did start")


@as_root
def test_a_root_that_may_be_nobody_else_is_told(home):
    """As in a user namespace that has root's number alone."""
    if subprocess.run(["unshare", "--map-root-user", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("There are no user namespaces here.")
    script = "from frem_search.storage.embedded.embedded import embedded_postgres as e\nwith e(): pass"
    command = ["unshare", "--map-root-user", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Root may not act as user" in told.stderr.splitlines()[-1]
    assert not list(home.glob("postgres*/PG_VERSION"))


@as_root
def test_a_user_that_cannot_be_made_is_told(home, monkeypatch):
    monkeypatch.setattr(accounts, "SYSTEM_USER", "no user: has this name")
    with pytest.raises(StorageError, match=r"cannot be made: useradd: .* use a server of your own with --storage"):
        account_for(home / "postgres")


def test_permissions_are_those_of_owner_group_or_others(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    owner, group = folder.stat().st_uid, folder.stat().st_gid
    for mode, expected in ((0o100, (True, False, False)), (0o010, (False, True, False)), (0o001, (False, False, True))):
        folder.chmod(mode)
        users = Account(owner, STRANGER), Account(STRANGER, group), Account(STRANGER, STRANGER)
        assert tuple(user._has(folder.stat(), 0o1) for user in users) == expected


def test_a_program_runs_in_a_session_of_its_own(tmp_path):
    own = Account(os.geteuid(), os.getegid())
    told = own.run(["sh", "-c", "ps -o sid= -p $$; pwd; id -u"], cwd=tmp_path).stdout.split()
    assert int(told[0]) != os.getsid(0)
    assert told[1:] == [str(tmp_path.resolve()), str(os.geteuid())]
    assert psutil.Process().is_running()
