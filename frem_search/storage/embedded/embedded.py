"""The embedded PostgreSQL: started with the first command that needs it, stopped with the last one that leaves."""

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import sqlalchemy as sa

from frem_search.errors import StorageError
from frem_search.storage.embedded import place, server, sockets
from frem_search.storage.embedded.account import Account, account_for
from frem_search.storage.embedded.server import Postmaster, StartError, StartTimeoutError
from frem_search.system.home import home
from frem_search.system.signals import signals_held_back, signals_ignored

DEATH_TIMEOUT_S = 2.0
LITTLE_SPACE_MB = 100  # a new database takes 40 MB
NO_SPACE = re.compile("No space left on device|Disk quota exceeded")
NO_NAME = "could not look up effective user ID"  # initdb's words


@contextmanager
def embedded_postgres() -> Iterator[sa.URL]:
    """Start the server of FREM_SEARCH_HOME, or join it; the last one to leave stops it.

    Raises:
        StorageError: The server cannot be started.
    """
    try:
        if rivals := place.undecided():
            place.decide(_choose(rivals))
        data = place.folder()
    except OSError as error:
        raise StorageError(_not_written(home(), error)) from None
    with serve(data) as url:
        yield url


@contextmanager
def serve(data: Path) -> Iterator[sa.URL]:
    """Start the server of a data folder, or join one that runs; the last one to leave stops it.

    Who uses it is a shared lock on a file: the kernel takes it away from a process that is killed, so that a server
    which a killed command left behind is used and then stopped by the next.

    Raises:
        StorageError: The server cannot be started.
    """
    account, users, turn = _open(data)
    with users, turn:
        running = None
        try:
            # Signals wait while the server starts: else it could run without anybody who stops it.
            with _locked(turn), signals_held_back():
                running = _start(data, account, users)
                fcntl.flock(users, fcntl.LOCK_SH)
            query = {"host": str(running.socket_folder)}
            yield sa.URL.create(
                "postgresql+psycopg2", username="postgres", database="postgres", port=running.port, query=query
            )
        finally:
            if running is not None:
                # While we wait for our turn and stop the server, a second Ctrl-C must not leave it behind.
                with signals_ignored(), _locked(turn):
                    if _is_last(users):
                        _stop(running, account)


def _open(data: Path) -> tuple[Account, IO[str], IO[str]]:
    """Return who runs the server, and two files whose locks say who uses it, and who may start or stop it now."""
    if "\n" in str(data):
        message = f"{data}: a database's path cannot have line breaks. Set FREM_SEARCH_HOME to another folder."
        raise StorageError(message)
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        if data.exists() and not data.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{data.name} is not a folder")
        account = account_for(data)
        users, turn = (_open_lock(data.with_name(f"{data.name}.{name}")) for name in ("users", "lock"))
    except OSError as error:
        raise StorageError(_not_written(data.parent, error)) from None
    return account, users, turn


