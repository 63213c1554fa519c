"""Who a process is, and whether it still lives, as seen from the same machine."""

import os
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
    return Process(socket.gethostname(), *_machine(), pid, _started(pid))


def has_lost_parent() -> bool:
    """Whether this is a worker that another process started, and that process is gone."""
    return PARENT in os.environ and os.environ[PARENT] != str(os.getppid())


def _machine() -> tuple[str, str]:
    """Return what two processes have in common if they can see each other: the boot and the pid namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else f"{socket.gethostname()}-{psutil.boot_time():.0f}"
    namespace = Path("/proc/self/ns/pid")
    return boot, str(namespace.readlink()) if namespace.exists() else ""


def _started(pid: int) -> float:
    """Return when a process started: on Linux in ticks since the boot, which no change of the clock moves."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()


def is_gone(row: Any) -> bool:
    """Whether a lease's process ran on this machine and does no longer."""
    if (row.boot_id, row.pid_namespace) != _machine():
        return False
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and belongs to another user
    try:
        # A process that was killed and not yet waited for by its parent is gone as well.
        is_zombie = psutil.Process(row.pid).status() == psutil.STATUS_ZOMBIE
        return is_zombie or abs(_started(row.pid) - row.pid_started) > 1.0
    except (psutil.Error, OSError):
        return False  # hidden from us, or gone this very moment: the next look tells
