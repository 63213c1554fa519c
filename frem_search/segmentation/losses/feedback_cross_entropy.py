"""The loss of a network that answers twice."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses.weighted_cross_entropy import balanced
from frem_search.segmentation.output import Output


def feedback_cross_entropy(output: Output, batch: Batch, coefficients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return ``lambda * first + second``: class-weighted cross entropies of the auxiliary and of the final logits.

    In test there are only the final ones.

    Source: "Feedback U-net for Cell Image Segmentation", section 3.2, eq. 1-2; class weights: section 4.2.
    Differs: the sums of eq. 1 are means over all pixels, which scales both rounds alike; class weights are those of
        `weighted_cross_entropy`.

    >>> import torch
    >>> batch = Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8), None, torch.ones(2))
    >>> output = Output(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    >>> round(feedback_cross_entropy(output, batch, {"lambda": torch.tensor(0.5)}).item(), 4)  # 1.5 * log(2)
    1.0397
    """
    if output.auxiliary is None:
        return balanced(output.logits, batch)
    return coefficients["lambda"] * balanced(output.auxiliary, batch) + balanced(output.logits, batch)  # eq. 2
