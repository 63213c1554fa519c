"""A case is an image and its label; here they are found by name, read and checked against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frem_search.data.images import image_files, read_image, read_label
from frem_search.errors import DatasetError


@dataclass(frozen=True, eq=False)
class Case:
    """One image [c h w], or [h w] for a single channel, and its label [h w]."""

    name: str
    image: np.ndarray
    label: np.ndarray


def files_by_name(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without ending, in order."""
    if not folder.is_dir():
        message = (
            f"{folder}: expected a folder of PNG or TIFF images, but got none. Check the path and the folder's name."
        )
        raise DatasetError(message)
    files: dict[str, Path] = {}
    for file in image_files(folder):
        if file.stem in files:
            message = (
                f"{file}: expected one file of this name, but got {files[file.stem].name} too. Remove one of them."
            )
            raise DatasetError(message)
        files[file.stem] = file
    return files


def read_cases(
    images: Mapping[str, Sequence[Path]], label_folder: Path, *, n_channels: int | None, n_classes: int
) -> list[Case]:
    """Return the cases whose channels are `images`; every image needs its label and every label its image.

    Args:
        images: The files of each case, one per channel, or one that holds all channels.
        label_folder: Where the labels lie, named like the cases.
        n_channels: What each image must have; None takes the first image's number.
        n_classes: Label values lie below it.
    """
    labels = files_by_name(label_folder)
    for name in sorted(set(images) ^ set(labels)):
        file, missing = (images[name][0], "label") if name in images else (labels[name], "image")
        message = f"{file}: expected the {missing} of {name!r} as well, but got none. Add it, or remove this file."
        raise DatasetError(message)
    cases: list[Case] = []
    for name in sorted(images):
        image = _read_channels(images[name], n_channels=n_channels)
        n_channels = len(image)
        cases.append(
            Case(name, image, _read_classes(labels[name], images[name][0], image.shape[1:], n_classes=n_classes))
        )
    return cases


def read_pairs(source: Path, *, n_classes: int) -> list[Case]:
    """Return the cases of a folder with `images/` and `labels/`, whose files go by the same names."""
    images = {name: [file] for name, file in files_by_name(source / "images").items()}
    return read_cases(images, source / "labels", n_channels=None, n_classes=n_classes)


def _read_channels(files: Sequence[Path], *, n_channels: int | None) -> np.ndarray:
    parts = [read_image(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            _refuse_size(file, part.shape[1:], files[0], parts[0].shape[1:])
    image = np.concatenate(parts)
    if n_channels is not None and len(image) != n_channels:
        message = (
            f"{files[0]}: expected {n_channels} channels like the dataset, but got {len(image)}. "
            "Add or remove channels (files <case>_0001 and so on), or correct channel_names in dataset.json."
        )
        raise DatasetError(message)
    return image


def _read_classes(file: Path, image_file: Path, size: tuple[int, ...], *, n_classes: int) -> np.ndarray:
    label = read_label(file)
    if label.shape != size:
        _refuse_size(file, label.shape, image_file, size)
    if label.max() >= n_classes or label.min() < 0:
        values = [int(value) for value in np.unique(label) if not 0 <= value < n_classes]
        message = (
            f"{file}: expected label values from 0 to {n_classes - 1}, one for each class, but got {values[:10]}. "
            "Renumber the labels, or name more classes."
        )
        raise DatasetError(message)
    return label.astype(np.uint8)


def _refuse_size(file: Path, size: tuple[int, ...], other: Path, expected: tuple[int, ...]) -> None:
    message = (
        f"{file}: expected {expected[0]} rows x {expected[1]} columns as in {other}, but got {size[0]} x {size[1]}. "
        "Export both at one size."
    )
    raise DatasetError(message)
