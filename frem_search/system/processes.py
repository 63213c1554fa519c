"""Who a process is, and whether it still lives, as seen from the same machine."""

import os
import signal
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

PARENT = "FREM_SEARCH_PARENT"  # in the environment of a worker: the process that started it


@dataclass(frozen=True)
class Process:
    """Who a process is, so that another one on the same machine can tell whether it still lives."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: float


@cache
def this_process() -> Process:
    """Return the identity of this process."""
    pid = os.getpid()
    return Process(socket.gethostname(), *_machine(), pid, _look_at(pid)[1])


def has_lost_parent() -> bool:
    """Whether this is a worker that another process started, and that process is gone."""
    return PARENT in os.environ and os.environ[PARENT] != str(os.getppid())


def _machine() -> tuple[str, str]:
    """Return what two processes have in common if they can see each other: the boot and the pid namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else f"{socket.gethostname()}-{psutil.boot_time():.0f}"
    namespace = Path("/proc/self/ns/pid")
    return boot, str(namespace.readlink()) if namespace.exists() else ""


def _look_at(pid: int) -> tuple[bool, float]:
    """Return whether a process has ended, and when it started: on Linux in ticks since the boot, which no clock moves.

    A process that was killed and not yet waited for by its parent has ended.
    """
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        # Not by psutil, which takes ten times as long: every claim looks at every worker, under the study's lock.
        fields = stat.read_text().rpartition(")")[2].split()
        return fields[0] in "ZX", float(fields[19])
    process = psutil.Process(pid)
    return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD), process.create_time()


def is_gone(row: Any) -> bool:
    """Whether a lease's process ran on this machine and does no longer."""
    mine = this_process()
    if (row.boot_id, row.pid_namespace) != (mine.boot_id, mine.pid_namespace):
        return False
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and belongs to another user
    try:
        has_ended, started = _look_at(row.pid)
    except (psutil.Error, OSError):
        return False  # hidden from us, or gone this very moment: the next look tells
    return has_ended or abs(started - row.pid_started) > 1.0


def how_it_ended(status: int, stderr: bytes) -> tuple[int | None, str]:
    """Return the exit status of a process, None if it was killed, and its last words, which a crash may have too.

    >>> how_it_ended(1, b"frem-search: no space."), how_it_ended(-9, b"measuring"), how_it_ended(-6, b"CUDA error")
    ((1, 'frem-search: no space.'), (None, 'SIGKILL'), (None, 'SIGABRT: CUDA error'))
    """
    lines = stderr.decode(errors="replace").strip().splitlines()
    if status >= 0:
        return status, lines[-1] if lines else "no message"
    number = -status
    name = next((each.name for each in signal.Signals if each == number), f"signal {number}")
    return None, name if number == signal.SIGKILL or not lines else f"{name}: {lines[-1]}"
