"""CLmser with gated skip connections: one answer in [-1, 1], given more detail where it is in doubt."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.gating import ConfidenceMask, PixelGate
from frem_search.segmentation.layers.residual_block import ResidualBlock
from frem_search.segmentation.layers.squeeze_excite import SqueezeExcite
from frem_search.segmentation.layers.transposed_conv import TransposedConv
from frem_search.segmentation.layers.up_conv import UpConv
from frem_search.segmentation.networks.levels import encode
from frem_search.segmentation.networks.shapes import check_images, check_sizes, pad
from frem_search.segmentation.output import Output


class CLmser(nn.Module):
    """Residual encoder and decoder whose fast-lane skip connections are added, gated at both ends of the network.

    Two low-level layers have the size of the images; each level below halves it. High-level skip connections, those
    from below, are gated by what they carry: first by channels, then by pixels. Low-level ones are gated by what the
    decoder knows without them: a convolution reads a temporary answer from its features, and detail is let through
    where that answer is in doubt. The second temporary answer is read from features that the first one's detail has
    already refined, and the final one from those that the second one's has. The rows of the paper's Table 1 are
    ``channel_gating, pixel_gating, gating_mask`` = (False, "none", False), (True, "none", False),
    (True, "high_level", False), (True, "all", False) and the default.

    With z the last value before tanh, so that the answer is x = tanh(z), logits are -z for class 0, the membrane or
    -1, and z for class 1, the cell or +1: the difference of their softmax probabilities is x.

    Source: Guo et al., "Regularize Network Skip Connections by Gating Mechanisms for Electron Microscopy Image
        Segmentation", sections 3.1 to 3.3, eq. 1-2, Tables 1 and 3. What the text leaves open and Fig. 2 may show is
        as in the authors' program (github.com/CMACH508/2020-GuoYuze-ICME2019): low-level layers of one convolution
        each, levels of a convolution and a residual block of two, max pooling, skip connections added, batch
        normalization, no bias but in the channel gates, temporary answers that no loss looks at.
    Differs: of ``structure``, "mirrored" follows the text and "bridged" the program. Their count of parameters, for
        images of one channel: 8,334,243 and, with ``base_channels=12, depth=5``, 8,308,941; Table 3 says 8.3 million.
        *bridged*: the deepest level is one convolution without normalization, as wide as the level above, to which it
        returns without a skip connection; convolutions that halve the maps and residual blocks stand before a
        transposed convolution, whose kernel is 2x2, not normalized, followed by leaky ReLU. The first temporary answer
        is read through a transposed convolution of its own, the second one where the first one's detail has been added.
        The program also holds 37,305 parameters that it never uses, gates for the skip connection that its bridge does
        without, and prints 8,346,246; here they are not made. Its initial weights are normal with a deviation of 0.02,
        ours PyTorch's.
        *mirrored*: transposed convolutions are 3x3 as the text says, and normalized, and followed by ReLU; with them,
        the program's structure would have 9.3 million parameters. They halve the number of maps, which takes
        convolutions of their own in the program, so that the decoder mirrors the encoder. The bottleneck is 1.5 times
        as wide as the level above instead of twice, which gives Table 3's number with 16 maps and four halvings. Each
        temporary answer is read where its skip connection is about to be added.
        Both: the channel gate is a squeeze-and-excitation block, as in the paper that section 3.2 follows; that it
        keeps the number of channels is said of its output: between its layers they are 8 times fewer, as in the program
        (16 times in that paper).

    Args:
        in_channels: Channels of the images.
        n_classes: Classes of the labels: two.
        structure: Whether the decoder mirrors the encoder, or begins behind a bridge.
        base_channels: Feature maps of the first layer; the next one and every level have twice as many as the one
            before; the mirrored structure's bottleneck has 1.5 times as many, the bridge as many.
        depth: How often height and width are halved.
        channel_gating: Gate high-level skip connections by channels (CG).
        pixel_gating: Gate no skip connections, the high-level ones (PG) or all (FullPG) by pixels.
        gating_mask: Gate low-level skip connections by the temporary answers (GM).
        gamma: Exponent of that mask.

    >>> CLmser(1, 2, base_channels=4).eval()(torch.zeros(2, 1, 50, 70)).logits.shape
    torch.Size([2, 2, 50, 70])
    """

    N_CLASSES: ClassVar[int | None] = 2

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        structure: Literal["mirrored", "bridged"] = "mirrored",
        base_channels: int = 16,
        depth: int = 4,
        channel_gating: bool = True,
        pixel_gating: Literal["none", "high_level", "all"] = "high_level",
        gating_mask: bool = True,
        gamma: float = 3.0,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=(in_channels, 1), base_channels=(base_channels, 1), depth=(depth, 2))
        if n_classes != self.N_CLASSES:
            raise ParameterError(name="n_classes", expected="2, as one answer tells two classes apart", got=n_classes)
        mask = ConfidenceMask(gamma)  # even if it is not used, so that a wrong exponent is told
        first, second, *high = (base_channels * 2**i for i in range(depth + 1))
        is_bridged = structure == "bridged"
        with_skip = high[:-1] if is_bridged else high
        *ups, last_up = _bridged_ups(high) if is_bridged else _mirrored_ups(second, high)
        self.in_channels = in_channels
        self.depth = depth
        self.is_bridged = is_bridged
        self.stem = _conv(in_channels, first)
        self.encoder = nn.ModuleList(
            [
                _conv(first, second),
                *(_level(narrow, wide) for narrow, wide in pairwise([second, *high])),
                _bridge(high[-1]) if is_bridged else _level(high[-1], _bottleneck(high)),
            ]
        )
        self.ups = nn.ModuleList(ups)
        self.blocks = nn.ModuleList(
            _level(width, width // 2) if is_bridged else ResidualBlock(width) for width in reversed(high)
        )
        self.low_level = nn.ModuleList([last_up, _conv(second, first)])
        self.head = _answer(first)
        # Last, so that with the same seed all else begins with the same weights whichever gates there are.
        self.gates = nn.ModuleList(
            [
                *(_gates(width, by_channel=False, by_pixel=pixel_gating == "all") for width in (first, second)),
                *(_gates(width, by_channel=channel_gating, by_pixel=pixel_gating != "none") for width in with_skip),
            ]
        )
        self.mask = mask if gating_mask else None
        self.temporary = nn.ModuleList(_temporary(first, second, is_bridged=is_bridged) if gating_mask else [])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Output:
        """Return logits -z and z at the size of `x`, where tanh(z) is the answer."""
        is_normalized = self.training and not self.is_bridged  # and the level above a bridge has four pixels at least
        check_images(x, in_channels=self.in_channels, scale=2**self.depth, is_training=is_normalized)
        height, width = x.shape[2:]
        first = self.stem(pad(x, multiple=2**self.depth))
        *skips, bottleneck = encode(first, self.encoder)
        with_gate = [first, *skips][: len(self.gates)]  # all, but the one beside a bridge
        z = self._decode(bottleneck, with_gate)[:, :, :height, :width]
        return Output(torch.cat([-z, z], dim=1))

    def _decode(self, x: Float[Tensor, "b c h w"], skips: Sequence[Tensor]) -> Float[Tensor, "b 1 h2 w2"]:
        """Return z, each layer of the decoder with its skip connection added."""
        first, second, *high = (gate(skip) for gate, skip in zip(self.gates, skips, strict=True))
        none = [None] * (len(self.ups) - len(high))
        for up, block, skip in zip(self.ups, self.blocks, [*none, *reversed(high)], strict=True):
            x = up(x)
            x = block(x if skip is None else x + skip)
        for index, (layer, skip) in enumerate(zip(self.low_level, (second, first), strict=True)):
            before, x = x, layer(x)
            x = x + self._masked(skip, before if self.is_bridged else x, index)
        z: Tensor = self.head(x)
        return z

    def _masked(self, skip: Float[Tensor, "b c h w"], x: Float[Tensor, "b k h2 w2"], index: int) -> Tensor:
        """Return what of a skip connection is let through, by the answer read from the decoder's features `x`."""
        if self.mask is None:
            return skip
        z = self.temporary[index](x)
        answer = torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)))
        return skip * self.mask(answer).to(skip.dtype)


