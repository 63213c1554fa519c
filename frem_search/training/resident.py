"""Images and labels, kept on the training device for the whole run: one copy, whatever folds take from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frem_search.data.augmentation.orientations import N_ORIENTATIONS, eight_orientations
from frem_search.data.augmentation.tiles import cut_tiles
from frem_search.data.borders import border_distances
from frem_search.data.dataset import Dataset
from frem_search.errors import DatasetError
from frem_search.segmentation.batch import Batch


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels on a device, which the parts of all folds share.

    Args:
        images: float32 (n, c, h, w), normalised, channels last in memory.
        labels: uint8 (n, h, w).
        border: float32 (n, h, w), distances to the two nearest cells together; for a loss that needs them, and of the
            images that train or validate.
    """

    images: Tensor
    labels: Tensor
    border: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one part of a fold.

    Args:
        cases: Their names.
        whole: Where they lie among others.
        rows: Their positions there, int64 (n,).
    """

    cases: tuple[str, ...]
    whole: Images
    rows: Tensor

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.whole.images.shape[1:])

    @property
    def images(self) -> Tensor:
        """A copy of all images, channels last in memory."""
        return self.whole.images[self.rows].contiguous(memory_format=torch.channels_last)

    @property
    def labels(self) -> Tensor:
        """A copy of all labels."""
        return self.whole.labels[self.rows]

    @property
    def border(self) -> Tensor | None:
        """A copy of all distances, if there are any."""
        return None if self.whole.border is None else self.whole.border[self.rows]

    def take(self, positions: Tensor) -> Batch:
        """Return copies of some images, with labels and distances.

        Args:
            positions: Among the part's images, int64.
        """
        rows, border = self.rows[positions], self.whole.border
        return Batch(self.whole.images[rows], self.whole.labels[rows], None if border is None else border[rows])


@dataclass(frozen=True, eq=False)
class ResidentData:
    """Training, validation and test images on one device."""

    train: Part
    val: Part
    test: Part
    n_classes: int
    device: torch.device

    @property
    def in_channels(self) -> int:
        """Channels of every image."""
        return self.train.image_shape[0]

    @cached_property
    def class_weights(self) -> Tensor:
        """How much each class counts in losses that weigh classes, float32 (k,)."""
        return balanced_weights(self.train.labels, n_classes=self.n_classes)


def load_resident(
    dataset: Dataset,
    *,
    folds: Sequence[int],
    device: torch.device,
    tiles: int = 1,
    is_eightfold: bool = False,
    needs_border: bool = False,
) -> dict[int, ResidentData]:
    """Copy a dataset to a device, once, and return its folds; regions are a second copy.

    Args:
        dataset: At the size of the training.
        folds: Which folds.
        device: Where to.
        tiles: Training images are cut into so many bands of so many regions; it divides height and width.
        is_eightfold: Every image becomes eight, one for each orientation; they are square.
        needs_border: Whether the loss looks at distances to cells; those of whole images, in their pixels.

    Raises:
        DatasetError: A fold has no image to train on, or none to validate on.
    """
    parts = {(fold, name): _indices(dataset, name, fold=fold) for fold in folds for name in ("train", "val", "test")}
    trains = np.unique(np.concatenate([parts[fold, "train"] for fold in folds]))
    learnt = np.unique(np.concatenate([trains, *(parts[fold, "val"] for fold in folds)]))
    border = _borders(dataset, learnt) if needs_border else None
    names = ("val", "test") if tiles > 1 else ("train", "val", "test")
    everything = np.unique(np.concatenate([parts[fold, name] for fold in folds for name in names]))
    n_orientations = N_ORIENTATIONS if is_eightfold else 1

    def resident(chosen: np.ndarray, *, n_tiles: int) -> Images:
        arrays = {"images": dataset.images[chosen], "labels": dataset.labels[chosen]}
        arrays |= {} if border is None else {"border": border[chosen]}
        if is_eightfold:
            arrays = {key: eight_orientations(array) for key, array in arrays.items()}
        if n_tiles > 1:
            arrays = {key: cut_tiles(array, n_tiles) for key, array in arrays.items()}
        tensors = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
        tensors["images"] = tensors["images"].contiguous(memory_format=torch.channels_last)
        return Images(**tensors)

    whole = resident(everything, n_tiles=1)
    regions = whole if tiles == 1 else resident(trains, n_tiles=tiles)

    def part(fold: int, name: str) -> Part:
        indices = parts[fold, name]
        cases = [dataset.cases[i] for i in indices]
        of, among, n_tiles = (regions, trains, tiles) if name == "train" and tiles > 1 else (whole, everything, 1)
        places = np.searchsorted(among, indices)
        if is_eightfold:
            cases = [f"{case}_{i}" for i in range(n_orientations) for case in cases]
            places = np.concatenate([places + i * len(among) for i in range(n_orientations)])
        if n_tiles > 1:
            cases = [f"{case}_{i}" for case in cases for i in range(n_tiles**2)]
            places = (places[:, None] * n_tiles**2 + np.arange(n_tiles**2)).ravel()
        return Part(tuple(cases), of, torch.from_numpy(places).to(device))

    n_classes = len(dataset.class_names)
    return {
        fold: ResidentData(part(fold, "train"), part(fold, "val"), part(fold, "test"), n_classes, device)
        for fold in folds
    }


def _indices(dataset: Dataset, name: Literal["train", "val", "test"], *, fold: int) -> np.ndarray:
    indices = dataset.indices(name, fold=fold)
    if not len(indices) and name != "test":
        message = f"{dataset.folder}: fold {fold} has no {name} image, but training needs one. Check splits_final.json."
        raise DatasetError(message)
    return indices


def _borders(dataset: Dataset, learnt: np.ndarray) -> np.ndarray:
    """Return the distances of the images that train or validate; the others' are zeros, which nobody reads."""
    border = np.zeros(dataset.labels.shape, dtype=np.float32)
    for i in learnt:
        border[i] = border_distances(dataset.labels[i])
    return border


def balanced_weights(labels: UInt8[Tensor, "n h w"], *, n_classes: int) -> Float[Tensor, " k"]:
    """Return for each class all pixels over (classes times pixels of the class), so that all classes count alike.

    A class without a pixel has weight 0 and is not counted among the classes: no loss meets it in training, and the
    mean weight of a pixel is 1 with and without it.

    >>> balanced_weights(torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8), n_classes=3)
    tensor([0.6667, 2.0000, 0.0000])
    """
    counts = torch.stack([(labels == label).sum() for label in range(n_classes)]).double()
    occurs = counts > 0
    weights = counts.sum() / (occurs.sum() * counts)
    return torch.where(occurs, weights, 0.0).float()
