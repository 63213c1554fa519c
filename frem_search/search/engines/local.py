"""Worker processes on this machine."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from frem_search.errors import UsageError
from frem_search.search.engines.team import End, Team
from frem_search.storage.database import Storage
from frem_search.system.cores import n_cores
from frem_search.system.device import visible_gpus
from frem_search.system.processes import PARENT, how_it_ended


def local_workers(
    arguments: Sequence[str],
    devices: Sequence[str],
    *,
    storage: Storage,
    study: str,
    environment: Mapping[str, str],
    is_stopping: Callable[[], bool],
    tell: Callable[[str], None] = lambda _: None,
) -> Team:
    """Return workers of one study as processes of this machine, which stop when this one is gone, whatever ended it.

    Args:
        arguments: Of `frem-search worker`, without --device.
        devices: One for each worker.
        storage: As `Team` takes it.
        study: As `Team` takes it.
        environment: Variables of the workers beside our own.
        is_stopping: As `Team` takes it.
        tell: As `Team` takes it.
    """
    shared = {**os.environ, **environment, **share_of_cores(len(devices)), PARENT: str(os.getpid())}
    starts = []
    for device in devices:
        seen, of_gpu = alone_on(device)
        starts.append(partial(_Process, [*arguments, "--device", seen], device, {**shared, **of_gpu}))
    return Team(starts, storage=storage, study=study, is_stopping=is_stopping, tell=tell)


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
        self._stderr.seek(0)
        return End(*how_it_ended(status, self._stderr.read()))

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

    Raises:
        UsageError: There are more devices than workers.

    >>> devices_of("cuda:0,cuda:1", 3)
    ['cuda:0', 'cuda:1', 'cuda:0']
    """
    names = [name.strip() for name in device.split(",") if name.strip()] or ["auto"]
    if workers is not None and len(names) > workers:
        message = f"--device: expected at most one for each of --workers {workers}, but got {', '.join(names)}."
        raise UsageError(message)
    if names == ["auto"] and len(gpus := visible_gpus()) > 1:
        names = [f"cuda:{i}" for i in range(len(gpus))]
    return [names[i % len(names)] for i in range(workers or len(names))]


def alone_on(device: str) -> tuple[str, Mapping[str, str]]:
    """Return the name of a GPU for a worker that sees no other, and the variable that hides the others from it.

    So a worker may have any part of a GPU, and none takes memory on another's.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isdecimal() or int(index) >= len(gpus := visible_gpus()):
        return device, {}
    return "cuda:0", {"CUDA_VISIBLE_DEVICES": gpus[int(index)]}
