"""The distance of a two-class answer from -1 and +1, quadratic near the target and linear far from it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.output import Output


def smooth_l1(
    output: Output,
    batch: Batch,
    coefficients: Mapping[str, Tensor],  # noqa: ARG001 every loss is called alike
) -> Float[Tensor, ""]:
    """Return the mean over all pixels of smooth L1 between x and the target, -1 for class 0 and +1 for class 1.

    Source: "Regularize Network Skip Connections by Gating Mechanisms for Electron Microscopy Image Segmentation",
        section 3.4, eq. 3-4; the targets: section 3.3.
    Differs: the paper's network has one output x in (-1, 1). Ours returns logits of two classes, and x is the
        difference of their probabilities, p1 - p0 = tanh((l1 - l0) / 2): tanh(z) where the logits are -z and z.

    >>> batch = Batch(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, 1]]], dtype=torch.uint8))
    >>> smooth_l1(Output(torch.zeros(1, 2, 1, 2)), batch, {}).item()  # |x - y| = 1 at both pixels
    0.5
    """
    logits = output.logits if output.logits.element_size() >= 4 else output.logits.float()
    ground, cell = logits.unbind(dim=1)
    x = torch.tanh((cell - ground) / 2)
    y = 2 * batch.label.to(x.dtype) - 1
    return nn.functional.smooth_l1_loss(x, y, reduction="none").mean()
