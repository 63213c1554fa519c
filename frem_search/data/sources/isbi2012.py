"""Ventral nerve cord of a first instar larva of Drosophila: 30 serial sections, membranes against cells.

The training volume of the ISBI 2012 challenge, the set of the gated CLmser paper. Serial section transmission electron
microscopy, 512x512 pixels of 8 bit, 4 nm per pixel, 50 nm per section. Licence: for non-commercial segmentation
software; cite Cardona et al. 2010, doi 10.1371/journal.pbio.1000502.
URL: https://imagej.net/events/isbi-2012-segmentation-challenge
Files: `train-volume.tif` and `train-labels.tif`, a page for each section; 255 is the inside of a cell, 0 membrane.
Split: 25 sections train and 5 validate, drawn once with a fixed seed, since the paper draws them and names none. So a
validation section may lie between two training sections of the same cells. No section tests: the challenge never gave
the labels of its test volume away.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from frem_search.data.cases import Case
from frem_search.data.folds import random_split
from frem_search.data.nnunet import write_folder
from frem_search.data.pages import read_pages
from frem_search.data.sources.source import Source
from frem_search.errors import DatasetError

N_SECTIONS, SIZE = 30, 512
N_TRAIN, N_VAL = 25, 5
VOLUME, LABELS = "train-volume.tif", "train-labels.tif"
CLASS_NAMES = ("membrane", "cell")
INSIDE = 255  # of a cell, in the labels
_AGAIN = "Take the file from the challenge again, without converting it."


def prepare_isbi2012(source: Path, folder: Path) -> None:
    """Write `source`, which holds the two stacks, as an nnU-Net folder."""
    volume, labels = (_read_stack(source / name) for name in (VOLUME, LABELS))
    if unknown := sorted(set(np.unique(labels).tolist()) - {0, INSIDE}):
        message = (
            f"{source / LABELS}: expected label values 0 (membrane) and {INSIDE} (cell), but got {unknown[:10]}. "
            f"{_AGAIN}"
        )
        raise DatasetError(message)
    names = [f"section{i:02d}" for i in range(N_SECTIONS)]
    split = random_split(names, n_train=N_TRAIN, n_val=N_VAL, n_test=0, seed=0)

    def cases() -> Iterator[Case]:
        for name, image, label in zip(names, volume, labels, strict=True):
            yield Case(name, image, (label == INSIDE).astype(np.uint8))

    write_folder(
        folder, cases(), class_names=CLASS_NAMES, splits=[split], channel_names=["electrons"], title=SOURCE.title
    )


def _read_stack(file: Path) -> np.ndarray:
    """Return all pages of a file [30 512 512]."""
    if not file.is_file():
        message = f"{file}: expected the stacks {VOLUME} and {LABELS}, but got no such file. {SOURCE.remedy}"
        raise DatasetError(message)
    pages = read_pages(file)
    if len(pages) != N_SECTIONS:
        message = f"{file}: expected {N_SECTIONS} pages, one for each section, but got {len(pages)}. {_AGAIN}"
        raise DatasetError(message)
    for i, page in enumerate(pages):
        if page.shape != (1, SIZE, SIZE) or page.dtype != np.uint8:
            message = (
                f"{file}: page {i}: expected one channel of {SIZE} x {SIZE} pixels of uint8, but got shape "
                f"{page.shape} of {page.dtype}. {_AGAIN}"
            )
            raise DatasetError(message)
    return np.concatenate(pages)


SOURCE = Source(
    name="isbi2012",
    title="Nerve cord of a Drosophila larva, membranes, electron microscopy (30 sections, gated CLmser paper)",
    class_names=CLASS_NAMES,
    prepare=prepare_isbi2012,
    synthesize=None,
    remedy=(
        "Download train-volume.tif and train-labels.tif of the ISBI 2012 challenge "
        "(https://imagej.net/events/isbi-2012-segmentation-challenge) and run "
        "`frem-search data prepare isbi2012 SOURCE` with their folder."
    ),
)
