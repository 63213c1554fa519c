"""Which device to train on, and in which precision."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frem_search.errors import DeviceError, DeviceMemoryError, UsageError

# PyTorch's own allocator on a GPU has a type for it; that on the CPU, the driver and CUDA's libraries say it in words.
NO_MEMORY = ("DefaultCPUAllocator: ", "error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
LAUNCH_FAILED = "_STATUS_EXECUTION_FAILED"  # cuBLAS and cuDNN: a kernel did not run, theirs or one before it


def find_device(name: str = "auto") -> torch.device:
    """Return the device of a name; `auto` is the first CUDA device if there is one.

    Raises:
        UsageError: It is no name of a device.
        DeviceError: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not (named := re.fullmatch(r"cuda(?::([0-9]{1,9}))?", name)):
        message = f"--device: expected auto, cpu, cuda or cuda:N, but got {name!r}."
        raise UsageError(message)
    index = int(named[1] or 0)
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= n_devices:
        message = (
            f"--device {name}: this machine has {n_devices} CUDA device(s) that PyTorch can use. "
            "Choose another, or cpu; `frem-search doctor` says what is wrong."
        )
        raise DeviceError(message)
    return torch.device("cuda", index)


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
    """Whether an error says that there is no memory left, on the device or beside it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def is_of_device(error: BaseException) -> bool:
    """Whether an error is the device's, so that it tells nothing of the code that met it: no memory, or a failure."""
    if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return True
    return isinstance(error, RuntimeError) and LAUNCH_FAILED in str(error)


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Raise an error of the device as one of ours, and every other as it is.

    Args:
        device: On which the block computes.

    Raises:
        DeviceMemoryError: It has no memory left.
        DeviceError: It failed. CUDA repeats most failures for as long as the process lives, whatever it is asked.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_of_device(error):
            raise
        reason = (str(error).partition("\n")[0] or type(error).__name__).removesuffix(".")
        if is_out_of_memory(error):
            message = f"{device}: out of memory: {reason}."
            raise DeviceMemoryError(message) from None
        message = (
            f"{device}: failed: {reason}. This process cannot use it any more: run the same command again. If it fails "
            "again, look for the cause with nvidia-smi and in the kernel's log."
        )
        raise DeviceError(message) from None


def best_precision(device: torch.device) -> str:
    """Return `bf16` where the device computes in it natively, else `fp32`.

    Never fp16: FREM's X of 10,000 leaves its range. What it gains is measured in docs/benchmarks.md.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them."""
    n_seen = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(i) for i in range(n_seen)]
    ids = [name.strip() for name in visible.split(",") if name.strip()]
    # A process sees one part of a GPU at most, however many are named; of whole ones those before the first wrong name.
    return ids if n_seen and ids[0].startswith("MIG-") else ids[:n_seen]
