"""Rotation, crop, mirrored quarters and elastic deformation as one field of positions at which images are sampled."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from frem_search.data.augmentation.elastic import displacements
from frem_search.data.augmentation.turns import Augmentation
from frem_search.seeds import derive


class Warps:
    """Draws the fields of one epoch, chunk after chunk; they follow from the seed's parts and the device alone.

    A pixel of the result is taken back, in this order: over flips and transposition, rotation and crop into the image,
    by the displacement of elastic deformation, and into the quarter that is mirrored. Only then the image is sampled,
    once; what lies beyond an edge is mirrored in it.

    Source: the compressed U-Net's report, "Augmentation", with its Fig. 3 for quarters; "Regularize Network Skip
        Connections by Gating Mechanisms for Electron Microscopy Image Segmentation", section 4.2.
    Differs: the papers give neither how often nor how far; every image is rotated by an angle of its own and cropped at
        a place of its own. Of the second paper, the share of images that are deformed and the factor of all of them
        are its authors' program's. The displacement is drawn for the pixels of the result and not of the image, which
        after a rotation by any angle is nearly the same in distribution, as the Gaussian is round. Distances to cells
        are moved with the image and not measured anew.

    Args:
        augmentation: What is drawn.
        seed: The study's.
        fold: Which fold.
        epoch: Which epoch.
        device: Where fields are drawn.
    """

    def __init__(self, augmentation: Augmentation, *, seed: int, fold: int, epoch: int, device: torch.device) -> None:
        self.augmentation = augmentation
        # A generator each, so that rotations stay as they are when elastic deformation begins, and displacements as
        # they are when some images are spared.
        self._places, self._noise, self._spared = (torch.Generator(device) for _ in range(3))
        self._places.manual_seed(derive(seed, "warps", fold, epoch))
        self._noise.manual_seed(derive(seed, "elastic", fold, epoch))
        self._spared.manual_seed(derive(seed, "elastic_share", fold, epoch))

    def positions(self, flags: Bool[Tensor, "n 3"], size: tuple[int, int]) -> Float[Tensor, "n h w 2"]:
        """Return for every pixel of the result the row and column to sample, in pixels.

        Args:
            flags: Transpose, flip rows, flip columns; the first is heeded where the result is square.
            size: Rows and columns of the images.
        """
        wanted, n = self.augmentation, len(flags)
        out = wanted.crop_size or size
        # All is drawn, needed or not, so that nothing changes with what else is asked for.
        angle, top, left, mirrored, lower, right = torch.rand(
            (n, 6), generator=self._places, device=flags.device
        ).unbind(dim=1)
        angle = 2 * math.pi * angle if wanted.rotation else torch.zeros_like(angle)
        row, column = _rotated(_flipped(flags & wanted.turns, out), angle)
        row, column = (
            each + (torch.floor(share * (have - take + 1)) + (take - 1) / 2)[:, None, None]
            for each, share, have, take in zip((row, column), (top, left), size, out, strict=True)
        )
        if wanted.is_elastic:
            moved = self._displacements(n, out)
            row, column = row + moved[:, 0], column + moved[:, 1]
        is_mirrored = mirrored < wanted.mirror_quarters
        row, column = (
            torch.where(is_mirrored[:, None, None], _folded(each, half < 0.5, side), each)
            for each, half, side in zip((row, column), (lower, right), size, strict=True)
        )
        return torch.stack([row, column], dim=-1)

    def _displacements(self, n: int, size: tuple[int, int]) -> Float[Tensor, "n 2 h w"]:
        """Return by how many pixels rows and columns are moved; of images that are spared, by none."""
        wanted = self.augmentation
        moved = displacements(
            n,
            size,
            alpha=wanted.alpha,
            sigma=wanted.sigma_elastic,
            rng=self._noise,
            is_fixed=wanted.fixed_alpha,
        )
        is_moved = torch.rand(n, generator=self._spared, device=moved.device) < wanted.elastic_share
        return moved * is_moved[:, None, None, None]


def sample(
    images: Float[Tensor, "n c h w"], positions: Float[Tensor, "n h2 w2 2"], *, mode: str
) -> Float[Tensor, "n c h2 w2"]:
    """Return images at positions in pixels, mirrored beyond their edges (d c b a|a b c d|d c b a).

    Args:
        images: Of any floating type.
        positions: Row and column.
        mode: `bilinear` or `nearest`.
    """
    size = torch.tensor(images.shape[2:], device=images.device)
    grid = ((2 * positions + 1) / size - 1).flip(-1)  # columns first, the edges of the image at -1 and 1
    return nn.functional.grid_sample(
        images, grid.to(images.dtype), mode=mode, padding_mode="reflection", align_corners=False
    )


def _flipped(flags: Bool[Tensor, "n 3"], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return where each pixel was before flips and transposition, from the centre on (n, h, w)."""
    transpose, flip_rows, flip_columns = (flags[:, i, None, None] for i in range(3))
    transpose = transpose & (size[0] == size[1])
    row, column = (torch.arange(side, device=flags.device) - (side - 1) / 2 for side in size)
    row = torch.where(flip_rows, -row[:, None], row[:, None]).expand(-1, *size)
    column = torch.where(flip_columns, -column, column).expand(-1, *size)
    return torch.where(transpose, column, row), torch.where(transpose, row, column)


def _rotated(at: tuple[Tensor, Tensor], angle: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    (row, column), (cos, sin) = at, (angle.cos()[:, None, None], angle.sin()[:, None, None])
    return cos * row - sin * column, sin * row + cos * column


def _folded(at: Float[Tensor, "n h w"], is_first: Bool[Tensor, " n"], side: int) -> Tensor:
    """Return positions along one side, those of the other half mirrored into the first or the second half."""
    centre = (side - 1) / 2
    distance = (at - centre).abs()
    return torch.where(is_first[:, None, None], centre - distance, centre + distance)
