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


def epoch_batches(
    n_images: int, batch_size: int, *, seed: int, fold: int, epoch: int, n_steps: int | None = None
) -> EpochBatches:
    """Return the batches of an epoch, all of one size.

    Args:
        n_images: How many there are.
        batch_size: Of each batch; it is never wider than the number of images.
        seed: The study's.
        fold: Of the images.
        epoch: The first one is 1.
        n_steps: How many batches. None makes an epoch one pass, in which every image occurs; else each epoch goes on in
            the passes where the one before it stopped.

    >>> epoch_batches(5, 2, seed=0, fold=0, epoch=1).indices.shape
    (3, 2)
    """
    if n_steps is None:
        return _pass(n_images, batch_size, seed=seed, fold=fold, number=epoch)
    steps_a_pass = -(-n_images // min(batch_size, n_images))
    first = (epoch - 1) * n_steps
    numbers = range(first // steps_a_pass, (first + n_steps - 1) // steps_a_pass + 1)
    passes = [_pass(n_images, batch_size, seed=seed, fold=fold, number=1 + number) for number in numbers]
    steps = slice(first % steps_a_pass, first % steps_a_pass + n_steps)
    return EpochBatches(*(np.concatenate(each)[steps] for each in zip(*passes, strict=True)))


def _pass(n_images: int, batch_size: int, *, seed: int, fold: int, number: int) -> EpochBatches:
    """Return batches in which every image occurs; the last one is filled up with images that it does not hold yet."""
    rng = generator(seed, "batches", fold, number)
    batch = min(batch_size, n_images)
    steps = -(-n_images // batch)
    order = rng.permutation(n_images)
    last, again = order[(steps - 1) * batch :], rng.permutation(n_images)
    fill = again[~np.isin(again, last)][: steps * batch - n_images]
    indices = np.concatenate([order, fill]).astype(np.int64).reshape(steps, batch)
    return EpochBatches(indices, rng.integers(0, 2, size=(steps, batch, 3), dtype=np.uint8).astype(bool))
