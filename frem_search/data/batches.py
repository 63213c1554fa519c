"""The order and the turns of one epoch's images, a function of seed, fold and epoch alone."""

from typing import NamedTuple

import numpy as np

from frem_search.seeds import generator


class EpochBatches(NamedTuple):
    """What each step of an epoch trains on.

    Args:
        indices: Positions among the training images, int64 [steps batch].
        flags: Transpose, flip rows, flip columns, bool [steps batch 3].
    """

    indices: np.ndarray
    flags: np.ndarray


def epoch_batches(n_images: int, batch_size: int, *, seed: int, fold: int, epoch: int) -> EpochBatches:
    """Return the batches of an epoch, all of one size, in which every image occurs.

    The last batch is filled up with images that it does not hold yet. A batch is never wider than the number of images.

    >>> epoch_batches(5, 2, seed=0, fold=0, epoch=1).indices.shape
    (3, 2)
    """
    rng = generator(seed, "batches", fold, epoch)
    batch = min(batch_size, n_images)
    steps = -(-n_images // batch)
    order = rng.permutation(n_images)
    last, again = order[(steps - 1) * batch :], rng.permutation(n_images)
    fill = again[~np.isin(again, last)][: steps * batch - n_images]
    indices = np.concatenate([order, fill]).astype(np.int64).reshape(steps, batch)
    return EpochBatches(indices, rng.integers(0, 2, size=(steps, batch, 3), dtype=np.uint8).astype(bool))
