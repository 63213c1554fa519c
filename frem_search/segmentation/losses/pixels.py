"""Softmax cross entropy of every pixel, which several losses weigh and average."""

from jaxtyping import Float, Integer
from torch import Tensor, nn


def pixel_cross_entropy(logits: Float[Tensor, "b k h w"], label: Integer[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Return the negative logarithm of the true class's softmax probability, at least in single precision.

    Callers reduce it by mean(): cross_entropy's own sum over pixels is atomic on CUDA, so that its last bits differ
    from time to time.
    """
    # Three digits of bfloat16 would hide a late epoch's progress.
    logits = logits if logits.element_size() >= 4 else logits.float()
    return nn.functional.cross_entropy(logits, label.long(), reduction="none")
