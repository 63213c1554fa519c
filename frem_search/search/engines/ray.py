"""Workers on a Ray cluster."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from frem_search import __version__
from frem_search.errors import UsageError, WorkerError
from frem_search.search.engines.nodes import Node, Plan
from frem_search.search.engines.ray_actor import Order, Runner
from frem_search.search.engines.team import End, Team
from frem_search.storage.database import Storage
from frem_search.storage.url import normalise_url
from frem_search.study.file import StudyFile
from frem_search.system.signals import STOP_SIGNALS

CONNECT_TIMEOUT_S = 10.0
FORWARDED = ("FREM_SEARCH_", "PG", "OMP_NUM_THREADS")  # beginnings of variables that workers get from here
# Ray kills what an ending actor has started; a worker is to store its trial first, and then leaves by itself.
KEEP_CHILDREN = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}


@contextmanager
def ray_cluster() -> Iterator[list[Node]]:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one here; give its nodes.

    Raises:
        UsageError: Ray is not installed.
        WorkerError: The cluster cannot be reached.
    """
    try:
        import ray
    except ModuleNotFoundError:
        message = (
            '--engine ray: the package ray is missing. Run `pip install "frem-search[ray]"` here and on every node of '
            "the cluster."
        )
        raise UsageError(message) from None
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with redirect_stdout(sys.stderr):  # Ray prints what happens to nodes, and results go to stdout
        try:
            _join(ray)
            # Ray's own handler of SIGTERM exits at once.
            for number, handler in before.items():
                signal.signal(number, handler)
            yield [_node(each) for each in ray.nodes() if each["Alive"]]
        finally:
            ray.shutdown()


def _join(ray: Any) -> None:
    # Else Ray announces at every start how it will treat actors without a GPU one day.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start tells nobody about it
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(address)
        # Without an address: the one of `ray start` on this machine, or a new cluster; a dashboard is only for that.
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        message = (
            f"RAY_ADDRESS: no Ray cluster answers at {address or 'the address of this machine'}: "
            f"{str(error).splitlines()[0]}. Start one with `ray start --head`; without the variable, one of this "
            "machine is joined or started. One that asks for a token needs RAY_AUTH_MODE and RAY_AUTH_TOKEN here too."
        )
        raise WorkerError(message) from None


def _knock(address: str) -> None:
    """See whether somebody listens: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _node(description: dict[str, Any]) -> Node:
    resources = description["Resources"]
    return Node(description["NodeManagerAddress"], resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def check_storage(nodes: Sequence[Node], url: str | None) -> None:
    """Refuse a database that other machines of the cluster could not reach, or whose password would travel openly.

    Raises:
        UsageError: So it is.
    """
    import ray

    elsewhere = ", ".join(sorted({node.address for node in nodes} - {ray.util.get_node_ip_address()}))
    if not elsewhere:
        return
    if not url:
        message = (
            f"--engine ray: the embedded database can be reached from this machine only, but the cluster has "
            f"{elsewhere} too. Set FREM_SEARCH_STORAGE to a PostgreSQL that all nodes reach."
        )
        raise UsageError(message)
    has_password = bool(normalise_url(url).password) or "PGPASSWORD" in os.environ
    if has_password and os.environ.get("RAY_USE_TLS") != "1":
        message = (
            f"--engine ray: the database's password would travel to {elsewhere} for everybody on the network to read. "
            "Put it into a file that each node has, and name that by FREM_SEARCH_PASSWORD_FILE or PGPASSFILE, or start "
            "Ray with RAY_USE_TLS=1."
        )
        raise UsageError(message)


def ray_workers(
    study_file: StudyFile,
    arguments: Sequence[str],
    plan: Plan,
    *,
    storage: Storage,
    environment: Mapping[str, str],
    is_stopping: Callable[[], bool],
    tell: Callable[[str], None],
) -> Team:
    """Return workers on the cluster that was joined; each is in an actor, which finds it a node.

    Args:
        study_file: The study; its text travels to the nodes.
        arguments: Of `frem-search worker`, without --study and --device.
        plan: How many, and what each gets.
        storage: As `Team` takes it.
        environment: Variables of the workers beside those that are forwarded: the database as the nodes reach it.
        is_stopping: As `Team` takes it.
        tell: As `Team` takes it.
    """
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    order = Order(
        version=__version__,
        study=(study_file.path.name, study_file.text),
        arguments=[*arguments, "--device", plan.device],
        environment={**forwarded, **environment},
        folder=str(Path.cwd()),
    )
    starts = [partial(_Seat, order, plan)] * plan.n
    return Team(starts, storage=storage, study=study_file.name, is_stopping=is_stopping, tell=tell)


class _Seat:
    """A worker in an actor of the cluster."""

    def __init__(self, order: Order, plan: Plan) -> None:
        import ray

        self._ray = ray
        actor: Any = ray.remote(Runner)
        self._actor = actor.options(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            scheduling_strategy="SPREAD",
            max_concurrency=3,  # run, and stop beside it
            max_restarts=0,  # whoever is killed is replaced by the team, as long as trials advance
            runtime_env=KEEP_CHILDREN,
        ).remote()
        self._place = self._actor.place.remote()
        self._answer = self._actor.run.remote(order)
        self._end: End | None = None

    @property
    def place(self) -> str:
        try:
            return "Ray, which waits for a node" if self.is_waiting() else self._ray.get(self._place)
        except self._ray.exceptions.RayError:
            return "a node that is gone"

    def end(self) -> End | None:
        if self._end is None and self._is_there(self._answer):
            try:
                self._end = End(*self._ray.get(self._answer))
            except self._ray.exceptions.RayActorError:
                self._end = End(None, f"lost with its node or actor: {self.place}")
            except self._ray.exceptions.RayError as error:
                self._end = End(1, str(error).strip().splitlines()[-1])
        return self._end

    def is_waiting(self) -> bool:
        return not self._is_there(self._place)

    def ask_to_stop(self) -> None:
        if self.is_waiting():
            self.close()
        else:
            self._actor.stop.remote()

    def close(self) -> None:
        self._ray.kill(self._actor)

    def _is_there(self, answer: Any) -> bool:
        return bool(self._ray.wait([answer], timeout=0)[0])
