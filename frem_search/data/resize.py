"""Area averaging to another size, in whole numbers of sub-pixels so that ties are ties."""

import numpy as np


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return [c h w] at `size`: every new pixel is the mean of the area that it covers.

    >>> resize_image(np.array([[[0.0, 2.0], [4.0, 6.0]]]), (1, 1))
    array([[[3.]]])
    """
    if image.shape[-2:] == size:
        return image
    return _area_sums(image, size) / (image.shape[-2] * image.shape[-1])


def resize_label(label: np.ndarray, size: tuple[int, int], *, n_classes: int) -> np.ndarray:
    """Return [h w] at `size`: every new pixel is the class that covers most of its area, on a tie the lower one.

    >>> resize_label(np.array([[1, 2], [2, 1]], dtype=np.uint8), (1, 1), n_classes=3)
    array([[1]], dtype=uint8)
    """
    if label.shape == size:
        return label
    areas = _area_sums(label == np.arange(n_classes)[:, None, None], size)
    return areas.argmax(axis=0).astype(np.uint8)


def _area_sums(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (_overlaps(n_in, n_out) for n_in, n_out in zip(image.shape[-2:], size, strict=True))
    return rows @ image.astype(np.float64) @ columns.T


def _overlaps(n_in: int, n_out: int) -> np.ndarray:
    """Return [n_out n_in]: the length that an old and a new pixel share, in units that make every length whole."""
    old = np.arange(n_in) * n_out
    new = np.arange(n_out)[:, None] * n_in
    shared = np.minimum(old + n_out, new + n_in) - np.maximum(old, new)
    return np.maximum(shared, 0).astype(np.float64)
