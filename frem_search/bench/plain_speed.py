"""How many images a second the plain loop trains, in one process or in several side by side."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from frem_search.bench.plain_loop import PlainLoop
from frem_search.bench.speed import Arrangement, Speed, Trainee, measured_by, peak_memory


def plain_precision(device: torch.device) -> str:
    """Return what single precision means by PyTorch's own settings: TF32 in convolutions on a GPU that has it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "tf32"
    return "fp32"


def measure_plain(trainee: Trainee, arrangement: Arrangement, *, seconds: float) -> Speed:
    """Train by the plain loop, the first epoch not counted; what cannot be trained has no speed.

    Args:
        trainee: What is trained; its precision is not heeded.
        arrangement: In how many processes side by side.
        seconds: For how long at least, after the first epoch.
    """
    return measured_by(_train, trainee, arrangement, seconds=seconds)


def _train(trainee: Trainee, arrangement: Arrangement, seconds: float, wait: Callable[[], Any]) -> Speed:
    if trainee.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainee.device)
    with _own_settings():
        loop = PlainLoop(trainee)
        loop.epoch()
        wait()
        started, n_epochs = time.perf_counter(), 0
        while n_epochs == 0 or time.perf_counter() - started < seconds:
            loop.epoch()  # waits for the device: it returns a number
            n_epochs += 1
        elapsed = time.perf_counter() - started
    return Speed(arrangement, n_epochs * loop.images_per_epoch / elapsed, peak_memory(trainee.device))


@contextmanager
def _own_settings() -> Iterator[None]:
    """Let PyTorch have its own settings; a training of ours in this process has changed them on a GPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = False, True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = before
