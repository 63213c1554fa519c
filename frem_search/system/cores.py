"""How many processor cores this process may use, as containers and schedulers limit them by control groups."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SPIN_COUNT = "1000"  # rounds, a few microseconds
OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def let_waiting_threads_sleep() -> None:
    """Let PyTorch's threads sleep soon while they wait for each other; for this process and those that it starts.

    GNU OpenMP reads the variable when PyTorch is imported. By itself it lets threads of small kernels wait busily for
    a third of a millisecond: where another program needs a core, the one that waits takes it away from the one that is
    waited for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def n_cores() -> int:
    """Return how many processor cores this process may use, at least one.

    A container with half the processor time of eight cores may run on all eight, and has four: of more threads, some
    would always stand still, and the others wait for them at the end of each kernel.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, cpu_quotas())]))


def cpu_quotas() -> Iterator[float]:
    """Yield the limits of this process's cgroup and of those above it, in cores; none where nothing is limited.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max", and scheduler/sched-bwc.rst for version 1.
    """
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = ROOT / "cpu" if controllers else ROOT  # version 2 has one tree, which names no controllers
        # In a container the path may be that outside of it, where nothing lies; its own limit is then at the root.
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(root):
                yield from _quota(each)


def _quota(folder: Path) -> Iterator[float]:
    with suppress(OSError):
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            yield int(quota) / int(period)
    with suppress(OSError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:  # -1: no limit
            yield quota_us / int((folder / "cpu.cfs_period_us").read_text())
