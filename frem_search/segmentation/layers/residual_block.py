"""The residual block: what two convolutions add to their input."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Convolution 3x3, normalization, ReLU, convolution 3x3, normalization; the input is added before the last ReLU.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, eq. 1 and Fig. 2; normalization
        as in its section 3.4.
    Differs: never changes channels or size, so that the shortcut is always the identity.

    Args:
        channels: Channels of the input and of the output.

    >>> ResidualBlock(8)(torch.zeros(2, 8, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the block's features, none of them negative."""
        residual = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x + residual)
