"""How many workers have room on the nodes of a cluster, and what each of them gets."""

from collections.abc import Sequence
from dataclasses import dataclass

from frem_search.errors import UsageError


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, as its scheduler counts it.

    Args:
        address: By which others reach it.
        cpus: How many CPUs it lends.
        gpus: How many GPUs it lends.
    """

    address: str
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What to ask a cluster for.

    Args:
        n: How many workers.
        cpus: CPUs of each.
        gpus: GPUs of each; a part of one is shared.
    """

    n: int
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """The device of a worker, who sees nothing but its own GPU."""
        return "cuda:0" if self.gpus else "cpu"


def plan(nodes: Sequence[Node], *, device: str, workers: int | None, gpus_per_worker: float | None) -> Plan:
    """Return what to ask for: by default a worker for each GPU; on the CPU one for each node.

    Args:
        nodes: The cluster as it is now; nodes may join later.
        device: `auto`, `cpu` or `cuda`.
        workers: How many, if that is given.
        gpus_per_worker: A part of a GPU, or a whole one.

    Raises:
        UsageError: That cannot be asked for.

    >>> plan([Node("a", 8, 2)], device="auto", workers=None, gpus_per_worker=0.5)
    Plan(n=4, cpus=1, gpus=0.5)
    >>> plan([Node("a", 8), Node("b", 8)], device="auto", workers=None, gpus_per_worker=None)
    Plan(n=2, cpus=8, gpus=0.0)
    """
    if device not in ("auto", "cpu", "cuda"):
        message = f"--device: with --engine ray expected auto, cpu or cuda, as Ray chooses the GPU, but got {device!r}."
        raise UsageError(message)
    if gpus_per_worker is not None and not 0 < gpus_per_worker <= 1:
        message = (
            f"--gpus-per-worker: expected more than 0 and at most 1, but got {gpus_per_worker:g}. A worker trains on "
            "one GPU; for none use --device cpu."
        )
        raise UsageError(message)
    wants_gpu = gpus_per_worker is not None or any(node.gpus for node in nodes)
    if device == "cpu" or (device == "auto" and not wants_gpu):
        n = workers or len(nodes)
        return Plan(n, _share_of_cpus(nodes, n), 0.0)
    gpus = gpus_per_worker or 1.0
    n = workers or room(nodes, cpus=1, gpus=gpus)
    if not n:
        message = (
            "--device: the cluster has no GPU to lend now. Give --workers N to wait for nodes that join, or use "
            "--device cpu."
        )
        raise UsageError(message)
    return Plan(n, 1, gpus)


def room(nodes: Sequence[Node], *, cpus: int, gpus: float = 0.0) -> int:
    """Return how many workers fit on the nodes, each whole on one.

    >>> room([Node("a", 4, 1), Node("b", 4)], cpus=2), room([Node("a", 4, 1), Node("b", 4)], cpus=1, gpus=0.25)
    (4, 4)
    """
    # Whole GPUs first: a worker cannot have a half of each of two.
    return sum(min(int(node.cpus // cpus), int(1 / gpus) * int(node.gpus) if gpus else 10**6) for node in nodes)


def _share_of_cpus(nodes: Sequence[Node], n: int) -> int:
    """Return the most CPUs that n workers can have each; 1 if not all of them fit now."""
    most = int(max((node.cpus for node in nodes), default=1))
    return next((cpus for cpus in range(most, 1, -1) if room(nodes, cpus=cpus) >= n), 1)
