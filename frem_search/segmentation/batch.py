"""What a step trains on, and what a loss may look at beside a network's output."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor


class Batch(NamedTuple):
    """The images of one step; or of all steps of an epoch, along a first dimension.

    Args:
        image: As the network takes them.
        label: The class of every pixel.
        border: Sum of the distances to the nearest and the second nearest cell, in pixels; for losses that need it.
        class_weights: How much a class counts, by how rare it is among all training images; for losses that need it.
    """

    image: Float[Tensor, "*steps b c h w"]
    label: UInt8[Tensor, "*steps b h w"]
    border: Float[Tensor, "*steps b h w"] | None = None
    class_weights: Float[Tensor, " k"] | None = None

    def step(self, i: int) -> "Batch":
        """Return what step `i` of an epoch trains on, the same memory."""
        return self.map(lambda each: each[i])

    def step_at(self, i: Int[Tensor, " 1"]) -> "Batch":
        """Return a copy of what step `i` of an epoch trains on, without reading `i` back to the host."""
        # index_select lays out what it copies channels first, unless the dimensions stand as they lie in memory.
        batch = self._replace(image=self.image.movedim(2, -1)).map(lambda each: each.index_select(0, i)[0])
        return batch._replace(image=batch.image.movedim(-1, 1))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of changed images, labels and distances."""
        border = None if self.border is None else change(self.border)
        return Batch(change(self.image), change(self.label), border, self.class_weights)

    def tensors(self) -> list[Tensor]:
        """Return images, labels and, if there are any, distances."""
        return [self.image, self.label] if self.border is None else [self.image, self.label, self.border]

    @property
    def n_steps(self) -> int:
        """How many steps an epoch has."""
        return len(self.image)
