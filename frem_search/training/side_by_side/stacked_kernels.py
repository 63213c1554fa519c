"""Layers of stacked members, with the members' channels side by side as a grouped convolution wants them.

torch.vmap has rules of its own for these functions, but lays each result out anew, splits batch normalization into
several passes and cannot normalize half-precision features by single-precision statistics. Here features stay
(b, h, w, members, c) in memory from layer to layer.
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
    """A function of tensors and its kernel for all members; gradients are those of what the kernel calls."""

    @staticmethod
    def forward(function: Callable[..., Tensor], kernel: object, *tensors: Tensor | None) -> Tensor:  # noqa: ARG004
        """Return the result where no tensor differs between members: of the images alone, which have no gradient."""
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Keep nothing; PyTorch asks for this method."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        function: object,  # noqa: ARG004
        kernel: Callable[..., Tensor],
        *tensors: Any,
    ) -> tuple[Tensor, int]:
        """Return the result of all members, which is (members, ...)."""
        n = info.batch_size
        first = (
            t if t is None else t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[2:], strict=True)
        )  # fmt: skip
        return kernel(n, *first), 0


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    def one(x: Tensor, weight: Tensor, bias: Tensor | None, times: int = 1) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, times * groups)

    def kernel(n: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
        # Expanded: the same images for all, so that one convolution without groups makes all members' channels.
        is_shared = x.stride(0) == 0 and groups == 1
        return _split(one(x[0], weight, bias) if is_shared else one(_join(x), weight, bias, n), n)

    return _apply(one, kernel, x, weight, bias)


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    def one(*tensors: Tensor | None) -> Tensor:
        return nn.functional.batch_norm(*tensors, *args, **kwargs)  # type: ignore[arg-type]

    def kernel(n: int, x: Tensor, *others: Tensor | None) -> Tensor:
        # view and not flatten: a copy of the running statistics would be updated instead of them.
        return _split(one(_join(x), *(None if t is None else t.view(-1) for t in others)), n)

    return _apply(one, kernel, x, running_mean, running_var, weight, bias)


def _max_pool2d(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    def one(x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, *args, **kwargs)

    return one(x) if kwargs.get("return_indices") else _apply(one, lambda n, x: _split(one(_join(x)), n), x)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    def one(*tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim)

    def kernel(_: int, *tensors: Tensor) -> Tensor:
        return torch.cat([t.permute(1, 3, 4, 0, 2) for t in tensors], dim=-1).permute(3, 0, 4, 1, 2)

    return _apply(one, kernel, *tensors) if dim == 1 and tensors[0].ndim == 4 else one(*tensors)


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    nn.functional.batch_norm: _batch_norm,
    nn.functional.max_pool2d: _max_pool2d,
    torch.cat: _cat,
}


def _apply(one: Callable[..., Tensor], kernel: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    return _Stacked.apply(one, kernel, *tensors)  # type: ignore[no-untyped-call]


def _join(x: Tensor) -> Tensor:
    """Return (b, members * c, h, w) of (members, b, c, h, w), without a copy if it lies in memory so already."""
    return x.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _split(x: Tensor, n: int) -> Tensor:
    """Return (members, b, c, h, w) of (b, members * c, h, w), the same memory."""
    return x.unflatten(1, (n, -1)).movedim(1, 0)
