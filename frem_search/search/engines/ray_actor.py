"""What runs on a node of a Ray cluster: it starts a worker process there and waits for it."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from frem_search import __version__
from frem_search.system.processes import PARENT, how_it_ended


class Order(NamedTuple):
    """What a worker is started with; it travels as an argument, which no page or log of Ray shows.

    Args:
        version: Of frem-search, where the search was started.
        study: Name and text of the study's file, which the node need not have.
        arguments: Of `frem-search worker`, without --study.
        environment: Variables beside the node's own.
        folder: The working directory, where the node has it.
    """

    version: str
    study: tuple[str, str]
    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str


class Runner:
    """A worker process on a node; the process stores its trials and leaves when this one is gone.

    Nothing of the search is imported here: what trains can be killed, and shares no Python with Ray.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False
        self._lock = threading.Lock()

    def place(self) -> str:
        """Return where this is."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{socket.gethostname()}, GPU {gpus}" if gpus else socket.gethostname()

    def run(self, order: Order) -> tuple[int | None, str]:
        """Start the worker and wait for it; return its status, None if it was killed, and its last words."""
        if order.version != __version__:
            return 1, f"expected frem-search {order.version}, as where the search was started, but got {__version__}."
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stderr:
            name, text = order.study
            file = Path(folder) / name
            file.write_text(text, encoding="utf-8")
            with self._lock:
                if self._is_stopping:
                    return 0, ""
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "frem_search", "worker", "--study", str(file), *order.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,  # Ray ends process groups
                    cwd=order.folder if Path(order.folder).is_dir() else folder,
                    env={**os.environ, **order.environment, PARENT: str(os.getpid())},
                )
            status = self._process.wait()
            stderr.seek(0)
            return how_it_ended(status, stderr.read())

    def stop(self) -> None:
        """Let the worker store its trials and go."""
        with self._lock:
            self._is_stopping = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
