"""Datasets on disk: bring one, generate one, find one, list them, look into one."""

from pathlib import Path
from typing import NamedTuple

from frem_search.data import DATASETS
from frem_search.data.atomic import build_folder, build_prepared, is_filled
from frem_search.data.nnunet import read_folder
from frem_search.data.sources.source import Source
from frem_search.data.summary import DatasetSummary, summarize, summary_lines
from frem_search.errors import DatasetError, UnknownDatasetError, UsageError, did_you_mean
from frem_search.system.home import datasets_folder

__all__ = [
    "DatasetRow",
    "DatasetSummary",
    "check",
    "find_folder",
    "list_datasets",
    "prepare",
    "summary_lines",
    "synthesize",
]


class DatasetRow(NamedTuple):
    """One line of `frem-search data list`."""

    name: str
    title: str
    is_present: bool
    folder: Path


def prepare(name: str, source: Path, *, folder: Path | None = None, force: bool = False) -> Path:
    """Turn the source folder of a named dataset into an nnU-Net folder and return that folder.

    Args:
        name: A name of `DATASETS` whose images the user brings.
        source: The unpacked archive.
        folder: Where to write; None is the usual place, where `load_dataset` looks.
        force: Replace a prepared folder.
    """
    write = _source(name).prepare
    if write is None:
        message = (
            f"{name}: expected a dataset of real images, but got a generated one. It needs no source: use its name."
        )
        raise UsageError(message)
    return build_prepared(folder or datasets_folder() / name, lambda beside: write(source, beside), force=force)


def synthesize(name: str, *, folder: Path | None = None, force: bool = False) -> Path:
    """Generate a named dataset, unless another process was faster, and return its folder."""
    write = _source(name).synthesize
    if write is None:
        message = f"{name}: expected a generated dataset, but got one of real images. {DATASETS[name].remedy}"
        raise UsageError(message)
    target = folder or datasets_folder() / name
    build_folder(target, write, force=force)
    return target


def find_folder(name: str) -> Path:
    """Return the folder of a dataset: a name of `DATASETS`, the name of a prepared folder, or a path."""
    usual = datasets_folder() / name
    if name in DATASETS:
        if is_filled(usual):
            return usual
        if DATASETS[name].synthesize:
            return synthesize(name)
        message = f"Dataset {name!r}: expected its images in {usual}, but got none. {DATASETS[name].remedy}"
        raise DatasetError(message)
    if usual.parent == datasets_folder() and is_filled(usual):
        return usual
    if is_filled(path := Path(name).expanduser()):
        return path.resolve()
    raise _unknown(name)


def check(name: str) -> DatasetSummary:
    """Read a whole dataset, with every check that a search would make, and return what is in it."""
    return summarize(name, read_folder(find_folder(name)))


def list_datasets() -> list[DatasetRow]:
    """Return the named datasets, then the other folders that were prepared under the usual place."""
    usual = datasets_folder()
    rows = [DatasetRow(name, source.title, is_filled(usual / name), usual / name) for name, source in DATASETS.items()]
    others = sorted(file.parent for file in usual.glob("[!.]*/dataset.json") if file.parent.name not in DATASETS)
    return rows + [
        DatasetRow(folder.name, "a folder that was prepared here", is_present=True, folder=folder) for folder in others
    ]


def _source(name: str) -> Source:
    if name in DATASETS:
        return DATASETS[name]
    raise _unknown(name)


def _unknown(name: str) -> UnknownDatasetError:
    hint, known = did_you_mean(name, DATASETS), ", ".join(DATASETS)
    message = f"Unknown dataset {name!r}.{hint} Known: {known}, or the path of a folder in nnU-Net's layout."
    return UnknownDatasetError(message)
