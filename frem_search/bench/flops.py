"""Floating-point operations: how many a training needs, and how many a second this device can do at best."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from frem_search.bench.plain_loop import PlainLoop
from frem_search.bench.speed import Trainee
from frem_search.system.cores import n_cores

SIDES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices: large enough to occupy every core
N_PRODUCTS = 5  # the fastest one counts


def count_flops(function: Callable[[], object]) -> int:
    """Return the operations of convolutions and matrix products while a function runs; a multiply-add is two.

    >>> count_flops(lambda: torch.zeros(3, 4) @ torch.zeros(4, 5))  # 2 * 3 * 4 * 5
    120
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def image_flops(trainee: Trainee) -> float:
    """Return the operations for one training image: its share of a step, and of the validation after each epoch."""
    loop = PlainLoop(trainee)
    batch = next(iter(loop.train_batches))
    loop.network.train()
    step = count_flops(lambda: loop.step(*batch))
    return step / len(batch[0]) + count_flops(loop.validate) / loop.images_per_epoch


def matmul_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second of a product of two large square matrices, on the CPU by all cores.

    Args:
        device: Where.
        precision: `fp32`, `tf32` or `bf16`.
    """
    side = SIDES[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random, because processors switch fewer transistors for zeros and then run faster than they train.
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=draw).to(device, dtype) for _ in range(2))
    out = torch.empty_like(left)
    with _all_of(device, has_tf32=precision == "tf32"):
        seconds = [_seconds(lambda: torch.mm(left, right, out=out), device) for _ in range(N_PRODUCTS + 1)]
    return 2 * side**3 / min(seconds[1:])


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def _all_of(device: torch.device, *, has_tf32: bool) -> Iterator[None]:
    """Let products use every core of a CPU, and of a GPU TF32 or not; afterwards all is as it was."""
    matmul, n_threads = torch.backends.cuda.matmul, torch.get_num_threads()
    before = matmul.allow_tf32
    try:
        if device.type == "cpu":
            torch.set_num_threads(n_cores())
        matmul.allow_tf32 = has_tf32
        yield
    finally:
        matmul.allow_tf32 = before
        torch.set_num_threads(n_threads)
