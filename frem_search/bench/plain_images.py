"""Images as a careful user would feed them to a training loop: arrays on the host, changed item by item."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from frem_search.data.augmentation.orientations import eight_orientations
from frem_search.data.augmentation.tiles import cut_tiles
from frem_search.data.borders import border_distances
from frem_search.data.dataset import Dataset
from frem_search.study.parameters import TrainingParams


def part_arrays(
    dataset: Dataset,
    part: Literal["train", "val"],
    *,
    fold: int,
    training: TrainingParams,
    needs_border: bool,
) -> list[np.ndarray]:
    """Return images [n c h w], labels [n h w] and, to train on, distances [n h w] if the loss looks at them.

    Args:
        dataset: At the size that is trained.
        part: Those that validate stay whole.
        fold: Which fold.
        training: It says whether images are cut into tiles and whether each becomes eight.
        needs_border: Whether the loss looks at distances to cells.
    """
    indices = dataset.indices(part, fold=fold)
    arrays = [dataset.images[indices], dataset.labels[indices]]
    if needs_border and part == "train":
        arrays.append(np.stack([border_distances(label) for label in arrays[1]]))
    if training.eightfold:
        arrays = [eight_orientations(array) for array in arrays]
    if training.tiles > 1 and part == "train":
        arrays = [cut_tiles(array, training.tiles) for array in arrays]
    return arrays


class PlainImages(TorchDataset[tuple[Tensor, ...]]):
    """Images with what lies on their pixels, all turned, flipped and cropped alike when they are asked for.

    Args:
        arrays: Images [n c h w], labels [n h w], and whatever else has their rows and columns last.
        rng: From which turns, flips and windows are drawn.
        is_turned: Turn and flip; what is not square, by half turns, so that a batch has one shape.
        crop: Rows and columns of a window at a random place; None keeps whole images.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        rng: np.random.Generator,
        *,
        is_turned: bool = False,
        crop: tuple[int, int] | None = None,
    ) -> None:
        self._arrays, self._rng, self._is_turned, self._crop = arrays, rng, is_turned, crop

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        item = [array[index] for array in self._arrays]
        if self._crop is not None:
            item = self._cropped(item, *self._crop)
        if self._is_turned:
            item = self._turned(item)
        return tuple(torch.from_numpy(each.copy()) for each in item)

    def _cropped(self, item: list[np.ndarray], rows: int, columns: int) -> list[np.ndarray]:
        height, width = item[0].shape[-2:]
        top, left = (int(self._rng.integers(room + 1)) for room in (height - rows, width - columns))
        return [each[..., top : top + rows, left : left + columns] for each in item]

    def _turned(self, item: list[np.ndarray]) -> list[np.ndarray]:
        height, width = item[0].shape[-2:]
        quarter = 1 if height == width else 2
        turns, is_flipped = quarter * int(self._rng.integers(4)), bool(self._rng.integers(2))
        turned = [np.rot90(each, turns, axes=(-2, -1)) for each in item]
        return [each[..., ::-1] for each in turned] if is_flipped else turned
