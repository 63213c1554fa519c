"""How the members of a cohort share a device. Each layout is a generator that trains until no member is active.

Between two reports the caller may admit and release members; it ends the training by closing the generator.
"""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from frem_search.system.cores import n_cores
from frem_search.training.cohort import Cohort
from frem_search.training.member import EpochReport, Member
from frem_search.training.side_by_side.graphs import Graphed, train_epoch_graphed
from frem_search.training.side_by_side.stacked import stack_key, train_epoch_stacked

Reports = Generator[EpochReport, None, None]
ALONE = "in_turn"  # the layout of a single member


def in_turn(cohort: Cohort) -> Reports:
    """Train the members one after another, an epoch each."""
    while active := cohort.active():
        for member in active:
            if cohort.holds(member):
                yield cohort.train_epoch(member)


def in_threads(cohort: Cohort) -> Reports:
    """Train each member in a thread of its own, as many at a time as there are processor cores.

    Kernels run outside of Python's lock, one core each, so that no core waits for another at the end of every kernel.
    A member's numbers are those that it has alone on one thread, bit for bit. Nobody waits for the slowest.
    """
    running: dict[Future[EpochReport], Member] = {}
    pool = ThreadPoolExecutor(n_cores(), thread_name_prefix="member")
    try:
        while True:
            for future, member in list(running.items()):
                if not cohort.holds(member) and future.cancel():  # one in training is waited for
                    del running[future]
            waiting = [member for member in cohort.active() if member not in running.values()]
            running |= {pool.submit(cohort.train_epoch, member): member for member in waiting}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                member = running.pop(future)
                report = future.result()
                if cohort.holds(member):
                    yield report
    finally:
        pool.shutdown(cancel_futures=True)


def stacked(cohort: Cohort) -> Reports:
    """Train members of equal shapes as one computation, grouped convolutions side by side."""
    while active := cohort.active():
        for members in _groups(active):
            group = [member for member in members if cohort.holds(member)]
            for member, report in zip(group, _train_group(cohort, group), strict=True):
                if cohort.holds(member):
                    yield report


def in_graphs(cohort: Cohort) -> Reports:
    """Train each member by CUDA graphs of its own step and validation, on a stream of its own.

    A graph starts all kernels of a step at once; where those of one member leave the device idle, another's run.
    """
    held: dict[Member, Graphed] = {}
    while active := cohort.active():
        # Whoever has left leaves its graphs' memory first.
        held = {member: held[member] for member in active if member in held}
        for member in active:
            if not cohort.holds(member):
                continue
            try:
                held[member] = held.get(member) or Graphed(cohort, member)
            except Exception as error:  # noqa: BLE001 whatever the code of a network, loss or metric raises
                yield cohort.ended(member, error)
        graphs = [graph for member, graph in held.items() if cohort.holds(member)]
        for graph, report in zip(graphs, train_epoch_graphed(cohort, graphs), strict=True):
            if cohort.holds(graph.member):
                yield report


class Layout(NamedTuple):
    """A way to train members side by side.

    Args:
        function: The generator.
        devices: The types of device on which it can be used.
        is_for_one: Whether it makes sense for a single member.
    """

    function: Callable[[Cohort], Reports]
    devices: tuple[str, ...]
    is_for_one: bool = False


LAYOUTS: dict[str, Layout] = {
    ALONE: Layout(in_turn, ("cpu", "cuda"), is_for_one=True),
    "threads": Layout(in_threads, ("cpu",)),
    "stacked": Layout(stacked, ("cpu", "cuda")),
    "graphs": Layout(in_graphs, ("cuda",), is_for_one=True),
}


def use_cores(layout: str) -> None:
    """Let kernels take one core each where members have threads of their own; a setting of the whole process.

    Elsewhere no more than there are: PyTorch knows nothing of a container's share.
    """
    if layout == "threads":
        torch.set_num_threads(1)
    elif not os.environ.get("OMP_NUM_THREADS") and n_cores() < torch.get_num_threads():
        torch.set_num_threads(n_cores())


def _groups(members: Iterable[Member]) -> list[list[Member]]:
    """Return the members that can be stacked with each other, in the order in which they came."""
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault(stack_key(member), []).append(member)
    return list(groups.values())


def _train_group(cohort: Cohort, group: list[Member]) -> Iterable[EpochReport]:
    if len(group) == 1:  # a stack of one would only cost
        return [cohort.train_epoch(group[0])]
    return train_epoch_stacked(cohort, group)
