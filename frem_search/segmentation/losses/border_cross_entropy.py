"""Softmax cross entropy in which rare classes and the borders between cells count more."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses.pixels import pixel_cross_entropy
from frem_search.segmentation.output import Output


def border_cross_entropy(output: Output, batch: Batch, coefficients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return the mean over all pixels of the cross entropy times the pixel's weight.

    The weight is ``omega_c + omega_0 * exp(-(d1 + d2)**2 / (2 * sigma_border**2))``, with d1 and d2 the distances to
    the nearest and the second nearest cell: large where two cells are near to each other.

    Source: the compressed U-Net's report, "Introduction", its two equations; after Ronneberger et al.,
        arXiv:1505.04597, eq. 1-2.
    Differs: the report's sum over pixels is a mean, which scales the loss alone. omega_c is one over the class's
        frequency in the pixel's image, normalised, as the report says; divided by the greatest of the image's classes,
        as its published code does, so that the rarest class has 1 and omega_0 says how much more a border counts.

    >>> batch = Batch(torch.zeros(1, 1, 1, 4), torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8), torch.zeros(1, 1, 4))
    >>> coefficients = {"omega_0": torch.tensor(2.0), "sigma_border": torch.tensor(5.0)}
    >>> loss = border_cross_entropy(Output(torch.zeros(1, 2, 1, 4)), batch, coefficients)
    >>> round((loss / torch.tensor(2.0).log()).item(), 4)  # (3 * (1/3 + 2) + 1 + 2) / 4
    2.5
    """
    assert batch.border is not None, "a loss with needs_border gets distances"
    near = torch.exp(-batch.border.square() / (2 * coefficients["sigma_border"].square()))
    weights = class_balance(batch.label, n_classes=output.logits.shape[1]) + coefficients["omega_0"] * near
    return (pixel_cross_entropy(output.logits, batch.label) * weights).mean()


def class_balance(label: UInt8[Tensor, "b h w"], *, n_classes: int) -> Float[Tensor, "b h w"]:
    """Return for every pixel one over the frequency of its class in its image, 1 for the image's rarest class.

    >>> class_balance(torch.tensor([[[0, 0, 0, 2]]], dtype=torch.uint8), n_classes=3)
    tensor([[[0.3333, 0.3333, 0.3333, 1.0000]]])
    """
    classes = torch.arange(n_classes, device=label.device)[:, None, None]
    is_class = (label[:, None] == classes).float()  # (b, k, h, w)
    counts = is_class.sum(dim=(2, 3))
    # A class that is not in the image has no pixel to weigh, and must not be its rarest.
    rarest = torch.where(counts > 0, counts, torch.inf).amin(dim=1)
    own = (is_class * counts[:, :, None, None]).sum(dim=1)
    return rarest[:, None, None] / own
