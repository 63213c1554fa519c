"""What a loss is to training: a function, and the coefficients that a study may set."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.output import Output


class Coefficient(NamedTuple):
    """A number that a loss weighs with.

    Args:
        default: Its value where a study sets none.
        low: The least value.
        high: The greatest value.
        kind: What it is, for messages.
    """

    default: float
    low: float = 0.0
    high: float = 1.0
    kind: str = "a weight"

    @property
    def expected(self) -> str:
        """What a study may set, in words.

        >>> Coefficient(0.3).expected
        'a weight from 0 to 1'
        """
        return f"{self.kind} from {self.low:g} to {self.high:g}"

    def allows(self, value: object) -> bool:
        """Whether a study may set it to `value`."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


class Loss(NamedTuple):
    """A loss and what it takes.

    Args:
        function: Takes a network's output, the batch, and the coefficients by name.
        coefficients: Those that a study may set.
        needs_border: Whether it looks at the batch's `border`, which is computed only then.
        needs_auxiliary: Whether the network must have an auxiliary output even if no coefficient is set.
        auxiliary: How a study gets a network with an auxiliary output, for messages, if the coefficients weigh one.
        n_classes: How many classes the labels must have; None takes any.
    """

    function: Callable[[Output, Batch, Mapping[str, Tensor]], Tensor]
    coefficients: Mapping[str, Coefficient]
    needs_border: bool = False
    needs_auxiliary: bool = False
    auxiliary: str = ""
    n_classes: int | None = None

    @property
    def defaults(self) -> dict[str, float]:
        """Each coefficient's value where a study sets none."""
        return {name: coefficient.default for name, coefficient in self.coefficients.items()}
