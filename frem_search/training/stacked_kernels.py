"""Convolution, normalization, pooling and concatenation of stacked members, with the members' channels side by side.

torch.vmap has rules of its own for them, but lays each result out anew, splits batch normalization into several passes
and cannot normalize half-precision features by single-precision statistics. Here images stay (b, h, w, members * c) in
memory from layer to layer, as a grouped convolution wants them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class SideBySide(TorchFunctionMode):
    """Inside it, torch.vmap over members takes our kernels; networks are written as for one member."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what `func` returns, for each member."""
        return KERNELS.get(func, func)(*args, **(kwargs or {}))


class _Stacked(torch.autograd.Function):
    """A function of tensors, and how it is computed for all members at once; autograd goes through the latter."""

    @staticmethod
    def forward(function: Callable[..., Tensor], _: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """Return the result where no tensor differs between members: of the images alone, which have no gradient."""
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing; PyTorch asks for this method."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], _: Any, kernel: Callable[..., Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        """Return the result of all members, and which of its dimensions is theirs."""
        moved = [
            t if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return kernel(info.batch_size, [dim is not None for dim in in_dims[2:]], *moved), 0


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    def kernel(n: int, differs: list[bool], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The same images for all: one convolution to all members' channels, without groups.
        is_shared = not differs[0] and groups == 1
        y = torch.conv2d(
            x if is_shared else _join(_each(x, n, differs[0])),
            _each(weight, n, differs[1]).flatten(0, 1),
            None if bias is None else _each(bias, n, differs[2]).flatten(),
            stride, padding, dilation, 1 if is_shared else n * groups,
        )  # fmt: skip
        return _split(y, n)

    return _Stacked.apply(
        lambda x, weight, bias: torch.conv2d(x, weight, bias, stride, padding, dilation, groups),
        kernel, x, weight, bias,
    )  # fmt: skip


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,  # noqa: FBT001, FBT002 PyTorch's
) -> Tensor:  # fmt: skip
    def kernel(n: int, differs: list[bool], x: Tensor, *others: Tensor | None) -> Tensor:
        # view and not flatten: a copy of the running statistics would be updated instead of them.
        flat = [None if t is None else _each(t, n, d).view(-1) for t, d in zip(others, differs[1:], strict=True)]
        return _split(nn.functional.batch_norm(_join(_each(x, n, differs[0])), *flat, training, momentum, eps), n)

    return _Stacked.apply(
        lambda *tensors: nn.functional.batch_norm(*tensors, training, momentum, eps),
        kernel, x, running_mean, running_var, weight, bias,
    )  # fmt: skip


def _max_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def kernel(n: int, _: list[bool], x: Tensor) -> Tensor:
        return _split(torch.max_pool2d(_join(x), *args, **kwargs), n)

    return _Stacked.apply(lambda x: torch.max_pool2d(x, *args, **kwargs), kernel, x)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    if dim != 1 or tensors[0].ndim != 4:
        return torch.cat(tensors, dim)

    def kernel(n: int, differs: list[bool], *tensors: Tensor) -> Tensor:
        each = [_each(t, n, d).permute(1, 3, 4, 0, 2) for t, d in zip(tensors, differs, strict=True)]
        return torch.cat(each, dim=-1).permute(3, 0, 4, 1, 2)

    return _Stacked.apply(lambda *tensors: torch.cat(tensors, dim), kernel, *tensors)


KERNELS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    nn.functional.batch_norm: _batch_norm,
    torch.max_pool2d: _max_pool2d,
    torch.cat: _cat,
}


def _each(x: Tensor, n: int, differs: bool) -> Tensor:  # noqa: FBT001
    return x if differs else x.expand(n, *x.shape)


def _join(x: Tensor) -> Tensor:
    """Return (b, n * c, h, w) of (n, b, c, h, w), without a copy if it lies in memory so already."""
    return x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _split(x: Tensor, n: int) -> Tensor:
    """Return (n, b, c, h, w) of (b, n * c, h, w), the same memory."""
    return x.unflatten(1, (n, -1)).movedim(1, 0)