def _not_written(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be written: {error.strerror}. Set FREM_SEARCH_HOME to a folder of yours."


def _open_lock(path: Path) -> IO[str]:
    # Closed to others, who could hold the lock for ever. Root leaves it to the home's owner.
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            folder = path.parent.stat()
            os.fchown(opened, folder.st_uid, folder.st_gid)
    except FileExistsError:
        opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        if os.fstat(opened).st_nlink == 1:  # nobody's file by another name
            os.fchmod(opened, 0o600)
    return os.fdopen(opened, "r+")


def _start(data: Path, account: Account, users: IO[str]) -> Postmaster:
    data = data.resolve()
    try:
        return _join(data, account, users) or _begin(data, account, users)
    except (OSError, StartError) as error:
        if isinstance(error, StartTimeoutError) and _is_last(users):
            late = server.find_running(data)
            server.stop(error.process)  # nobody else would
            if late is not None:
                sockets.remove_folder(late.socket_folder, account)
        reason = str(error.strerror if isinstance(error, OSError) else error).rstrip(".")
        message = f"{data}: the embedded PostgreSQL does not start: {reason}. {_remedy(error, data, account)}"
        raise StorageError(message) from None


def _join(data: Path, account: Account, users: IO[str]) -> Postmaster | None:
    """Return the server that runs, if there is one and nobody else can get at it."""
    found = server.find_running(data)
    running = server.wait_until_ready(data, found.process) if found else None
    if running is None or sockets.is_closed(running.socket_folder, running.port, account):
        return running
    # Earlier versions let every user of the machine reach a socket that did not fit into the data folder.
    if not _is_last(users):
        message = (
            f"{running.socket_folder}: other users of this machine can reach the database that listens here. End the "
            "commands that use it, so that it can be started anew."
        )
        raise StorageError(message)
    _stop(running, account)
    return None


def _begin(data: Path, account: Account, users: IO[str]) -> Postmaster:
    _remove_remains(data, account, users)
    if not place.holds_database(data):
        server.make_database(data, account)
    return server.start(data, account)


def _remove_remains(data: Path, account: Account, users: IO[str]) -> None:
    """Remove what a killed server left.

    Raises:
        StorageError: Somebody uses the database, and the server is none of this machine's.
    """
    if server.find_running(data) is not None:
        return
    # A process that was killed together with its server holds its lock for some moments more.
    if (data / "postmaster.pid").exists() and not server.comes_true(lambda: _is_last(users), DEATH_TIMEOUT_S):
        message = (
            f"{data}: used from another machine or container, or by commands of this one whose server was killed. "
            "End those commands, or use a server for all of them with --storage."
        )
        raise StorageError(message)
    server.clear_remains(data, account)


def _stop(running: Postmaster, account: Account) -> None:
    server.stop(running.process)
    sockets.remove_folder(running.socket_folder, account)


def _remedy(error: Exception, data: Path, account: Account) -> str:
    number = error.errno if isinstance(error, OSError) else None
    is_full = number in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE.search(str(error))
    if is_full or shutil.disk_usage(data.parent).free < LITTLE_SPACE_MB * 2**20:
        return "Free disk space."
    own_server = "use a server of your own with --storage."
    if number in (errno.EPERM, errno.EINVAL) and not account.is_ours:  # no such number in this user namespace, or disk
        return (
            f"Root may not act as user {account.uid} here, or give files to it. Run frem-search as another user, set "
            f"FREM_SEARCH_HOME to a folder on a local disk, or {own_server}"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Set FREM_SEARCH_HOME to a folder of yours."
    if NO_NAME in str(error):
        return f"Give user {account.uid} a name in /etc/passwd, or {own_server}"
    look = f"See {data / 'log'}, or" if (data / "log").exists() else "Mend that, or"
    if isinstance(error, StartTimeoutError):
        return f"{look} try once more when the machine has less to do, or {own_server}"
    return f"{look} {own_server}"


def _choose(rivals: list[Path]) -> Path:
    """Return the database of this home among those of earlier versions: one with studies, of several the last used."""
    if len(rivals) == 1:
        return rivals[0]
    last_used = {data: (data / "global" / "pg_control").stat().st_mtime for data in rivals}
    n_studies = {data: _n_studies(data) for data in rivals}
    chosen = max(rivals, key=lambda data: (n_studies[data] > 0, n_studies[data] > 0 and last_used[data]))
    for other in rivals:
        if other != chosen:
            logging.getLogger(__name__).warning(
                "%s is the database of this home, with %d studies; %s, with %d, is another one of an earlier version "
                "and is left alone.",
                chosen, n_studies[chosen], other, n_studies[other],
            )  # fmt: skip
    return chosen


def _n_studies(data: Path) -> int:
    with serve(data) as url:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            if connection.scalar(sa.text("SELECT to_regclass('studies')")) is None:
                return 0
            return int(connection.scalar(sa.text("SELECT count(*) FROM studies")) or 0)


def _is_last(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
