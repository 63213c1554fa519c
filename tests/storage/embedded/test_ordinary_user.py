"""An ordinary user in a home that nobody else may enter, as most users have one."""

import os
import subprocess
import sys

import pytest
from places import REPOSITORY
from strangers import STRANGER, modes, ordinary_user

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'frem-search'; from frem_search.cli import main; main()"]


@pytest.fixture
def user(tmp_path, home):
    """Run the command as an ordinary user: `user("status", FREM_SEARCH_HOME=...)`; `user.account` is who that is."""
    account, beginning = ordinary_user(tmp_path)

    def run(*args, **settings):
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [*beginning, *COMMAND, *args], env=environment | {name: str(value) for name, value in settings.items()},
            capture_output=True, text=True, check=False, cwd="/", timeout=120,
        )  # fmt: skip

    run.account, run.beginning = account, beginning
    return run


@pytest.fixture
def private(home, user):
    """A folder of mode 700 of that user."""
    folder = home / "private"
    folder.mkdir(mode=0o700)
    os.chown(folder, user.account.pw_uid, user.account.pw_gid)
    return folder


@pytest.mark.parametrize("name", ["home", "my long " + "home" * 40])
def test_a_home_in_a_private_folder(private, user, name):
    before = modes(private)
    for _ in range(2):
        told = user("study", "list", "--stored", FREM_SEARCH_HOME=private / name)
        assert told.returncode == 0, told.stderr
        assert told.stderr == ""
    assert modes(private) == before
    data = (private / name / "postgres").stat()
    assert (data.st_uid, data.st_mode & 0o777) == (user.account.pw_uid, 0o700)
    assert not (private / name / "postgres" / "postmaster.pid").exists()


def test_what_root_began_is_named_to_others(home, user, run_cli):
    assert run_cli("study", "list", "--stored").returncode == 0
    told = user("study", "list", "--stored", FREM_SEARCH_HOME=home)
    assert told.returncode == 1
    assert told.stderr.startswith(f"frem-search: {home}/postgres: belongs to user ")
    assert "Run frem-search as root, or set FREM_SEARCH_HOME" in told.stderr


def test_root_looks_into_a_users_home_and_changes_nobodys_rights(private, user, run_cli):
    settings = {"FREM_SEARCH_HOME": private / "home"}
    assert user("study", "list", "--stored", **settings).returncode == 0
    before = modes(*(private / "home").rglob("*"))
    told = run_cli("study", "list", "--stored", **settings)
    assert told.returncode == 0, told.stderr
    after = modes(*(private / "home").rglob("*"))
    assert {path: after[path] for path in before} == before
    assert user("study", "list", "--stored", **settings).returncode == 0


def test_a_link_to_where_the_user_may_not_write_is_told(private, user):
    (private / "postgres").symlink_to("/usr/share/frem-search-data")
    told = user("study", "list", "--stored", FREM_SEARCH_HOME=private)
    assert told.returncode == 1
    assert told.stderr == (
        f"frem-search: /usr/share: cannot be written: Permission denied. Let the link {private}/postgres lead into a "
        "folder of yours.\n"
    )


def test_a_home_in_a_closed_folder_of_others_is_told(home, user):
    (home / "closed").mkdir(mode=0o700)
    told = user("study", "list", "--stored", FREM_SEARCH_HOME=home / "closed" / "home")
    assert told.returncode == 1
    assert "cannot be written: Permission denied. Set FREM_SEARCH_HOME to a folder of yours." in told.stderr
    assert told.stderr.count("\n") == 1


def test_a_user_without_a_name_is_told_why_and_what_to_do(home, user):
    """As `docker run --user` gives one; PostgreSQL's initdb wants a name."""
    folder = home / "nameless"
    folder.mkdir()
    os.chown(folder, STRANGER, STRANGER)
    as_nobody = " ".join(user.beginning)
    beginning = [word.replace(f"={user.account.pw_uid}", f"={STRANGER}") for word in user.beginning]
    assert " ".join(beginning) != as_nobody
    told = subprocess.run(
        [*beginning, *COMMAND, "study", "list", "--stored"], capture_output=True, text=True, check=False, cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "FREM_SEARCH_HOME": str(folder)},
    )  # fmt: skip
    assert told.returncode == 1
    assert f"initdb: could not look up effective user ID {STRANGER}" in told.stderr
    assert f"Give user {STRANGER} a name in /etc/passwd, or use a server of your own with --storage." in told.stderr
    assert "log" not in told.stderr
