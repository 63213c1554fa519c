"""Which device to train on, and in which precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frem_search.errors import DeviceError


def find_device(name: str = "auto") -> torch.device:
    """Return the device of a name; `auto` is the first CUDA device if there is one.

    Raises:
        DeviceError: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        message = f"--device: expected auto, cpu, cuda or cuda:N, but got {name!r}."
        raise DeviceError(message) from None
    if device.type == "cpu":
        return torch.device("cpu")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) >= n_devices:
        message = (
            f"--device {name}: this machine has {n_devices} CUDA device(s) that PyTorch can use. "
            "Choose another, or cpu; `frem-search doctor` says what is wrong."
        )
        raise DeviceError(message)
    return torch.device("cuda", device.index or 0)


def describe_device(device: torch.device) -> str:
    """Return the device's name as its vendor spells it."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    n_threads = torch.get_num_threads()
    return f"cpu, {n_threads} thread{'s' if n_threads > 1 else ''}"


@contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """Let kernels on the CPU use so many threads, or as many as before if that is None, as long as the block runs."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n or before)
        yield
    finally:
        torch.set_num_threads(before)


def make_repeatable(device: torch.device) -> None:
    """Let a device compute the same bits each time, and fp32 with all digits of single precision.

    These are settings of the whole process; the CPU needs none.
    """
    if device.type != "cuda":
        return
    cudnn = torch.backends.cudnn
    # benchmark chooses a kernel by how long it takes, so not always the same, and each adds in an order of its own.
    cudnn.deterministic, cudnn.benchmark = True, False
    # cuDNN's default is TF32, which is fp32 in name only. Whatever runs in bf16 has no use for it.
    # Not fp32_precision, the newer name: where it is set, cudnn.flags() of PyTorch 2.13 raises.
    cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; the CPU's has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def best_precision(device: torch.device) -> str:
    """Return `bf16` where the device computes in it natively, else `fp32`.

    Never fp16: FREM's X of 10,000 leaves its range. What it gains is measured in docs/benchmarks.md.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
