"""One PostgreSQL server on one data folder: made, started, found, stopped. Who uses it is not known here."""

import glob
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from frem_search.storage.embedded import sockets
from frem_search.storage.embedded.account import Account
from frem_search.storage.embedded.programs import MAJOR, programs_for

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
ORPHANS_TIMEOUT_S = 20.0  # children of a killed server notice its death at once, unless they write much
POLL_INTERVAL_S = 0.01
COMPLAINT = re.compile(r"\b(error|FATAL|PANIC): +\S")
WHEN = re.compile(r"^[\d-]+ [\d:.]+ \w+ \[\d+\] ")  # what a log's line begins with
# The data folder as its server sees it, which works in there: its user need not be able to enter the folders above, and
# the server has its own socket still when the folder was moved and another lies at the old path.
OWN_FOLDER = Path("/proc/self/cwd")
# The shell ends at once, so that the server is not a child of this process, which would have to wait for its end.
LAUNCH = 'umask 077; "$@" </dev/null >>log 2>&1 & echo $!'


class StartError(Exception):
    """Why there is no server, in PostgreSQL's own words where it has any."""


class StartTimeoutError(StartError):
    """A server came up and did not get ready.

    Args:
        process: Its first process.
    """

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        super().__init__(f"it was not ready in {START_TIMEOUT_S:.0f} s")


@dataclass(frozen=True)
class Postmaster:
    """A server that runs, as its file `postmaster.pid` tells.

    Args:
        process: Its first process.
        port: Part of the socket's name.
        socket_folder: Where the socket lies.
        is_ready: Whether it takes connections.
    """

    process: psutil.Process
    port: int
    socket_folder: Path
    is_ready: bool


def find_running(data: Path) -> Postmaster | None:
    """Return the server that runs on a data folder, if it is one of this machine's."""
    lines = _pid_file(data)
    try:
        process = psutil.Process(int(lines[0]))
        if process.name() != "postgres" or not _works_in(process, data):
            return None
    except (IndexError, ValueError, psutil.Error):
        return None
    lines += [""] * 8  # the server writes it line by line
    port = int(lines[3] or sockets.PORT)
    # Without /proc the path is the one of the start, and the folder may have been moved since.
    is_inside = lines[4] in ("", str(OWN_FOLDER)) or sockets.socket_in(data, port).exists()
    return Postmaster(process, port, data if is_inside else Path(lines[4]), lines[7] == "ready")


def make_database(data: Path, account: Account) -> None:
    """Make an empty database; its folder is there when it is whole, whatever ends this process meanwhile.

    Raises:
        StartError: initdb failed.
    """
    new = data if _must_keep(data) else _new_beside(data)
    _give(new, account)
    # Sorted by bytes, and not by a library of this machine: a home may go to another one.
    locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
    program = programs_for(account) / "initdb"
    ended = account.run([program, "--auth=trust", *locale, "-U", "postgres", "-D", _seen(new)], cwd=new)
    if ended.returncode != 0:
        raise StartError(_complaint(ended.stderr, new, otherwise=0) or f"initdb ended with status {ended.returncode}")
    if new != data:
        new.rename(data)
        _sync(data.parent)


def start(data: Path, account: Account) -> Postmaster:
    """Start a server, and return it when it takes connections.

    Raises:
        StartError: It does not start.
    """
    if (version := (data / "PG_VERSION").read_text().strip()) != MAJOR:
        message = f"expected a database of PostgreSQL {MAJOR}, but got one of {version}"
        raise StartError(message)
    log = data / "log"
    length = log.stat().st_size if log.exists() else 0
    folder = sockets.choose_folder(data, account)
    launched = account.run(["/bin/sh", "-c", LAUNCH, "sh", *_command(data, account, folder)], cwd=data)
    process = None
    with suppress(ValueError, psutil.NoSuchProcess):  # the shell failed, or the server has ended
        process = psutil.Process(int(launched.stdout))
    if process is not None and (running := wait_until_ready(data, process)) is not None:
        return running
    sockets.remove_folder(folder, account)
    said = log.read_bytes()[length:].decode(errors="replace") if log.exists() else ""
    raise StartError(_complaint(said + launched.stderr, data, otherwise=-1) or "it ended at once and said nothing")


