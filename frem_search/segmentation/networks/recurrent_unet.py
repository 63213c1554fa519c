"""RU-Net: a U-Net of recurrent convolutional layers."""

from itertools import pairwise
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.layers.recurrent_conv import RecurrentConv
from frem_search.segmentation.layers.up_conv import UpConv
from frem_search.segmentation.networks.levels import decode, encode
from frem_search.segmentation.networks.shapes import check_images, check_sizes, pad
from frem_search.segmentation.output import Output


class RecurrentUNet(nn.Module):
    """U-Net whose 3x3 convolutions are recurrent convolutional layers; there is no feedback from its output.

    Source: Alom et al., "Recurrent Residual Convolutional Neural Network based on U-Net (R2U-Net) for Medical Image
        Segmentation", arXiv:1802.06955, section III, RU-Net; sizes and time steps are those of "Feedback U-Net for Cell
        Image Segmentation", section 4.2, which compares with it.
    Differs: what `RecurrentConv` says of normalization. Where the papers say nothing, convolutions keep the size.

    Args:
        in_channels: Channels of the images.
        n_classes: Classes of the labels, background included.
        base_channels: Feature maps of the first level; every level below has twice as many.
        depth: How often height and width are halved.
        time_steps: How often each layer convolves its own output.

    >>> import torch
    >>> RecurrentUNet(1, 3).eval()(torch.zeros(2, 1, 50, 70)).logits.shape
    torch.Size([2, 3, 50, 70])
    """

    N_CLASSES: ClassVar[int | None] = None  # any number

    def __init__(
        self, in_channels: int, n_classes: int, *, base_channels: int = 8, depth: int = 4, time_steps: int = 2
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=(in_channels, 1), n_classes=(n_classes, 2), base_channels=(base_channels, 1), depth=(depth, 1)
        )
        widths = [base_channels * 2**level for level in range(depth + 1)]
        levels = list(pairwise(reversed(widths)))
        self.in_channels = in_channels
        self.depth = depth
        self.encoder = nn.ModuleList(
            _block(narrow, wide, time_steps=time_steps) for narrow, wide in pairwise([in_channels, *widths])
        )
        self.up_convs = nn.ModuleList(UpConv(wide, narrow) for wide, narrow in levels)
        self.decoder = nn.ModuleList(_block(2 * narrow, narrow, time_steps=time_steps) for _, narrow in levels)
        self.head = nn.Conv2d(base_channels, n_classes, kernel_size=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Output:
        """Return logits at the size of `x`."""
        check_images(x, in_channels=self.in_channels, scale=2**self.depth, is_training=self.training)
        height, width = x.shape[2:]
        *skips, bottleneck = encode(pad(x, multiple=2**self.depth), self.encoder)
        features = decode(bottleneck, skips, self.up_convs, self.decoder)
        return Output(self.head(features)[:, :, :height, :width])


def _block(in_channels: int, out_channels: int, *, time_steps: int) -> nn.Module:
    """Return two recurrent convolutional layers, the U-Net's two convolutions of a level."""
    return nn.Sequential(
        RecurrentConv(in_channels, out_channels, time_steps=time_steps),
        RecurrentConv(out_channels, out_channels, time_steps=time_steps),
    )