def _bottleneck(high: Sequence[int]) -> int:
    """Return the width of the mirrored structure's deepest level, by those of the high levels."""
    return 3 * high[-1] // 2


def _mirrored_ups(second: int, high: Sequence[int]) -> list[nn.Module]:
    """Return what doubles height and width, the deepest first: back to the maps of the level above."""
    widths = pairwise([_bottleneck(high), *reversed(high), second])
    return [_normalized(TransposedConv(wide, narrow), narrow) for wide, narrow in widths]


def _bridged_ups(high: Sequence[int]) -> list[nn.Module]:
    """Return what doubles height and width, the bridge's first: each with as many maps as it is given."""
    return [_leaky_up(width) for width in (high[-1], *(width // 2 for width in reversed(high)))]


def _leaky_up(channels: int) -> nn.Sequential:
    return nn.Sequential(UpConv(channels, channels), nn.LeakyReLU())


def _bridge(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False), nn.ReLU())


def _level(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a convolution that changes the number of maps, and a residual block."""
    return nn.Sequential(_conv(in_channels, out_channels), ResidualBlock(out_channels))


def _temporary(first: int, second: int, *, is_bridged: bool) -> list[nn.Module]:
    """Return what reads the temporary answers: from features that have got their detail, or are about to get it."""
    if is_bridged:
        return [nn.Sequential(_leaky_up(second), _answer(second)), _answer(second)]
    return [_answer(second), _answer(first)]


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a convolution 3x3, normalized and rectified."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return _normalized(conv, out_channels)


def _normalized(layer: nn.Module, channels: int) -> nn.Sequential:
    """Return a layer of so many channels with normalization and ReLU behind it."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def _answer(channels: int) -> nn.Conv2d:
    """Return the convolution that reads an answer, before tanh, from features."""
    return nn.Conv2d(channels, 1, kernel_size=3, padding=1, bias=False)


def _gates(channels: int, *, by_channel: bool, by_pixel: bool) -> nn.Sequential:
    """Return the gates of a skip connection, in the order of eq. 1; without any it is let through as it is."""
    gates: list[nn.Module] = []
    if by_channel:
        gates.append(SqueezeExcite(channels, reduction=8))
    if by_pixel:
        gates.append(PixelGate())
    return nn.Sequential(*gates)
