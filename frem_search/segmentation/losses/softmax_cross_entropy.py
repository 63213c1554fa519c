"""Softmax cross entropy, with a share for the auxiliary logits where a network has them."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses.pixels import pixel_cross_entropy
from frem_search.segmentation.output import Output


def softmax_cross_entropy(output: Output, batch: Batch, coefficients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return the mean over all pixels of the negative logarithm of the true class's softmax probability.

    With auxiliary logits it is ``(1 - lambda) * main + lambda * auxiliary``.

    Source: "Cell Image Segmentation by Feature Random Enhancement Module", section 4.3, eq. 1.
    Differs: nothing.

    >>> import torch
    >>> batch = Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))
    >>> round(softmax_cross_entropy(Output(torch.zeros(1, 2, 2, 2)), batch, {}).item(), 4)  # log(2)
    0.6931
    """
    main = pixel_cross_entropy(output.logits, batch.label).mean()
    if output.auxiliary is None:
        return main
    weight = coefficients["lambda"]
    return (1 - weight) * main + weight * pixel_cross_entropy(output.auxiliary, batch.label).mean()
