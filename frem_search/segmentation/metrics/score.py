"""What every metric returns."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Score(NamedTuple):
    """A metric's value, to be maximized, on the device where it was computed.

    Args:
        value: The number that a study searches for.
        per_class: The same for each class, NaN where a class has none.
        loss: The loss of the same images, where it was asked for.
    """

    value: Float[Tensor, ""]
    per_class: Float[Tensor, " k"]
    loss: Float[Tensor, ""] | None = None
