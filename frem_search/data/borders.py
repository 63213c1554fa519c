"""How near a pixel is to two cells at once: what border weights are made of."""

import numpy as np

FAR = 1e9  # pixels: no weight is left at such a distance, and unlike infinity it can be interpolated


def border_distances(label: np.ndarray, *, cell_class: int = 1) -> np.ndarray:
    """Return d1 + d2 for every pixel, float32 [h w]: distances in pixels to the nearest and the second nearest cell.

    A cell is a region of `cell_class` whose pixels touch along edges. Distances are Euclidean, between the centres of
    pixels; within a cell d1 is 0. Where an image has fewer than two cells, the sum is `FAR`.

    Source: Ronneberger et al., arXiv:1505.04597, eq. 2, as the compressed U-Net's report takes it up.
    Differs: the report does not say how cells are told apart in a picture of classes; here by what touches.

    Args:
        label: The class of every pixel [h w].
        cell_class: Which class is that of cells.

    >>> border_distances(np.array([[1, 0, 0, 0, 1, 0]]))
    array([[4., 4., 4., 4., 4., 6.]], dtype=float32)
    """
    from scipy import ndimage

    cells, n_cells = ndimage.label(label == cell_class)
    if n_cells < 2:
        return np.full(label.shape, FAR, dtype=np.float32)
    first, nearest = ndimage.distance_transform_edt(cells == 0, return_indices=True)
    owner = cells[tuple(nearest)]
    second = np.empty_like(first)
    for cell, region in enumerate(ndimage.find_objects(owner), start=1):
        is_own = owner[region] == cell
        second[region][is_own] = _to_others(cells, cell, region, is_own)
    return (first + second).astype(np.float32)


def _to_others(cells: np.ndarray, cell: int, region: tuple[slice, slice], is_own: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest other cell, for those pixels of a region that are asked for.

    Looked for in a window around the region, which grows until nothing outside of it can be nearer: a distance
    transform of the whole image for each cell would take seconds.
    """
    from scipy import ndimage

    margin = max(16, *(side.stop - side.start for side in region)) // 2
    while True:
        window = tuple(
            slice(max(0, side.start - margin), min(n, side.stop + margin))
            for side, n in zip(region, cells.shape, strict=True)
        )
        is_other = (cells[window] != 0) & (cells[window] != cell)
        is_whole = all(side == slice(0, n) for side, n in zip(window, cells.shape, strict=True))
        if is_whole or is_other.any():
            inner = tuple(
                slice(side.start - outer.start, side.stop - outer.start)
                for side, outer in zip(region, window, strict=True)
            )
            distance = ndimage.distance_transform_edt(~is_other)[inner][is_own]
            # Whatever lies outside is further than the margin from every pixel of the region.
            if is_whole or distance.max() <= margin + 1:
                return distance
        margin *= 2
