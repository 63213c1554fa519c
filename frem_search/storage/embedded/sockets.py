"""Where the server listens: in a folder that its user alone may enter, on a path short enough for a socket."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

from frem_search.errors import StorageError
from frem_search.storage.embedded.account import Account

PORT = 5432
LONGEST_PATH = 100  # bytes; Linux takes 107, macOS 103
SHORT_FOLDER = "frem-search-socket-"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
WRITING_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def socket_in(folder: Path, port: int = PORT) -> Path:
    """Return the path of the socket that a server makes in a folder."""
    return folder / f".s.PGSQL.{port}"


def choose_folder(data: Path, account: Account) -> Path:
    """Return the data folder, or a new one with a short path.

    A new one has a name that nobody could foresee, so that nobody was there before us; `postmaster.pid` tells it to
    those who join the server.

    Raises:
        StorageError: There is no place for such a folder.
    """
    if _fits(data):
        return data
    bases = [Path(each).resolve() for each in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    for base in bases:
        if _fits(base / f"{SHORT_FOLDER}01234567") and _is_safe(base, account):
            folder = Path(tempfile.mkdtemp(prefix=SHORT_FOLDER, dir=base))
            if not account.is_ours:
                os.chown(folder, account.uid, account.gid)
            return folder
    message = (
        f"{data}: its path is too long for a socket, has a comma or is not UTF-8, and neither {bases[0]} nor /tmp is a "
        "short one where nobody else could put another in its place. Set FREM_SEARCH_HOME to a shorter path."
    )
    raise StorageError(message)


def remove_folder(folder: Path, account: Account) -> None:
    """Remove a short folder of ours and what a server that was killed left in it; leave any other folder alone."""
    is_ours = folder.name.startswith(SHORT_FOLDER) and folder.is_dir() and folder.lstat().st_uid == account.uid
    if is_ours:
        shutil.rmtree(folder, ignore_errors=True)  # which follows no link


def is_closed(folder: Path, port: int, account: Account) -> bool:
    """Whether nobody but its user and root can reach a server's socket, or put another one in its place."""
    try:
        around, socket = folder.lstat(), socket_in(folder, port).lstat()
    except OSError:
        return False
    is_private = not around.st_mode & OTHERS or not socket.st_mode & OTHERS
    is_kept = stat.S_ISDIR(around.st_mode) and not around.st_mode & WRITING_OTHERS
    return is_private and is_kept and {around.st_uid, socket.st_uid} == {account.uid}


def _fits(folder: Path) -> bool:
    # libpq takes a comma for the end of a host, and a path with one for two; psycopg2 passes on nothing but UTF-8.
    name = os.fsencode(socket_in(folder))
    return len(name) <= LONGEST_PATH and b"," not in name and name.decode(errors="replace").encode() == name


def _is_safe(base: Path, account: Account) -> bool:
    """Whether nobody else can rename what lies in a folder, and the user may enter it."""
    try:
        ways = [each.stat() for each in (base, *base.parents)]
    except OSError:
        return False
    are_kept = all(
        way.st_uid in (0, os.geteuid()) and (way.st_mode & stat.S_ISVTX or not way.st_mode & WRITING_OTHERS)
        for way in ways
    )
    return are_kept and os.access(base, os.W_OK) and account.may_enter(base)
