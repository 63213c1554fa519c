"""Worker processes on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from frem_search.launch.team import End, Team
from frem_search.processes import PARENT
from frem_search.storage import Storage
from frem_search.training.layouts import n_cores


def local_workers(
    arguments: Sequence[str],
    devices: Sequence[str],
    *,
    storage: Storage,
    study: str,
    environment: Mapping[str, str],
    is_stopping: Callable[[], bool],
) -> Team:
    """Return workers of one study as processes of this machine, which stop when this one is gone, whatever ended it.

    Args:
        arguments: Of `frem-search worker`, without --device.
        devices: One for each worker.
        storage: As `Team` takes it.
        study: As `Team` takes it.
        environment: Variables of the workers beside our own.
        is_stopping: As `Team` takes it.
    """
    settings = {**os.environ, **environment, **share_of_cores(len(devices)), PARENT: str(os.getpid())}
    starts = [partial(_Process, [*arguments, "--device", device], device, settings) for device in devices]
    return Team(starts, storage=storage, study=study, is_stopping=is_stopping)


class _Process:
    """A worker process, and what it writes to stderr."""

    def __init__(self, arguments: Sequence[str], place: str, environment: Mapping[str, str]) -> None:
        self.place = "this machine" if place == "auto" else place
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 read when the worker is gone
        # A session of its own: Ctrl-C comes to us alone, and we tell the workers once.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frem_search", "worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
            env=environment,
        )

    def end(self) -> End | None:
        status = self._process.poll()
        if status is None:
            return None
        if status < 0:
            return End(None, signal.Signals(-status).name)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return End(status, lines[-1] if lines else "no message")

    def is_waiting(self) -> bool:
        return False

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


def share_of_cores(n: int) -> Mapping[str, str]:
    """Return the variable that gives each of n workers its share of the cores, unless somebody has set it.

    More threads than cores wait for each other at the end of every kernel.
    """
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, n_cores() // n))}


def devices_of(device: str, workers: int | None) -> list[str]:
    """Return a device for each worker: those of a list with commas between in turn, by default one for each.

    >>> devices_of("cuda:0,cuda:1", 3)
    ['cuda:0', 'cuda:1', 'cuda:0']
    """
    names = [name.strip() for name in device.split(",") if name.strip()] or ["auto"]
    if names == ["auto"] and torch.cuda.device_count() > 1:
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(workers or len(names))]
