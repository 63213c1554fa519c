"""The two sides of a U-Net, whatever its blocks are."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

Block = Callable[[Tensor], Tensor]


def encode(x: Float[Tensor, "b c h w"], blocks: Iterable[Block]) -> list[Tensor]:
    """Return the features of every level, each from the maxima of the one above; the bottleneck's last.

    Args:
        x: Images whose height and width can be halved before each block but the first.
        blocks: One for each level, the first level's first.
    """
    first, *others = blocks
    features = [first(x)]
    for block in others:
        features.append(block(nn.functional.max_pool2d(features[-1], kernel_size=2)))
    return features


def decode(
    x: Float[Tensor, "b c h w"], skips: Sequence[Tensor], up_convs: Iterable[Block], blocks: Iterable[Block]
) -> Float[Tensor, "b k h2 w2"]:
    """Return the features of the first level, each level concatenated with its skip connection.

    Args:
        x: The bottleneck.
        skips: Features of the levels above it, the first level's first.
        up_convs: What doubles height and width, the deepest level's first.
        blocks: One for each of them.
    """
    for up_conv, block, skip in zip(up_convs, blocks, reversed(skips), strict=True):
        x = block(torch.cat([skip, up_conv(x)], dim=1))
    return x
