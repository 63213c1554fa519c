"""Images and labels of one fold, kept on the training device for the whole run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from frem_search.data.dataset import Dataset
from frem_search.errors import DatasetError


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one part of a fold.

    Args:
        cases: Their names.
        images: float32 (n, c, h, w), normalised, channels last in memory.
        labels: uint8 (n, h, w).
    """

    cases: tuple[str, ...]
    images: Tensor
    labels: Tensor

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


def load_resident(dataset: Dataset, *, fold: int, device: torch.device) -> ResidentData:
    """Copy one fold of a dataset to a device.

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
        images = torch.from_numpy(dataset.images[indices])
        labels = torch.from_numpy(dataset.labels[indices])
        return Part(
            cases=tuple(dataset.cases[i] for i in indices),
            images=images.to(device).contiguous(memory_format=torch.channels_last),
            labels=labels.to(device),
        )

    return ResidentData(part("train"), part("val"), part("test"), len(dataset.class_names), device)
