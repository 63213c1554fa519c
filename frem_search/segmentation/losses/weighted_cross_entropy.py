"""Softmax cross entropy in which rare classes count more."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses.pixels import pixel_cross_entropy
from frem_search.segmentation.output import Output


def weighted_cross_entropy(
    output: Output,
    batch: Batch,
    coefficients: Mapping[str, Tensor],  # noqa: ARG001 every loss is called alike
) -> Float[Tensor, ""]:
    """Return the mean over all pixels of the cross entropy times the weight of the true class.

    Source: "Feedback U-net for Cell Image Segmentation", section 4.2, for the U-Net that it compares with.
    Differs: the paper only says that class weights are used, in Keras. They are taken as "balanced", pixels over
        classes times pixels of the class, and as in Keras divided by the number of pixels, not by the weights' sum.

    >>> import torch
    >>> label = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    >>> batch = Batch(torch.zeros(1, 1, 1, 2), label, class_weights=torch.tensor([0.5, 2]))
    >>> round(weighted_cross_entropy(Output(torch.zeros(1, 2, 1, 2)), batch, {}).item(), 4)  # (0.5 + 2) / 2 * log(2)
    0.8664
    """
    return balanced(output.logits, batch)


def balanced(logits: Float[Tensor, "b k h w"], batch: Batch) -> Float[Tensor, ""]:
    """Return the class-weighted mean cross entropy of some logits."""
    assert batch.class_weights is not None, "training images have class weights"
    return (pixel_cross_entropy(logits, batch.label) * batch.class_weights[batch.label.long()]).mean()
