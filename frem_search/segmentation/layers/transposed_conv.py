"""The transposed convolution whose windows overlap, doubling height and width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TransposedConv(nn.Module):
    """Transposed convolution with kernel 3x3 and stride 2.

    Written as one matrix product, whose nine values for each pixel are then added up where windows overlap: along an
    axis an even position has one summand, the kernel's middle, and an odd one has two, the end of one window and the
    beginning of the next. When trials are stacked the product becomes a batched one, as in `UpConv`.

    Source: "Regularize Network Skip Connections by Gating Mechanisms for Electron Microscopy Image Segmentation",
        section 3.1.
    Differs: no bias, as a normalization follows; the padding, of which the paper says nothing, is that which exactly
        doubles the size: PyTorch's ``padding=1, output_padding=1``. Initial weights are drawn for ``in_channels``
        summands, as many as come from one pixel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.

    >>> TransposedConv(8, 4)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 4, 10, 14])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(
            in_channels, 9 * out_channels, bias=False
        )  # rows: the kernel's row, its column, channel

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        """Return `x` at twice the height and width."""
        b, c, h, w = x.shape
        # Two dimensions, not four: matmul would repeat a stacked weight for every row of every image.
        windows: Tensor = self.expand(x.permute(0, 2, 3, 1).reshape(b * h * w, c))
        rows = _overlap(windows.reshape(b, h, w, 3, -1), axis=1)  # b, 2h, w, kernel's column and channel
        return _overlap(rows.reshape(b, 2 * h, w, 3, -1), axis=2).permute(0, 3, 1, 2)


def _overlap(windows: Float[Tensor, "b rows columns 3 n"], *, axis: int) -> Float[Tensor, "b rows2 columns2 n"]:
    """Lay windows of three, two apart, along an axis and add up where they overlap."""
    first, middle, last = windows.unbind(dim=3)
    nothing = torch.zeros_like(first.narrow(axis, 0, 1))  # behind the last window
    of_next = torch.cat([first.narrow(axis, 1, first.shape[axis] - 1), nothing], dim=axis)
    return torch.stack([middle, last + of_next], dim=axis + 1).flatten(axis, axis + 1)
