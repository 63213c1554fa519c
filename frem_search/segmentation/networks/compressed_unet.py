"""The compressed U-Net: two levels fewer, half as wide, and linear at its end."""

from itertools import pairwise
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.layers.double_conv import DoubleConv
from frem_search.segmentation.layers.up_conv import UpConv
from frem_search.segmentation.networks.levels import decode, encode
from frem_search.segmentation.networks.shapes import check_images, check_sizes, pad
from frem_search.segmentation.output import Output


class CompressedUNet(nn.Module):
    """U-Net of two levels above the bottleneck, normalized, whose last two convolutions are linear.

    Source: Livne and Koziashvili, "Segmentation of biological cells with a compressed U-Net", section "Our
        Architecture". Its figure is missing here; widths and depth are those of the authors' program, reference 4
        (github.com/dorlivne/Segmentation): 32, 64 and 128 maps, and 3x3 and 1x1 for the two linear convolutions.
    Differs: any number of classes. The program has two maps between the linear convolutions for its three classes; here
        it is one fewer than classes, which loses nothing, as softmax does not change with what is added to all logits.
        The up-convolution, normalized and rectified like the others, is the U-Net's; the program repeats pixels and has
        a convolution 2x2 behind that. The text, "except the last two layers", is followed where the program leaves a
        third convolution linear.

    Args:
        in_channels: Channels of the images.
        n_classes: Classes of the labels, background included.
        base_channels: Feature maps of the first level; every level below has twice as many.
        depth: How often height and width are halved.

    >>> import torch
    >>> CompressedUNet(1, 3, base_channels=4).eval()(torch.zeros(2, 1, 50, 70)).logits.shape
    torch.Size([2, 3, 50, 70])
    """

    N_CLASSES: ClassVar[int | None] = None  # any number

    def __init__(self, in_channels: int, n_classes: int, *, base_channels: int = 32, depth: int = 2) -> None:
        super().__init__()
        check_sizes(
            in_channels=(in_channels, 1), n_classes=(n_classes, 2), base_channels=(base_channels, 1), depth=(depth, 1)
        )
        widths = [base_channels * 2**level for level in range(depth + 1)]
        levels = list(pairwise(reversed(widths)))
        self.in_channels = in_channels
        self.depth = depth
        self.encoder = nn.ModuleList(DoubleConv(narrow, wide) for narrow, wide in pairwise([in_channels, *widths]))
        self.up_convs = nn.ModuleList(
            nn.Sequential(UpConv(wide, narrow), nn.BatchNorm2d(narrow), nn.ReLU()) for wide, narrow in levels
        )
        self.decoder = nn.ModuleList(DoubleConv(2 * narrow, narrow) for _, narrow in levels)
        self.head = nn.Sequential(
            nn.Conv2d(base_channels, n_classes - 1, kernel_size=3, padding=1),
            nn.Conv2d(n_classes - 1, n_classes, kernel_size=1),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Output:
        """Return logits at the size of `x`."""
        check_images(x, in_channels=self.in_channels, scale=2**self.depth, is_training=self.training)
        height, width = x.shape[2:]
        *skips, bottleneck = encode(pad(x, multiple=2**self.depth), self.encoder)
        features = decode(bottleneck, skips, self.up_convs, self.decoder)
        return Output(self.head(features)[:, :, :height, :width])
