"""What every network returns and every loss and metric takes."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Features(NamedTuple):
    """Magnitudes that FREM's Figs 3 and 9 plot; detached, before enhancement.

    Args:
        bottleneck: Mean absolute value of each bottleneck map over batch and space.
        skip: Mean absolute value of the skip connection that the bottleneck is concatenated with.
    """

    bottleneck: Float[Tensor, " c"]
    skip: Float[Tensor, ""]


class Output(NamedTuple):
    """The result of a network's `forward`.

    Args:
        logits: Unnormalised class scores at the input's size.
        auxiliary: Logits at the input's size for an auxiliary loss, in training only.
        features: Feature magnitudes, in training only.
    """

    logits: Float[Tensor, "b k h w"]
    auxiliary: Float[Tensor, "b k h w"] | None = None
    features: Features | None = None
