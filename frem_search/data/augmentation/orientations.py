"""Every image in its eight orientations: a data set of eight times as many images."""

import numpy as np

N_ORIENTATIONS = 8


def eight_orientations(images: np.ndarray) -> np.ndarray:
    """Return images [8n ... s s]: all as they are, then all turned by one, two and three quarters, then the mirrored.

    Source: "Feedback U-net for Cell Image Segmentation", section 4.1: 400 images of 50, by quarter turns and flips.
    Differs: nothing.

    Args:
        images: Square ones [n ... s s]; labels too.

    >>> eight_orientations(np.array([[[1, 2], [3, 4]]]))[[0, 1, 4]].tolist()
    [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[2, 1], [4, 3]]]
    """
    mirrored = np.flip(images, axis=-1)
    return np.concatenate([np.rot90(each, turns, axes=(-2, -1)) for each in (images, mirrored) for turns in range(4)])
