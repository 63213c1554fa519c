"""FREM's module: some feature maps, redrawn every epoch, are multiplied by a large constant in training."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search import seeds
from frem_search.errors import ParameterError


class FeatureEnhancement(nn.Module):
    """Multiply B feature maps by X in training and none in test.

    The gain of every map is a buffer, so that trials that differ in B and X have the same shapes and the same code.

    Source: "Cell Image Segmentation by Feature Random Enhancement Module", section 3.1, Fig. 2 and Tables 1 and 4.
    Differs: nothing.

    Args:
        channels: Feature maps of the input and of the output.
        B: How many maps are enhanced.
        X: By what factor.
        fixed_maps: Keep the maps of epoch 0 for the whole training (Table 4).
        enhanced_in_test: Enhance the maps of the last epoch in test too (Table 1).

    >>> layer = FeatureEnhancement(4, B=2, X=10.0)
    >>> layer.redraw(seed=0, fold=0, epoch=0)
    >>> sorted(layer(torch.ones(1, 4, 1, 1)).flatten().tolist())
    [1.0, 1.0, 10.0, 10.0]
    """

    gain: Tensor

    def __init__(
        self, channels: int, *, B: int = 0, X: float = 1.0, fixed_maps: bool = False, enhanced_in_test: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= B <= channels:
            raise ParameterError(name="B", expected=f"0 to {channels}, the bottleneck's maps", got=B)
        # The gain is kept in single precision, where a larger X would be infinite; a NaN fails the comparison too.
        if not 0 < X <= torch.finfo(torch.float32).max:
            raise ParameterError(name="X", expected="a finite factor above 0", got=X)
        self.channels = channels
        self.B = B
        self.X = X
        self.fixed_maps = fixed_maps
        self.enhanced_in_test = enhanced_in_test
        self.enhanced = np.zeros(channels, dtype=np.bool_)
        self.register_buffer("gain", torch.ones(channels))

    def redraw(self, *, seed: int, fold: int, epoch: int) -> None:
        """Select the enhanced maps of an epoch; layers that differ in B take them from one permutation."""
        shuffled = seeds.generator(seed, "frem", fold, 0 if self.fixed_maps else epoch).permutation(self.channels)
        self.enhanced = np.zeros(self.channels, dtype=np.bool_)
        self.enhanced[shuffled[: self.B]] = True
        # In place: a stacked or compiled network holds this very tensor.
        self.gain.copy_(torch.where(torch.from_numpy(self.enhanced), self.X, 1.0))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` with its enhanced maps multiplied in training, and `x` itself in test."""
        if not (self.training or self.enhanced_in_test):
            return x
        # Autocast leaves products alone: half-precision features are promoted, so that X is not rounded.
        return (x * self.gain[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        return f"{self.channels}, B={self.B}, X={self.X}"
