"""The embedded PostgreSQL: started with the first command that needs it, stopped with the last one that leaves."""

import errno
import fcntl
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import sqlalchemy as sa

from frem_search.errors import StorageError
from frem_search.storage.embedded import place, server, sockets
from frem_search.storage.embedded.account import Account, account_for, behind_links
from frem_search.storage.embedded.server import Postmaster, StartError, StartTimeoutError
from frem_search.system.home import home
from frem_search.system.signals import signals_held_back, signals_ignored

DEATH_TIMEOUT_S = 2.0
LITTLE_SPACE_MB = 100  # a new database takes 40 MB
NO_SPACE = re.compile("No space left on device|Disk quota exceeded")
NO_NAME = "could not look up effective user ID"  # initdb's words
OPEN = "has invalid permissions"  # postgres's words of a data folder that others may enter


@contextmanager
def embedded_postgres() -> Iterator[sa.URL]:
    """Start the server of FREM_SEARCH_HOME, or join it; the last one to leave stops it.

    Raises:
        StorageError: The server cannot be started.
    """
    try:
        if place.undecided():
            _decide()
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
    data, account, users, turn = _open(data)
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


def _open(path: Path) -> tuple[Path, Account, IO[str], IO[str]]:
    """Return data folder, who runs its server, and files whose locks say who uses it, and who may start or stop it."""
    data = behind_links(path)
    if "\n" in str(data):
        message = f"{data}: a database's path cannot have line breaks. Set FREM_SEARCH_HOME to another folder."
        raise StorageError(message)
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        if data.exists() and not data.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{data.name} is not a folder")
        account = account_for(data)
        with ExitStack() as opened:
            locks = (_open_lock(data.with_name(f"{data.name}.{name}")) for name in ("users", "lock"))
            users, turn = (opened.enter_context(lock) for lock in locks)
            opened.pop_all()
    except OSError as error:
        is_link = data != path.parent.resolve() / path.name
        raise StorageError(_not_written(data.parent, error, link=path if is_link else None)) from None
    return data, account, users, turn


def _not_written(folder: Path, error: OSError, *, link: Path | None = None) -> str:
    remedy = f"Let the link {link} lead into" if link else "Set FREM_SEARCH_HOME to"
    return f"{folder}: cannot be written: {error.strerror}. {remedy} a folder of yours."


def _open_lock(path: Path) -> IO[str]:
    # Others may not open the file: whoever can may hold the lock for ever. Root gives it to the home's owner.
    folder = path.parent.stat()
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            os.fchown(opened, folder.st_uid, folder.st_gid)
    except FileExistsError:
        opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        status = os.fstat(opened)
        if status.st_uid not in (0, os.geteuid(), folder.st_uid):
            os.close(opened)
            message = (
                f"{path}: expected a file of this user, of root or of user {folder.st_uid}, whose folder it lies in, "
                f"but got one of user {status.st_uid}, who could hold its lock for ever. Remove it, or set "
                "FREM_SEARCH_HOME to a folder that nobody else may change."
            )
            raise StorageError(message) from None
        if status.st_nlink == 1:  # a hard link may be another user's file, so its mode stays
            os.fchmod(opened, 0o600)
    return os.fdopen(opened, "r+")


def _start(data: Path, account: Account, users: IO[str]) -> Postmaster:
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
        socket = sockets.socket_in(running.socket_folder, running.port)
        why = (
            "other users of this machine can reach or replace this socket" if socket.exists() else "the socket is gone"
        )
        message = (
            f"{socket}: a server runs on {data}, but {why}. End the commands that use it, so that it can be started "
            "anew."
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
    # A user namespace may lack that user's number; a network disk may refuse to change owners.
    if number in (errno.EPERM, errno.EINVAL) and not account.is_ours:
        return (
            f"Root may not act as user {account.uid} here, or give files to it. Run frem-search as another user, set "
            f"FREM_SEARCH_HOME to a folder on a local disk, or {own_server}"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Set FREM_SEARCH_HOME to a folder of yours."
    if OPEN in str(error):
        return f"Close it to other users: chmod 700 {shlex.quote(str(data))}"
    if NO_NAME in str(error):
        return f"Give user {account.uid} a name in /etc/passwd, or {own_server}"
    look = f"See {data / 'log'}, or" if (data / "log").exists() else "Mend that, or"
    if isinstance(error, StartTimeoutError):
        return f"{look} try once more when the machine has less to do, or {own_server}"
    return f"{look} {own_server}"


def _decide() -> None:
    """Remember which database is this home's; of commands that start at once, one decides for all."""
    home().mkdir(parents=True, exist_ok=True)
    with _open_lock(place.file().with_name(f"{place.file().name}.lock")) as lock, _locked(lock):
        if rivals := place.undecided():
            place.decide(_choose(rivals))


def _choose(rivals: list[Path]) -> Path:
    """Return the database of this home among those of earlier versions: one with studies, of several the last used."""
    if len(rivals) == 1:
        return rivals[0]
    try:
        uses = {data: _use(data) for data in rivals}
    except StorageError as error:
        message = (
            f"{error} It was started because this home has two databases, {rivals[0]} and {rivals[1]}, and the one "
            f"with studies is looked for. To choose one yourself, write {place.NAME} into {place.file()} for the "
            f"first, or {rivals[1]} for the second."
        )
        raise StorageError(message) from None
    chosen = max(rivals, key=lambda data: (uses[data][0] > 0, uses[data][1]))
    for other in rivals:
        if other != chosen:
            logging.getLogger(__name__).warning(
                "%s is the database of this home, with %d studies; %s, with %d, is another one of an earlier version "
                "and is left alone.",
                chosen, uses[chosen][0], other, uses[other][0],
            )  # fmt: skip
    return chosen


def _use(data: Path) -> tuple[int, datetime]:
    """Return how many studies a database has, and when its last trial began: to look at it changes its files' times."""
    with serve(data) as url:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            if connection.scalar(sa.text("SELECT to_regclass('studies')")) is None:
                return 0, datetime.min
            n_studies = connection.scalar(sa.text("SELECT count(*) FROM studies"))
            began = connection.scalar(sa.text("SELECT max(datetime_start) FROM trials"))
            return int(n_studies or 0), began or datetime.min


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
