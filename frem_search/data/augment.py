"""The eight symmetries of the square, drawn per image and applied to a whole batch on its device."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor


def turn_and_flip(
    image: Float[Tensor, "b c h w"], target: Integer[Tensor, "b h w"], flags: Bool[Tensor, "b 3"]
) -> tuple[Float[Tensor, "b c h w"], Integer[Tensor, "b h w"]]:
    """Return images and targets transposed, then flipped in rows, then in columns, where the flags say so.

    Images that are not square are flipped only. Nothing waits for the device: both are computed, and the flags select.

    >>> image, flags = torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([[True, False, True]])
    >>> turn_and_flip(image, image[:, 0].long(), flags)[1]
    tensor([[[2, 0],
             [3, 1]]])
    """
    turned = target[:, None]
    for i, change in enumerate((_transpose, _flip_rows, _flip_columns)):
        flag = flags[:, i, None, None, None]
        image = torch.where(flag, change(image), image)
        turned = torch.where(flag, change(turned), turned)
    return image, turned[:, 0]


def _transpose(x: Float[Tensor, "b c h w"] | Integer[Tensor, "b c h w"]) -> Tensor:
    return x.transpose(2, 3) if x.shape[2] == x.shape[3] else x


def _flip_rows(x: Float[Tensor, "b c h w"] | Integer[Tensor, "b c h w"]) -> Tensor:
    return x.flip(2)


def _flip_columns(x: Float[Tensor, "b c h w"] | Integer[Tensor, "b c h w"]) -> Tensor:
    return x.flip(3)
