"""The U-Net's block: two convolutions, each normalized and rectified."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.batch_renorm import BatchRenorm

NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "batch_renorm": BatchRenorm,
    "none": lambda _: nn.Identity(),
}


class DoubleConv(nn.Module):
    """Convolution 3x3, normalization, ReLU, twice.

    Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597,
        section 2.
    Differs: zero padding keeps the size; convolutions have a bias only where nothing normalizes behind them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        normalization: A key of `NORMALIZATIONS`.

    >>> DoubleConv(3, 8)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, normalization: str = "batch_norm") -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ParameterError(name="normalization", expected=" or ".join(NORMALIZATIONS), got=normalization)
        normalize, has_bias = NORMALIZATIONS[normalization], normalization == "none"
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=has_bias)
        self.norm1 = normalize(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=has_bias)
        self.norm2 = normalize(out_channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return the block's features, none of them negative."""
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)))
