"""Bilinear resizing whose gradient is the same each time."""

import torch
from jaxtyping import Float
from torch import Tensor


def resize_bilinear(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Return `x` at another size, as `interpolate(mode="bilinear")` does, by one matrix product for each axis.

    The gradient of `interpolate` is added up atomically on CUDA, in another order each time; a matrix product's is not.

    Args:
        x: What to resize.
        size: Height and width of the result.

    >>> resize_bilinear(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    tensor([[[[0., 1., 3., 4.]]]])
    """
    rows = _shares(x.shape[2], size[0], device=x.device).to(x.dtype)
    columns = _shares(x.shape[3], size[1], device=x.device).to(x.dtype)
    return rows @ (x @ columns.T)


def _shares(n_from: int, n_to: int, *, device: torch.device) -> Float[Tensor, "n_to n_from"]:
    """Return the share of each old pixel in each new one.

    Made anew for each batch: what is made inside torch.vmap and torch.func.grad must not be kept beyond them.
    """
    centres = (torch.arange(n_to, device=device) + 0.5) * (n_from / n_to) - 0.5
    distances = centres.clamp(0, n_from - 1)[:, None] - torch.arange(n_from, device=device)
    return (1 - distances.abs()).clamp(min=0)
