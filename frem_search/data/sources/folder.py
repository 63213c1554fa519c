"""Anybody's images: a folder with `images/` and `labels/` whose PNG or TIFF files go by the same names, of any size.

Labels hold 0, 1, 2, ... for the classes. Split: five folds of shuffled cases; fold k tests the k-th fifth, the next
fifth validates, the rest trains. Three or four cases give as many folds, with one case to test and one to validate.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frem_search.data import DATASETS
from frem_search.data.atomic import build_prepared
from frem_search.data.cases import Case, read_pairs
from frem_search.data.dataset import dataset_name
from frem_search.data.folds import equal_groups, section_folds
from frem_search.data.nnunet import write_folder
from frem_search.errors import DatasetError, UsageError
from frem_search.system.home import datasets_folder


def prepare_folder(
    source: Path,
    folder: Path | None = None,
    *,
    name: str,
    class_names: Sequence[str] | None = None,
    force: bool = False,
) -> Path:
    """Turn a folder of images and labels into an nnU-Net folder and return that.

    Args:
        source: Holds `images/` and `labels/`.
        folder: Where to write; None is the usual place, where `load_dataset` finds it by `name`.
        name: What to call the dataset.
        class_names: Index = label value; None calls them class_0, class_1 and so on, as many as occur.
        force: Replace a prepared folder.
    """
    _check_names(name, class_names)
    cases = read_pairs(source, n_classes=256 if class_names is None else len(class_names))
    groups = equal_groups([case.name for case in cases], n_groups=min(5, len(cases)), seed=0) if cases else []
    splits = section_folds(groups, n_test=1, n_val=1)
    names = _counted_classes(source, cases) if class_names is None else tuple(class_names)

    def write(target: Path) -> None:
        channel_names = [f"channel_{i}" for i in range(len(cases[0].image))]
        write_folder(target, cases, class_names=names, splits=splits, channel_names=channel_names, title=name)

    return build_prepared(folder or datasets_folder() / name, write, force=force)


def _check_names(name: str, class_names: Sequence[str] | None) -> None:
    if name in DATASETS or name != dataset_name(name):
        message = (
            f"--name: expected a new name of a-z, 0-9 and _, not one of {', '.join(DATASETS)}, but got {name!r}. "
            "It becomes part of the names of studies: choose another."
        )
        raise UsageError(message)
    if class_names is not None and (len(set(class_names)) < len(class_names) or len(class_names) < 2):
        message = (
            f"Class names: expected at least two, all different, but got {list(class_names)}. Name every class once."
        )
        raise UsageError(message)


def _counted_classes(source: Path, cases: Sequence[Case]) -> tuple[str, ...]:
    pixels = sum(np.bincount(case.label.ravel(), minlength=256) for case in cases)
    values = np.flatnonzero(pixels).tolist()
    if values != list(range(len(values))) or len(values) < 2:
        message = (
            f"{source / 'labels'}: expected label values 0, 1, 2, ... without gaps, at least two, but got {values}. "
            "Renumber the labels, or name every class, also those that never occur."
        )
        raise DatasetError(message)
    return tuple(f"class_{value}" for value in values)
