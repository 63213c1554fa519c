"""Who runs PostgreSQL: this user, or a user of its own for root, as whom it refuses to run."""

import os
import pwd
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frem_search.errors import StorageError
from frem_search.storage.embedded.place import holds_database

SYSTEM_USER = "pgserver"
# The server gets no other variables of ours: PG* would change what it does, and its user could read our passwords.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "TZ")


@dataclass(frozen=True)
class Account:
    """A user of this machine whom PostgreSQL's programs are run as.

    Args:
        uid: Of the user.
        gid: The one group that it has.
    """

    uid: int
    gid: int

    @property
    def is_ours(self) -> bool:
        """Whether it is the user of this process."""
        return self.uid == os.geteuid()

    def may_enter(self, folder: Path) -> bool:
        """Whether this user may pass through a folder and all of its parents."""
        return self.is_ours or all(self._has(each.stat(), 0o1) for each in (folder, *folder.parents))

    def may_use(self, path: Path) -> bool:
        """Whether this user may read a folder or run a program, and get there."""
        return self.is_ours or (self.may_enter(path.parent) and self._has(path.stat(), 0o5))

    def run(self, command: Sequence[str | Path], *, cwd: Path) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end as this user, in a session of its own: a Ctrl-C at the terminal is for us alone.

        Args:
            command: The program and its arguments.
            cwd: Where it works. We enter that folder before we become the user, who need not be able to.
        """
        as_user: dict[str, Any] = {} if self.is_ours else {"user": self.uid, "group": self.gid, "extra_groups": ()}
        return subprocess.run(
            [os.fspath(word) for word in command],
            cwd=cwd,
            env={"LC_ALL": "C"} | {name: os.environ[name] for name in PASSED_ON if name in os.environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            start_new_session=True,
            check=False,
            **as_user,
        )

    def _has(self, status: os.stat_result, bits: int) -> bool:
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
        return (status.st_mode >> shift) & bits == bits


def behind_links(data: Path) -> Path:
    """Return the folder that the path of a data folder leads to, so that all who come there have one lock.

    Raises:
        StorageError: Root would follow a link that others could have put there.
    """
    if os.geteuid() == 0 and data.is_symlink():
        _check_roots_own(data)
    return data.resolve()


def account_for(data: Path) -> Account:
    """Return who runs the server of a data folder: whoever owns it; for root, a user of its own where there is none.

    Raises:
        StorageError: The folder belongs to somebody else, or others could have put it there, or root has no other user.
    """
    status = data.stat() if data.exists() else None
    if os.geteuid() != 0:
        if status is not None and status.st_uid != os.geteuid():
            raise StorageError(_not_ours(data, status.st_uid, "belongs to"))
        return Account(os.geteuid(), os.getegid())
    if status is None or status.st_uid == 0:
        if status is not None:
            _check_roots_own(data)
        user = _system_user()
        if holds_database(data):
            message = (
                f"{data}: expected data of user {SYSTEM_USER}, but got data of root, as a copy made by root has them, "
                f"and PostgreSQL refuses to run as root. Give them back: chown -R {SYSTEM_USER}: {data}"
            )
            raise StorageError(message)
        return Account(user.pw_uid, user.pw_gid)
    if not _is_trusted(data.parent.stat(), status.st_uid):
        raise StorageError(_not_ours(data, status.st_uid, "lies where others may put something else, and belongs to"))
    return Account(status.st_uid, status.st_gid)


def _check_roots_own(path: Path) -> None:
    # Root's server takes root's folder for its own, wherever a link leads: nobody else may choose which one that is.
    status, parent = path.lstat(), path.parent.stat()
    if status.st_uid != 0 or not _is_trusted(parent, 0):
        message = (
            f"{path}: expected a folder or link of root in a folder that root alone may change, but got one of user "
            f"{status.st_uid} in a folder of user {parent.st_uid} with mode {parent.st_mode & 0o7777:o}. Set "
            "FREM_SEARCH_HOME to a folder that root alone may change."
        )
        raise StorageError(message)


def _is_trusted(parent: os.stat_result, owner: int) -> bool:
    # The data may have any owner, since our user may have another number in a container that was made anew. But where
    # others may write, they could have put a database of their own there, for root to fill.
    is_open = bool(parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return owner == _uid_of_system_user() or (parent.st_uid in (0, owner) and not is_open)


def _uid_of_system_user() -> int | None:
    try:
        return pwd.getpwnam(SYSTEM_USER).pw_uid
    except KeyError:
        return None


def _system_user() -> pwd.struct_passwd:
    options = ("--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/false")
    if _uid_of_system_user() is None:
        try:
            ended = subprocess.run(["useradd", *options, SYSTEM_USER], capture_output=True, text=True, check=False)
            reason = next(iter(ended.stderr.splitlines()), f"exit status {ended.returncode}")
        except OSError as error:
            reason = f"useradd: {error.strerror}"
        if _uid_of_system_user() is None:  # another command may have been faster
            message = (
                f"PostgreSQL refuses to run as root, and the user {SYSTEM_USER} to run it cannot be made: {reason}. "
                "Make that user, run frem-search as another user, or use a server of your own with --storage."
            )
            raise StorageError(message)
    return pwd.getpwnam(SYSTEM_USER)


def _not_ours(data: Path, owner: int, how: str) -> str:
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    whom = "root" if name == SYSTEM_USER and os.geteuid() != 0 else name
    return f"{data}: {how} user {name}. Run frem-search as {whom}, or set FREM_SEARCH_HOME to a folder of yours."