def wait_until_ready(data: Path, process: psutil.Process) -> Postmaster | None:
    """Wait until a server takes connections, which after a crash may take long; None if it ends instead.

    Raises:
        StartTimeoutError: It took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while _works_in(process, data):
        if (running := find_running(data)) is not None and running.is_ready:
            return running
        if time.monotonic() > deadline:
            raise StartTimeoutError(process)
        time.sleep(POLL_INTERVAL_S)
    return None


def stop(process: psutil.Process) -> None:
    """End a server: as PostgreSQL's fast shutdown, then its immediate one, then by force."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        with suppress(psutil.Error):
            process.send_signal(number)
        if comes_true(lambda: has_ended(process), STOP_TIMEOUT_S):
            return


def clear_remains(data: Path, account: Account) -> None:
    """Remove what a server left that a power cut or the kernel ended, where its pid is taken and PostgreSQL stays out.

    The pid may be something else's today, even the server's of another folder, or a zombie's that nobody waits for.

    Raises:
        StartError: Processes of that server are at work still.
    """
    remains = [data / "postmaster.pid", *data.glob(".s.PGSQL.*.lock")]
    if not any(path.exists() for path in remains):
        return
    if not comes_true(lambda: not _processes_in(data), ORPHANS_TIMEOUT_S):
        message = f"a server was killed, and its processes {_processes_in(data)} still work in the folder"
        raise StartError(message)
    lines = _pid_file(data)
    if len(lines) > 4 and lines[4]:
        sockets.remove_folder(Path(lines[4]), account)
    for path in remains:
        path.unlink(missing_ok=True)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, though nobody has waited for it yet."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def comes_true(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for a condition; return whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _pid_file(data: Path) -> list[str]:
    try:
        text = os.fsdecode((data / "postmaster.pid").read_bytes())  # paths need not be UTF-8
        return [line.strip() for line in text.split("\n")]
    except FileNotFoundError:
        return []


def _works_in(process: psutil.Process, data: Path) -> bool:
    # Every process of a server works in its folder; the folder itself is compared, since it may have been moved.
    try:
        if OWN_FOLDER.exists():
            return Path(f"/proc/{process.pid}/cwd").samefile(data)
        return bool(process.cwd() == str(data))
    except (OSError, psutil.Error):
        return False


def _processes_in(data: Path) -> list[int]:
    found = psutil.process_iter(["name"])
    return [each.pid for each in found if each.info["name"] == "postgres" and _works_in(each, data)]


def _must_keep(data: Path) -> bool:
    """Whether a folder cannot be replaced: it is a disk of its own; or it is not empty, which initdb then tells."""
    return data.exists() and (data.is_mount() or any(data.iterdir()))


def _new_beside(data: Path) -> Path:
    for begun in data.parent.glob(f"{glob.escape(data.name)}.begun-*"):
        shutil.rmtree(begun, ignore_errors=True)  # of a process that was killed
    # A new name each time: the initdb of a process that was killed may be at work still.
    return Path(tempfile.mkdtemp(prefix=f"{data.name}.begun-", dir=data.parent))


def _seen(data: Path) -> Path:
    return OWN_FOLDER if OWN_FOLDER.exists() else data


def _command(data: Path, account: Account, socket_folder: Path) -> list[str | Path]:
    seen = _seen(data)
    listens_in = str(seen if socket_folder == data else socket_folder).replace('"', '""')
    settings = {
        "listen_addresses": "",
        "port": sockets.PORT,
        "unix_socket_directories": f'"{listens_in}"',  # a list, divided by commas
        "unix_socket_permissions": "0700",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [programs_for(account) / "postgres", "-D", seen, *options]


def _complaint(said: str, folder: Path, *, otherwise: int) -> str:
    r"""Return the first error among what PostgreSQL's programs said, which the later ones follow from.

    Args:
        said: Lines.
        folder: The data folder that they speak of, under its name in /proc.
        otherwise: Which of them it is if none is called an error.

    >>> said = "2026-11-27 09:00:00.000 UTC [7] FATAL:  no room in /proc/self/cwd\ninitdb: error: failed"
    >>> _complaint(said, Path("/data"), otherwise=-1)
    'FATAL:  no room in /data'
    """
    lines = [WHEN.sub("", line).strip() for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if COMPLAINT.search(line)), lines[otherwise] if lines else "")
    return first.replace(str(OWN_FOLDER), str(folder))


def _give(folder: Path, account: Account) -> None:
    """Hand an empty folder of root to the database's user; what others could have put in its place is not touched."""
    if account.is_ours:
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with os.scandir(opened) as entries:
            is_roots = os.fstat(opened).st_uid == 0 and not any(entries)
        if is_roots:
            os.fchown(opened, account.uid, account.gid)
    finally:
        os.close(opened)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
