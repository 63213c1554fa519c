"""Connected regions of an image, and how the regions of two images overlap."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


def label_regions(cells: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Number the regions of 4-connected pixels from 1 on; 0 is everything else.

    >>> label_regions(np.array([[True, False], [False, True]])).tolist()
    [[1, 0], [0, 2]]
    """
    from scipy import ndimage

    labels: np.ndarray = ndimage.label(cells)[0]
    return labels


class Overlaps(NamedTuple):
    """The regions of a reference and of a result, and the pixels that every two of them share.

    Args:
        reference: Pixels of each region of the reference.
        result: Pixels of each region of the result.
        rows: Which region of the reference, for each two that overlap; a position in `reference`.
        columns: Which region of the result.
        shared: How many pixels both have.
    """

    reference: Int[np.ndarray, " n_reference"]
    result: Int[np.ndarray, " n_result"]
    rows: Int[np.ndarray, " n_pairs"]
    columns: Int[np.ndarray, " n_pairs"]
    shared: Int[np.ndarray, " n_pairs"]


def overlaps(reference: Int[np.ndarray, "*pixels"], result: Int[np.ndarray, "*pixels"]) -> Overlaps:
    """Count the pixels of the regions 1, 2, ... of two images and of their overlaps; 0 is no region.

    >>> counts = overlaps(np.array([1, 1, 1, 2]), np.array([1, 2, 2, 0]))
    >>> counts.reference.tolist(), counts.result.tolist(), counts.shared.tolist()
    ([3, 1], [1, 2], [1, 2])
    """
    from scipy import sparse

    reference, result = reference.ravel(), result.ravel()
    in_both = (reference > 0) & (result > 0)
    sizes = (int(reference.max(initial=0)), int(result.max(initial=0)))
    # Sparse, as a noisy result has a region for every tenth pixel: a full table could be larger than the images.
    table = sparse.coo_array(
        (np.ones(np.count_nonzero(in_both), dtype=np.int64), (reference[in_both] - 1, result[in_both] - 1)), shape=sizes
    ).tocsr()
    rows = np.repeat(np.arange(sizes[0]), np.diff(table.indptr))
    of_reference, of_result = (
        np.bincount(labels, minlength=size + 1)[1:] for labels, size in zip((reference, result), sizes, strict=True)
    )
    return Overlaps(of_reference, of_result, rows, table.indices, table.data)
