"""nnU-Net v2's raw folders in two dimensions, read and written.

Differs: a fold of `splits_final.json` may have a `test` part, whose cases then lie in imagesTr; imagesTs without
labelsTs is not read, because nothing could be scored on it; regions and the `ignore` label are refused.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from frem_search.data.cases import Case, files_by_name, read_cases
from frem_search.data.folds import Split, k_folds
from frem_search.data.images import write_image
from frem_search.data.nnunet_json import Description, read_description, read_splits
from frem_search.errors import DatasetError


@dataclass(frozen=True, eq=False)
class RawDataset:
    """A folder as it lies on disk: images in their own number type and size.

    The first `n_training` cases are those of imagesTr, the others those of imagesTs.
    """

    folder: Path
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    cases: tuple[Case, ...]
    splits: tuple[Split, ...]
    n_training: int


def read_folder(folder: Path) -> RawDataset:
    """Read and check a whole folder; without `splits_final.json`, five folds follow from the case names."""
    description = read_description(folder)
    training = _read_part(folder, "Tr", description)
    if len(training) != description.n_training:
        message = (
            f"{folder / 'dataset.json'}: expected numTraining to be the {len(training)} cases of imagesTr, but got "
            f"{description.n_training}. Copy the missing images, or correct the number."
        )
        raise DatasetError(message)
    extra_test = _read_part(folder, "Ts", description) if (folder / "labelsTs").is_dir() else []
    names, test_names = [case.name for case in training], [case.name for case in extra_test]
    if twice := sorted(set(names) & set(test_names)):
        message = (
            f"{folder / 'imagesTs'}: expected cases that imagesTr does not have, but got {twice[:5]}. Rename them."
        )
        raise DatasetError(message)
    file = folder / "splits_final.json"
    if file.exists():
        splits = read_splits(file, training=names, extra_test=test_names)
    else:
        splits = k_folds(names, n_folds=5, seed=0, test=test_names)
    return RawDataset(
        folder, description.class_names, description.channel_names, (*training, *extra_test), splits, len(training)
    )


def write_folder(
    folder: Path,
    cases: Iterable[Case],
    *,
    class_names: Sequence[str],
    splits: Sequence[Split],
    channel_names: Sequence[str] = ("grey",),
    title: str = "",
) -> None:
    """Write a folder that `read_folder` reads: PNG for 8 and 16 bit, TIFF for other numbers.

    Args:
        folder: Where to write; it exists.
        cases: Taken one by one, so that a generator need not hold all images.
        class_names: Index = label value.
        splits: The folds; none lets the reader make them.
        channel_names: One name for each channel of an image.
        title: What is shown, in a line.
    """
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    n_cases, ending = 0, ".png"
    for case in cases:
        n_cases += 1
        ending = ".png" if case.image.dtype in (np.uint8, np.uint16) else ".tif"
        for i, channel in enumerate(case.image.reshape(-1, *case.image.shape[-2:])):
            write_image(folder / "imagesTr" / f"{case.name}_{i:04d}{ending}", channel)
        write_image(folder / "labelsTr" / f"{case.name}{ending}", case.label.astype(np.uint8))
    description = {
        "name": title,
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": {name: i for i, name in enumerate(class_names)},
        "numTraining": n_cases,
        "file_ending": ending,
    }
    if splits:
        _write_json(folder / "splits_final.json", [asdict(split) for split in splits])
    _write_json(folder / "dataset.json", description)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_part(folder: Path, part: str, description: Description) -> list[Case]:
    images: dict[str, list[Path]] = {}
    for file in files_by_name(folder / f"images{part}").values():
        match = re.fullmatch(r"(.+)_\d{4}", file.stem)
        name = match[1] if match else file.stem
        channels = images.setdefault(name, [])
        if file.stem != f"{name}_{len(channels):04d}":
            message = (
                f"{file}: expected {name}_{len(channels):04d}{file.suffix}, case and channel, but got {file.name}. "
                "Rename it, or add the channel that is missing before it."
            )
            raise DatasetError(message)
        channels.append(file)
    n_channels, n_classes = len(description.channel_names), len(description.class_names)
    return read_cases(images, folder / f"labels{part}", n_channels=n_channels, n_classes=n_classes)
