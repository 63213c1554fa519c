"""Doubling height and width in a decoder: the U-Net's up-convolution, and a copy of each pixel."""

from jaxtyping import Float
from torch import Tensor, nn


class UpConv(nn.Module):
    """Transposed convolution with kernel 2x2 and stride 2.

    Written as a matrix product whose columns are then laid out in space, which is the same as windows of 2x2 with
    stride 2 do not overlap. When trials are stacked the product becomes a batched one; a transposed convolution would
    become a grouped one, which is slow.

    Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597,
        section 2.
    Differs: no bias, as the next normalization would remove it but at the border; initial weights are drawn for the
        ``in_channels`` summands that an output pixel has, where PyTorch's layer counts ``4 * out_channels``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    >>> import torch
    >>> UpConv(8, 4)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 4, 10, 14])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(
            in_channels, 4 * out_channels, bias=False
        )  # rows: the window's row, its column, channel

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        """Return `x` at twice the height and width."""
        b, c, h, w = x.shape
        # Two dimensions, not four: matmul would repeat a stacked weight for every row of every image.
        windows: Tensor = self.expand(x.permute(0, 2, 3, 1).reshape(b * h * w, c))
        rows = windows.reshape(b, h, w, 2, 2, -1).transpose(2, 3)  # b, h, window's row, w, window's column, channel
        return rows.reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


class UpCopy(nn.Module):
    """Each pixel four times: upsampling without weights.

    >>> import torch
    >>> UpCopy()(torch.arange(2.0).reshape(1, 1, 1, 2)).tolist()
    [[[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]]]
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return `x` at twice the height and width."""
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
