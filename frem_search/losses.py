"""Losses: functions of a network's output, the labels and coefficients that a study may search."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor, nn

from frem_search.output import Output


def softmax_cross_entropy(
    output: Output, target: Integer[Tensor, "b h w"], coefficients: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """Return the mean over all pixels of the negative logarithm of the true class's softmax probability.

    With auxiliary logits it is ``(1 - lambda) * main + lambda * auxiliary``.

    Source: "Cell Image Segmentation by Feature Random Enhancement Module", section 4.3, eq. 1.
    Differs: nothing.

    >>> import torch
    >>> target = torch.zeros(1, 2, 2, dtype=torch.long)
    >>> round(softmax_cross_entropy(Output(torch.zeros(1, 2, 2, 2)), target, {}).item(), 4)  # log(2)
    0.6931
    """
    main = _cross_entropy(output.logits, target)
    if output.auxiliary is None:
        return main
    weight = coefficients["lambda"]
    return (1 - weight) * main + weight * _cross_entropy(output.auxiliary, target)


def _cross_entropy(logits: Float[Tensor, "b k h w"], target: Integer[Tensor, "b h w"]) -> Float[Tensor, ""]:
    # At least single precision: three digits of bfloat16 would hide a late epoch's progress. Reduced by mean() as
    # cross_entropy's own sum over pixels is atomic on CUDA, so that its last bits differ from time to time.
    logits = logits if logits.element_size() >= 4 else logits.float()
    return nn.functional.cross_entropy(logits, target.long(), reduction="none").mean()


class Loss(NamedTuple):
    """A loss and the coefficients that a study may set.

    Args:
        function: Takes a network's output, labels and the coefficients by name.
        coefficients: Each coefficient's value where a study sets none.
    """

    function: Callable[[Output, Tensor, Mapping[str, Tensor]], Tensor]
    coefficients: Mapping[str, float]


LOSSES: dict[str, Loss] = {
    # Between the two values that TPE found for SuperVision: 0.3257 on mouse and 0.2781 on Drosophila (section 4.3).
    "softmax_cross_entropy": Loss(softmax_cross_entropy, {"lambda": 0.3}),
}
