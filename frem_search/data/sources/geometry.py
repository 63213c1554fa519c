"""Cells as the regions nearest to points, and smooth random fields: what both generated datasets are drawn from."""

from typing import Any, NamedTuple

import numpy as np


class Cells(NamedTuple):
    """For every pixel [h w]: its cell, the next cell, and the distance to the wall between the two in pixels."""

    cell: np.ndarray
    neighbour: np.ndarray
    wall_distance: np.ndarray


def nearest_cells(points: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, reach: np.ndarray) -> Cells:
    """Assign pixels to the nearest of some points.

    Args:
        points: The centres [n 2], row and column.
        rows: Where every pixel counts as lying [h w], h and w even: its own row, plus a smooth field to bend walls.
        columns: The same for columns.
        reach: How far each point is looked for [n], in pixels before bending; it is no neighbour of pixels beyond.
    """
    # Which two points are nearest is asked at every second pixel, a quarter of the work; which is nearer, at every one.
    pair = [
        np.repeat(np.repeat(i, 2, 0), 2, 1)
        for i in _two_nearest(points, rows[::2, ::2], columns[::2, ::2], reach=reach)
    ]
    one, other = ((rows - points[i, 0]) ** 2 + (columns - points[i, 1]) ** 2 for i in pair)
    apart = np.hypot(*(points[pair[0], axis] - points[pair[1], axis] for axis in (0, 1)))
    cell, neighbour = np.where(one <= other, pair, pair[::-1])
    return Cells(cell, neighbour, np.abs(other - one) / (2 * np.maximum(apart, 1e-3)))


def _two_nearest(
    points: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.full(rows.shape, np.inf) for _ in range(2))
    nearest, next_nearest = (np.zeros(rows.shape, dtype=np.int32) for _ in range(2))
    for i, ((row, column), far) in enumerate(zip(points, reach, strict=True)):
        window = tuple(slice(int(max(0, at - far) / 2), int(max(0, at + far) / 2)) for at in (row, column))
        distance = (rows[window] - row) ** 2 + (columns[window] - column) ** 2
        is_first = distance < first[window]
        is_second = ~is_first & (distance < second[window])
        second[window] = np.where(is_first, first[window], np.where(is_second, distance, second[window]))
        next_nearest[window] = np.where(is_first, nearest[window], np.where(is_second, i, next_nearest[window]))
        first[window] = np.where(is_first, distance, first[window])
        nearest[window][is_first] = i
    return nearest, next_nearest


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], *, scale: float) -> np.ndarray:
    """Return random numbers [h w] of zero mean and unit variance that vary over about `scale` pixels."""
    from scipy import ndimage

    # White noise on a grid of `scale` pixels, drawn out by cubic splines, costs a fraction of a wide Gaussian filter.
    rows, columns = (_splines(n, scale) for n in shape)
    coefficients = ndimage.spline_filter(rng.standard_normal((rows.shape[1], columns.shape[1])), order=3)
    field = rows @ (columns @ coefficients.T).T
    return (field - field.mean()) / field.std()


def _splines(n: int, scale: float) -> Any:
    """Return the sparse matrix [n n_coarse] that evaluates cubic B-splines `scale` pixels apart."""
    from scipy import sparse

    first, t = np.divmod(np.arange(n) / scale + 0.5, 1.0)
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (t + t**2 - t**3) + 1, t**3], axis=1) / 6
    columns = first[:, None].astype(int) + np.arange(4)
    return sparse.csr_array(
        (weights.ravel(), columns.ravel(), np.arange(0, 4 * n + 1, 4)), shape=(n, columns.max() + 1)
    )


def pair_values(values: np.ndarray, cells: Cells) -> np.ndarray:
    """Return for every pixel the value of its wall, from a square table of which one half is read."""
    return values[np.maximum(cells.cell, cells.neighbour), np.minimum(cells.cell, cells.neighbour)]
