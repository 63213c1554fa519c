"""Something done in several processes at the same time, each on one core: to time it under the load of the others."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

T = TypeVar("T")
START_TIMEOUT_S = 120.0  # each process imports PyTorch and trains its first epoch
NOT_TOGETHER = f"not every process had trained its first epoch {START_TIMEOUT_S:.0f} s after the first one had"


def do_abreast(function: Callable[..., T], *args: Any, n: int) -> list[T]:
    """Return what a function returns in each of n processes.

    Args:
        function: Of a module; called with `args` and a function that waits until all of them have called it.
        args: What can be sent to another process.
        n: How many.

    Raises:
        RuntimeError: One of them raised, with type and words of what it was: not every error can be sent.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, mp_context=context, initializer=_begin_process, initargs=(context.Barrier(n),)) as pool:
        results = [each.result() for each in [pool.submit(_call, function, args) for _ in range(n)]]
    if errors := [error for _, error in results if error]:
        raise RuntimeError(min(errors, key=lambda error: error == NOT_TOGETHER))
    return [result for result, _ in results if result is not None]


def _begin_process(barrier: "Barrier") -> None:
    global _barrier  # a barrier reaches a process when it begins, and not with a task
    _barrier = barrier
    torch.set_num_threads(1)


def _call(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T | None, str]:
    assert _barrier is not None
    try:
        return function(*args, lambda: _barrier.wait(START_TIMEOUT_S)), ""
    except BrokenBarrierError:
        return None, NOT_TOGETHER
    except Exception as error:  # noqa: BLE001 whatever a training raises
        _barrier.abort()  # so that nobody waits for this one
        return None, f"{type(error).__name__}: {error}"


_barrier: "Barrier | None" = None
