"""Elastic deformation: a smooth random displacement of every pixel."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TRUNCATE = 4  # standard deviations, beyond which a Gaussian counts as 0


def displacements(
    n: int, size: tuple[int, int], *, alpha: float, sigma: float, rng: torch.Generator, is_fixed: bool = False
) -> Float[Tensor, "n 2 h w"]:
    """Return by how many pixels rows and columns are moved, on the generator's device.

    Source: the compressed U-Net's report, "Elastic Augmentation" and experiment 1; Simard et al., "Best Practices for
        Convolutional Neural Networks Applied to Visual Document Analysis", 2003, section 2. The report draws the
        factor; the gated CLmser's authors' program, like Simard et al., has it fixed.
    Differs: neither says what the noise is beyond the image: it is mirrored, so that the field is as strong at the edge
        as within. Nor where the Gaussian ends: at `TRUNCATE` standard deviations.

    Args:
        n: How many fields.
        size: Rows and columns.
        alpha: The factor of each field is drawn from 0 to it, or is this one.
        sigma: Standard deviation of the Gaussian, in pixels.
        rng: What is drawn from; as much, whether the factor is fixed or not.
        is_fixed: Whether every field's factor is `alpha` itself.

    >>> displacements(3, (8, 6), alpha=5.0, sigma=2.0, rng=torch.Generator()).shape
    torch.Size([3, 2, 8, 6])
    """
    share = torch.rand((n, 1, 1, 1), generator=rng, device=rng.device)
    factor = alpha * (torch.ones_like(share) if is_fixed else share)
    noise = 2 * torch.rand((n, 2, *size), generator=rng, device=rng.device) - 1
    rows, columns = (torch.from_numpy(gaussian_matrix(side, sigma)).to(rng.device) for side in size)
    return factor * (rows @ noise @ columns.T)


@lru_cache(maxsize=64)
def gaussian_matrix(n: int, sigma: float) -> np.ndarray:
    """Return the matrix that smooths n numbers, float32 [n n], the numbers mirrored at both ends (d c b a|a b c d|d c).

    A product of matrices instead of a convolution: mirroring costs nothing, and whole epochs are smoothed in two calls.

    >>> gaussian_matrix(3, 0.1).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    at = (np.arange(n)[:, None] + offsets) % (2 * n)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], np.minimum(at, 2 * n - 1 - at)), weights / weights.sum())
    return matrix.astype(np.float32)
