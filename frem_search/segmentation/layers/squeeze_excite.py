"""The squeeze-and-excitation block, a gate on channels."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError


class SqueezeExcite(nn.Module):
    """Rescale each channel by a gate computed from its mean over space.

    Source: Hu et al., "Squeeze-and-Excitation Networks", arXiv:1709.01507, eq. 2-4.
    Differs: the gate is computed in single precision under autocast too.

    Args:
        channels: Channels of the input and of the output.
        reduction: The hidden layer has ``channels // reduction`` units, at least one.

    >>> SqueezeExcite(channels=16, reduction=4)(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise ParameterError(name="se_reduction", expected="at least 1", got=reduction)
        hidden = max(1, channels // reduction)
        # Linear rather than 1x1 convolutions: stacked members make them a batched product, not a grouped convolution.
        self.shrink = nn.Linear(channels, hidden)
        self.grow = nn.Linear(hidden, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` with every channel scaled into (0, 1) of itself."""
        # bfloat16 has 8 bits: a gate near 1 would be rounded to 1, and these products are too small to gain from it.
        with torch.autocast(x.device.type, enabled=False):
            # Not x.mean(dim=(2, 3)): its gradient is not channels last, and to add it to that of the product below
            # would take longer than the block's other kernels together.
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
            z = pixels.sum(dim=1, dtype=self.shrink.weight.dtype) / pixels.shape[1]  # eq. 2
            s = torch.sigmoid(self.grow(torch.relu(self.shrink(z))))  # eq. 3
        return x * s.to(x.dtype)[:, :, None, None]  # eq. 4
