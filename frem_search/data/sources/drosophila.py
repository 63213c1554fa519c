"""Ventral nerve cord of a third instar larva of Drosophila: 20 serial sections with four classes.

The second set of the FREM paper. Serial section transmission electron microscopy, 1024x1024 pixels of 8 bit, 4.6 nm per
pixel, 45-50 nm per section. Licence: CC BY-NC-SA 3.0; cite Gerhard et al. 2013, doi 10.6084/m9.figshare.856713.
URL: https://github.com/unidesigner/groundtruth-drosophila-vnc
Every section is cut into 16 tiles of 256x256 without overlap.
Split: five folds by section, since neighbouring sections show the same cells. Fold k tests sections 4k to 4k + 3, the
next four validate, the other twelve train: 192/64/64 tiles.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from frem_search.data.cases import Case
from frem_search.data.folds import Split, section_folds
from frem_search.data.images import read_image, read_label
from frem_search.data.nnunet import write_folder
from frem_search.data.sources.source import Source
from frem_search.errors import DatasetError

N_SECTIONS, SECTION_SIZE, TILE_SIZE = 20, 1024, 256
CLASS_NAMES = ("cytoplasm", "membrane", "mitochondria", "synapse")
# The archive's README: 0, 32, 64, 96 membranes by direction, 128 their junctions, 159 glia or outside, 255 inside.
VALUE_TO_CLASS = {0: 1, 32: 1, 64: 1, 96: 1, 128: 1, 159: 0, 191: 2, 223: 3, 255: 0}


def prepare_drosophila(source: Path, folder: Path) -> None:
    """Write `source`, the unpacked archive or its `stack1`, as an nnU-Net folder of tiles."""
    stack = source / "stack1" if (source / "stack1").is_dir() else source
    cases = (tile for i in range(N_SECTIONS) for tile in tiles(i, *_read_section(stack, i)))
    write_folder(
        folder, cases, class_names=CLASS_NAMES, splits=tile_folds(), channel_names=["electrons"], title=SOURCE.title
    )


def tiles(section: int, image: np.ndarray, label: np.ndarray) -> Iterator[Case]:
    """Cut a section [h w] into cases, row by row."""
    per_row = SECTION_SIZE // TILE_SIZE
    for tile, name in enumerate(tile_names(section)):
        row, column = (TILE_SIZE * i for i in divmod(tile, per_row))
        window = (slice(row, row + TILE_SIZE), slice(column, column + TILE_SIZE))
        yield Case(name, image[window], label[window])


def tile_names(section: int) -> list[str]:
    """Return the case names of a section.

    >>> tile_names(3)[7]
    'section03_tile07'
    """
    return [f"section{section:02d}_tile{tile:02d}" for tile in range((SECTION_SIZE // TILE_SIZE) ** 2)]


def tile_folds() -> tuple[Split, ...]:
    """Return the five folds by section."""
    return section_folds([tile_names(i) for i in range(N_SECTIONS)], n_test=4, n_val=4)


def _read_section(stack: Path, section: int) -> tuple[np.ndarray, np.ndarray]:
    image_file = stack / "raw" / f"{section:02d}.tif"
    label_file = stack / "labels" / f"labels{section:08d}.png"
    for file in (image_file, label_file):
        if not file.is_file():
            message = (
                f"{file}: expected all {N_SECTIONS} sections of the archive, but got no such file. {SOURCE.remedy}"
            )
            raise DatasetError(message)
    image, label = read_image(image_file), read_label(label_file)
    for file, shape in ((image_file, image.shape), (label_file, (1, *label.shape))):
        if shape != (1, SECTION_SIZE, SECTION_SIZE):
            message = (
                f"{file}: expected one channel of {SECTION_SIZE} x {SECTION_SIZE} pixels, but got shape {shape}. "
                "Take the file from the archive again."
            )
            raise DatasetError(message)
    if unknown := sorted(set(np.unique(label).tolist()) - set(VALUE_TO_CLASS)):
        message = (
            f"{label_file}: expected label values {sorted(VALUE_TO_CLASS)}, but got {unknown}. "
            "Take the file from the archive again."
        )
        raise DatasetError(message)
    table = np.zeros(256, dtype=np.uint8)
    table[list(VALUE_TO_CLASS)] = list(VALUE_TO_CLASS.values())
    return image[0], table[label]


SOURCE = Source(
    name="drosophila",
    title="Nerve cord of a Drosophila larva, electron microscopy (320 tiles of 20 sections, FREM paper)",
    class_names=CLASS_NAMES,
    prepare=prepare_drosophila,
    synthesize=None,
    remedy=(
        "Download the archive groundtruth-drosophila-vnc (doi 10.6084/m9.figshare.856713, or "
        "https://github.com/unidesigner/groundtruth-drosophila-vnc), unpack it and run "
        "`frem-search data prepare drosophila SOURCE` with its folder. "
        "Without it, `--dataset drosophila_synthetic` runs on generated cells."
    ),
)
