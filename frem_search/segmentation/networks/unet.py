"""The U-Net with squeeze-and-excitation blocks that FREM enhances."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.layers.batch_renorm import BatchRenorm
from frem_search.segmentation.layers.batch_statistics import BatchStatistics
from frem_search.segmentation.layers.double_conv import DoubleConv
from frem_search.segmentation.layers.feature_enhancement import FeatureEnhancement
from frem_search.segmentation.layers.resize import resize_bilinear
from frem_search.segmentation.layers.squeeze_excite import SqueezeExcite
from frem_search.segmentation.layers.up_conv import UpConv, UpCopy
from frem_search.segmentation.networks.levels import decode
from frem_search.segmentation.networks.shapes import check_images, check_sizes, pad
from frem_search.segmentation.output import Features, Output

JOINTS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda _: nn.Identity(),
    "batch_norm": nn.BatchNorm2d,
    "batch_renorm": partial(BatchRenorm, follows_length=True),
    "batch_renorm_unlimited": BatchRenorm.unlimited,
    "batch_statistics": BatchStatistics,
}


class UNet(nn.Module):
    """U-Net with a squeeze-and-excitation block after every double convolution and FREM at the encoder's end.

    Source: "Cell Image Segmentation by Feature Random Enhancement Module", Figs 2 and 4, section 4.3; Ronneberger et
        al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv:1505.04597, Fig. 1.
    Differs: where the paper says nothing, 512 bottleneck maps are reached by doubling 32 four times, and convolutions
        keep the size. SuperVision sees the features before enhancement; the paper uses the one instead of the other.
        What the paper leaves open about normalization and up-convolution are parameters, `upsampling`,
        `concatenation`, `enhanced_before_gate` and `normalization`; docs/frem.md compares these readings.

    Args:
        in_channels: Channels of the images.
        n_classes: Classes of the labels, background included.
        base_channels: Feature maps of the first level; every level below has twice as many.
        depth: How often height and width are halved.
        normalization: What follows each convolution.
        upsampling: What doubles height and width in the decoder: learned weights, or a copy of each pixel.
        concatenation: What normalizes the bottleneck, or a level above it, concatenated with its skip connection
            (section 3.1). The limits of `batch_renorm` open within the first tens of steps, `batch_renorm_unlimited`
            has none, `batch_statistics` uses those of the images in test too.
        squeeze_excite: Whether a squeeze-and-excitation block follows each double convolution.
        se_reduction: That block's hidden layer is this many times narrower.
        B: How many bottleneck maps FREM enhances.
        X: By what factor.
        fixed_maps: Enhance the same maps in every epoch.
        enhanced_in_test: Enhance in test too.
        enhanced_before_gate: Enhance before the squeeze-and-excitation block of the bottleneck, not behind it.
        supervision: Add the SuperVision head: logits from the bottleneck for an auxiliary loss.

    >>> UNet(1, 3, base_channels=4).eval()(torch.zeros(2, 1, 50, 70)).logits.shape
    torch.Size([2, 3, 50, 70])
    """

    N_CLASSES: ClassVar[int | None] = None  # any number

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        base_channels: int = 32,
        depth: int = 4,
        normalization: Literal["batch_norm", "batch_renorm", "none"] = "batch_norm",
        upsampling: Literal["transposed", "nearest"] = "transposed",
        concatenation: Literal[
            "plain", "batch_norm", "batch_renorm", "batch_renorm_unlimited", "batch_statistics"
        ] = "plain",
        squeeze_excite: bool = True,
        se_reduction: int = 16,
        B: int = 0,
        X: float = 1.0,
        fixed_maps: bool = False,
        enhanced_in_test: bool = False,
        enhanced_before_gate: bool = False,
        supervision: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=(in_channels, 1), n_classes=(n_classes, 2), base_channels=(base_channels, 1), depth=(depth, 1)
        )
        has_own_gate = squeeze_excite and enhanced_before_gate
        block = partial(_block, normalization=normalization, se_reduction=se_reduction if squeeze_excite else None)
        ungated = partial(block, se_reduction=None) if has_own_gate else block
        widths = [base_channels * 2**level for level in range(depth + 1)]
        self.in_channels = in_channels
        self.depth = depth
        self.encoder = nn.ModuleList(block(narrow, wide) for narrow, wide in pairwise([in_channels, *widths[:-1]]))
        self.encoder.append(ungated(widths[-2], widths[-1]))
        self.enhancement = FeatureEnhancement(
            widths[-1], B=B, X=X, fixed_maps=fixed_maps, enhanced_in_test=enhanced_in_test
        )
        self.gate = SqueezeExcite(widths[-1], reduction=se_reduction) if has_own_gate else None
        levels = list(pairwise(reversed(widths)))
        is_learned = upsampling == "transposed"
        self.up_convs = nn.ModuleList(UpConv(wide, narrow) if is_learned else UpCopy() for wide, narrow in levels)
        joined = [2 * narrow if is_learned else wide + narrow for wide, narrow in levels]
        self.joints = nn.ModuleList(JOINTS[concatenation](width) for width in joined)
        self.decoder = nn.ModuleList(block(width, narrow) for width, (_, narrow) in zip(joined, levels, strict=True))
        self.head = nn.Conv2d(base_channels, n_classes, kernel_size=1)
        # Last, so that the same seed gives every other weight the same value with and without it.
        self.supervision_head = nn.Conv2d(widths[-1], n_classes, kernel_size=1) if supervision else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Output:
        """Return logits at the size of `x`; in training also the features' magnitudes and SuperVision's logits."""
        check_images(x, in_channels=self.in_channels, scale=2**self.depth, is_training=self.training)
        height, width = x.shape[2:]
        rectified, features = self._encode(pad(x, multiple=2**self.depth))
        *skips, bottleneck = features
        enhanced = self.enhancement(bottleneck)
        if self.gate is not None:
            enhanced = self.gate(enhanced)
        blocks = (_behind(joint, block) for joint, block in zip(self.joints, self.decoder, strict=True))
        logits = self.head(decode(enhanced, skips, self.up_convs, blocks))[:, :, :height, :width]
        if not self.training:
            return Output(logits)
        magnitudes = Features(_magnitude(rectified[-1], dim=(0, 2, 3)), _magnitude(rectified[-2], dim=(0, 1, 2, 3)))
        return Output(logits, self._supervise(bottleneck, height, width), magnitudes)

    def _encode(self, x: Float[Tensor, "b c h w"]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of every level behind the last ReLU, and behind the gate that follows it, if any."""
        rectified: list[Tensor] = []
        features: list[Tensor] = []
        for block in self.encoder:
            convolutions, *gate = block if isinstance(block, nn.Sequential) else [block]
            below = nn.functional.max_pool2d(features[-1], kernel_size=2) if features else x
            rectified.append(convolutions(below))
            features.append(gate[0](rectified[-1]) if gate else rectified[-1])
        return rectified, features

    def _supervise(self, x: Float[Tensor, "b c h w"], height: int, width: int) -> Tensor | None:
        """Return logits of the bottleneck, resized to the images, if there is a head for them."""
        if self.supervision_head is None:
            return None
        size = (x.shape[2] * 2**self.depth, x.shape[3] * 2**self.depth)
        return resize_bilinear(self.supervision_head(x), size)[:, :, :height, :width]


def _behind(joint: nn.Module, block: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a decoder's block behind the normalization of what it takes."""
    return lambda x: block(joint(x))


def _block(in_channels: int, out_channels: int, *, normalization: str, se_reduction: int | None) -> nn.Module:
    """Return a double convolution, with a squeeze-and-excitation block behind it unless `se_reduction` is None."""
    convolutions = DoubleConv(in_channels, out_channels, normalization=normalization)
    if se_reduction is None:
        return convolutions
    return nn.Sequential(convolutions, SqueezeExcite(out_channels, reduction=se_reduction))


def _magnitude(x: Float[Tensor, "b c h w"], *, dim: tuple[int, ...]) -> Tensor:
    """Return the mean absolute value over `dim`, detached and in single precision."""
    return x.detach().abs().mean(dim=dim, dtype=torch.float32)
