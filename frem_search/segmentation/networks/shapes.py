"""What networks that halve height and width expect of sizes and images, and how they make images fit."""

from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Raise if one of the sizes, given with its least value, is too small.

    >>> check_sizes(depth=(0, 1))
    Traceback (most recent call last):
    frem_search.errors.ParameterError: depth: expected at least 1, but got 0.
    """
    for name, (size, least) in sizes.items():
        if size < least:
            raise ParameterError(name, expected=f"at least {least}", got=size)


def check_images(x: Tensor, *, in_channels: int, scale: int, is_training: bool) -> None:
    """Raise if a network cannot take images of this shape.

    Args:
        x: Images of any shape.
        in_channels: Channels that the network was built for.
        scale: How many pixels of the image a pixel of the bottleneck stands for, along an axis.
        is_training: Whether the bottleneck is normalized by its batch, which one value cannot be.
    """
    if x.ndim != 4 or x.shape[1] != in_channels:
        expected = f"shape (n, {in_channels}, height, width)"
        raise ParameterError(name="images", expected=expected, got=tuple(x.shape))
    if is_training and x.shape[0] == 1 and max(x.shape[2:]) <= scale:
        expected = f"at least 2 for training on images of {scale}x{scale} pixels or less"
        raise ParameterError(name="batch_size", expected=expected, got=1)


def pad(x: Float[Tensor, "b c h w"], *, multiple: int) -> Float[Tensor, "b c h2 w2"]:
    """Repeat the last row and column until `multiple` divides height and width.

    Zeros would be an edge that no cell has, and a reflection cannot be longer than the image.
    """
    right, bottom = -x.shape[3] % multiple, -x.shape[2] % multiple
    return nn.functional.pad(x, (0, right, 0, bottom), mode="replicate") if right or bottom else x
