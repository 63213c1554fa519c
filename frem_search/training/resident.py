"""Images and labels of one fold, kept on the training device for the whole run."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frem_search.data.borders import border_distances
from frem_search.data.dataset import Dataset
from frem_search.data.orientations import N_ORIENTATIONS, eight_orientations
from frem_search.data.tiles import cut_tiles
from frem_search.errors import DatasetError


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one part of a fold.

    Args:
        cases: Their names.
        images: float32 (n, c, h, w), normalised, channels last in memory.
        labels: uint8 (n, h, w).
        border: float32 (n, h, w), distances to the two nearest cells together; for a loss that needs them.
    """

    cases: tuple[str, ...]
    images: Tensor
    labels: Tensor
    border: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cases)


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
        return int(self.train.images.shape[1])

    @cached_property
    def class_weights(self) -> Tensor:
        """How much each class counts in losses that weigh classes, float32 (k,)."""
        return balanced_weights(self.train.labels, n_classes=self.n_classes)


def load_resident(
    dataset: Dataset,
    *,
    fold: int,
    device: torch.device,
    tiles: int = 1,
    is_eightfold: bool = False,
    needs_border: bool = False,
) -> ResidentData:
    """Copy one fold of a dataset to a device.

    Args:
        dataset: At the size of the training.
        fold: Which fold.
        device: Where to.
        tiles: Training images are cut into so many bands of so many regions; it divides height and width.
        is_eightfold: Every image becomes eight, one for each orientation; they are square.
        needs_border: Whether the loss looks at distances to cells; those of whole images, in their pixels.

    Raises:
        DatasetError: The fold has no image to train on, or none to validate on.
    """

    def part(name: str) -> Part:
        indices = dataset.indices(name, fold=fold)  # type: ignore[arg-type]
        if not len(indices) and name != "test":
            message = (
                f"{dataset.folder}: fold {fold} has no {name} image, but training needs one. Check splits_final.json."
            )
            raise DatasetError(message)
        cases = [dataset.cases[i] for i in indices]
        arrays = {"images": dataset.images[indices], "labels": dataset.labels[indices]}
        if needs_border and name == "train":
            arrays["border"] = np.stack([border_distances(label) for label in arrays["labels"]])
        if is_eightfold:
            arrays = {key: eight_orientations(array) for key, array in arrays.items()}
            cases = [f"{case}_{i}" for i in range(N_ORIENTATIONS) for case in cases]
        if tiles > 1 and name == "train":
            arrays = {key: cut_tiles(array, tiles) for key, array in arrays.items()}
            cases = [f"{case}_{i}" for case in cases for i in range(tiles**2)]
        tensors = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
        tensors["images"] = tensors["images"].contiguous(memory_format=torch.channels_last)
        return Part(tuple(cases), **tensors)

    return ResidentData(part("train"), part("val"), part("test"), len(dataset.class_names), device)


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
