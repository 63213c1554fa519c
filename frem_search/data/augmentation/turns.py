"""What a study asks of the augmentation, and the eight symmetries of the square."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

SIGMA_ELASTIC = 4.0  # pixels; the compressed U-Net's Fig. 4


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image before it is trained on; each image draws its own.

    Args:
        turns: Flips, and on square images transpositions: all eight symmetries.
        rotation: A rotation by any angle.
        alpha: Elastic deformation by up to this factor, drawn from 0 to it; 0 is none.
        fixed_alpha: Deform by this factor itself instead.
        elastic_share: The share of images that are deformed.
        sigma_elastic: How smooth that is, in pixels.
        elastic_from: The validation score from which on images are deformed elastically.
        mirror_quarters: The share of images of which one quarter, mirrored twice, takes the place of all four.
        crop_size: Rows and columns of a window at a random place; None keeps whole images.
    """

    turns: bool = True
    rotation: bool = False
    alpha: float = 0.0
    fixed_alpha: bool = False
    elastic_share: float = 1.0
    sigma_elastic: float = SIGMA_ELASTIC
    elastic_from: float = 0.0
    mirror_quarters: float = 0.0
    crop_size: tuple[int, int] | None = None

    @property
    def has_warp(self) -> bool:
        """Whether images are sampled anew, and not only turned and flipped."""
        return self.rotation or self.is_elastic or self.mirror_quarters > 0 or self.crop_size is not None

    @property
    def is_elastic(self) -> bool:
        """Whether images are deformed elastically."""
        return self.alpha > 0 and self.elastic_share > 0

    def at(self, best_score: float) -> "Augmentation":
        """Return what is done once a network's best score has come so far.

        >>> Augmentation(alpha=50.0, elastic_from=0.7).at(0.69)
        Augmentation(turns=True, rotation=False, alpha=0.0, fixed_alpha=False, elastic_share=1.0, sigma_elastic=4.0, \
elastic_from=0.0, mirror_quarters=0.0, crop_size=None)
        """
        if max(best_score, 0.0) >= self.elastic_from and self.is_elastic:
            return replace(self, elastic_from=0.0)
        # All that say the same are equal, so that members can share what is prepared.
        return replace(
            self, alpha=0.0, fixed_alpha=False, elastic_share=1.0, sigma_elastic=SIGMA_ELASTIC, elastic_from=0.0
        )


def turn_and_flip(x: Tensor, flags: Bool[Tensor, "b 3"]) -> Tensor:
    """Return images (b, ..., h, w) transposed, then flipped in rows, then in columns, where the flags say so.

    Images that are not square are flipped only. Nothing waits for the device: both are computed, and the flags select.

    >>> x, flags = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[True, False, True]])
    >>> turn_and_flip(x, flags)
    tensor([[[2, 0],
             [3, 1]]])
    """
    for i, change in enumerate((_transpose, _flip_rows, _flip_columns)):
        x = torch.where(flags[:, i].reshape(-1, *[1] * (x.ndim - 1)), change(x), x)
    return x


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) if x.shape[-1] == x.shape[-2] else x


def _flip_rows(x: Tensor) -> Tensor:
    return x.flip(-2)


def _flip_columns(x: Tensor) -> Tensor:
    return x.flip(-1)
