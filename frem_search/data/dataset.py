"""A dataset in memory: every image at one size and normalised, every label, the folds and a fingerprint."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from frem_search.data import DATASETS
from frem_search.data.cases import Case
from frem_search.data.catalogue import find_folder
from frem_search.data.fingerprint import fingerprint
from frem_search.data.folds import Split, cyclic_folds, k_folds
from frem_search.data.nnunet import RawDataset, read_folder
from frem_search.data.resize import resize_image, resize_label
from frem_search.errors import DatasetError

__all__ = ["Dataset", "Split", "dataset_name", "load_dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, labels and folds.

    Args:
        name: The registry's name, or one made from the folder's.
        folder: Where it lies.
        class_names: Index = label value.
        channel_names: One for each channel of an image.
        cases: Names in the order of images and labels.
        images: float32 [n c h w], each image and channel with zero mean and unit variance.
        labels: uint8 [n h w].
        splits: The folds.
        fingerprint: SHA-256 of the content before it was resized.
    """

    name: str
    folder: Path
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    cases: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    splits: tuple[Split, ...]
    fingerprint: str

    def indices(self, part: Literal["train", "val", "test"], *, fold: int) -> np.ndarray:
        """Return the positions in `cases`, int64, of one part of a fold."""
        if not 0 <= fold < len(self.splits):
            message = (
                f"{self.folder}: expected a fold from 0 to {len(self.splits) - 1}, but got {fold}. Choose one of these."
            )
            raise DatasetError(message)
        positions = {case: i for i, case in enumerate(self.cases)}
        return np.array([positions[case] for case in getattr(self.splits[fold], part)], dtype=np.int64)


def load_dataset(name: str, *, image_size: int | tuple[int, int] | None = None, n_folds: int | None = None) -> Dataset:
    """Return a dataset at one size; a generated one is generated on its first use.

    Args:
        name: A name of `DATASETS`, the name of a prepared folder, or a path to an nnU-Net folder.
        image_size: Rows and columns, one number for a square; None keeps the files' size, which must then be one.
        n_folds: Of a cross-validation; None keeps the folder's own folds.
    """
    raw = read_folder(find_folder(name))
    size = _common_size(raw) if image_size is None else _pair(image_size)
    n_classes = len(raw.class_names)
    return Dataset(
        name=dataset_name(name),
        folder=raw.folder,
        class_names=raw.class_names,
        channel_names=raw.channel_names,
        cases=tuple(case.name for case in raw.cases),
        images=np.stack([normalise(resize_image(case.image, size)) for case in raw.cases]),
        labels=np.stack([resize_label(case.label, size, n_classes=n_classes) for case in raw.cases]),
        splits=raw.splits if n_folds is None else cross_validation(raw, n_folds),
        fingerprint=fingerprint(raw),
    )


def cross_validation(raw: RawDataset, n_folds: int) -> tuple[Split, ...]:
    """Return the folds of a cross-validation.

    Of a folder with several folds they are its own, the first ones if fewer are wanted: they may keep together what
    belongs together, as the tiles of a section. Else they have the sizes of its only fold; if that tests nothing, every
    image validates once. Images of imagesTs are for testing whatever the folds are.

    Raises:
        DatasetError: The folder has several folds, but fewer, or there are too few images.
    """
    if len(raw.splits) >= n_folds:
        return raw.splits[:n_folds]
    if len(raw.splits) > 1:
        message = f"{raw.folder}: expected at most {len(raw.splits)} folds, those of the dataset, but got {n_folds}."
        raise DatasetError(message + " Choose fewer, or write more of them into splits_final.json.")
    cases = [case.name for case in raw.cases[: raw.n_training]]
    held_out = tuple(case.name for case in raw.cases[raw.n_training :])
    n_test = len(set(raw.splits[0].test) - set(held_out))
    if n_test:
        folds = cyclic_folds(cases, n_folds=n_folds, n_test=n_test, n_val=len(raw.splits[0].val), seed=0)
        return tuple(replace(fold, test=(*fold.test, *held_out)) for fold in folds)
    if n_folds > len(cases):
        message = f"{raw.folder}: expected at least {n_folds} images for {n_folds} folds, but got {len(cases)}."
        raise DatasetError(message + " Choose fewer folds.")
    return k_folds(cases, n_folds=n_folds, seed=0, test=held_out)


def dataset_name(name: str) -> str:
    """Return a registry name unchanged and a folder's last component in snake case, as part of a study's name.

    >>> dataset_name("mouse"), dataset_name("/somewhere/Dataset001_Liver 2/")
    ('mouse', 'dataset001_liver_2')
    """
    if name in DATASETS:
        return name
    return re.sub(r"[^a-z0-9]+", "_", Path(name).resolve().name.lower()).strip("_") or "folder"


def normalise(image: np.ndarray) -> np.ndarray:
    """Return [c h w] as float32 with zero mean and unit variance in every channel; a constant channel becomes zeros."""
    centred = image - image.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    deviation = centred.std(axis=(1, 2), keepdims=True)
    # Rounding in the mean leaves a constant channel with a deviation around 1e-16 of its value, never exactly zero.
    is_constant = deviation <= 1e-7 * np.abs(image).max(axis=(1, 2), keepdims=True)
    return np.where(is_constant, 0.0, centred / np.where(is_constant, 1.0, deviation)).astype(np.float32)


def _common_size(raw: RawDataset) -> tuple[int, int]:
    first = raw.cases[0]
    for case in raw.cases:
        if case.label.shape != first.label.shape:
            message = (
                f"{raw.folder}: expected images of one size, but got {_size(first)} and {_size(case)}. "
                "Set params.image_size in the study file."
            )
            raise DatasetError(message)
    rows, columns = first.label.shape
    return rows, columns


def _size(case: Case) -> str:
    return f"{case.name!r} with {case.label.shape[0]} x {case.label.shape[1]}"


def _pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(rows, columns) < 1:
        message = f"params.image_size: expected at least 1 x 1 pixel, but got {rows} x {columns}. Choose a larger size."
        raise DatasetError(message)
    return rows, columns
