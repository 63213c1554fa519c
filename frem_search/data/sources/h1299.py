"""Cells of the human lung cancer line H1299 with a fluorescent marker: 15 frames of one movie, with the cells' edges.

The set of the compressed U-Net paper. Fluorescence microscopy, 512 rows x 640 columns of 16 bit; neither microscope nor
pixel size is known to us. From the Alon lab; labels of Arbelle and Riklin Raviv, arXiv:1709.05860. No licence is
stated: for tests of your own, not to be passed on.
Files: `Train/Raw`, `Train/Seg`, `Val/Raw`, `Val/Seg`, in each `Alon_Lab_H1299_t_<frame>_y_1_x_1.png`. Labels: 0
background, 1 cell, 2 the edge of a cell, which keeps cells that touch apart.
Split: the 11 frames of `Train` train and the 4 of `Val` validate, as given; the latter lie between the former in time.
No frame tests.
Brightness is cut off at the level above which 1 of 10 000 pixels of its frame lie, so that a few hot pixels cannot
squeeze all cells into a small part of the range to which images are normalised. No frame given here loses more than a
little of its brightest spot.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from frem_search.data.cases import Case
from frem_search.data.folds import Split
from frem_search.data.images import read_image, read_label
from frem_search.data.nnunet import write_folder
from frem_search.data.sources.source import Source
from frem_search.errors import DatasetError

FRAMES = {"Train": (1, 2, 6, 15, 20, 25, 30, 35, 50, 65, 70), "Val": (40, 45, 55, 60)}
SIZE = (512, 640)
CLASS_NAMES = ("background", "cell", "edge")
BRIGHTEST_RATIO = 1e-4  # of a frame's pixels, that are cut off


def prepare_h1299(source: Path, folder: Path) -> None:
    """Write `source`, which holds `Train` and `Val`, as an nnU-Net folder."""

    def cases() -> Iterator[Case]:
        for part, frames in FRAMES.items():
            for frame in frames:
                file = f"Alon_Lab_H1299_t_{frame}_y_1_x_1.png"
                image, label = _read_raw(source / part / "Raw" / file), _read_seg(source / part / "Seg" / file)
                yield Case(_name(frame), cut_off(image), label)

    train, val = (tuple(sorted(map(_name, FRAMES[part]))) for part in ("Train", "Val"))
    write_folder(
        folder,
        cases(),
        class_names=CLASS_NAMES,
        splits=[Split(train, val, ())],
        channel_names=["fluorescence"],
        title=SOURCE.title,
    )


def cut_off(image: np.ndarray) -> np.ndarray:
    """Return an image whose brightest pixels are as bright as the next ones.

    >>> frame = np.arange(20_000, dtype=np.uint16)
    >>> int(cut_off(frame).max()), int(cut_off(np.append(frame, np.uint16(65_535))).max())
    (19997, 19998)
    """
    first_kept = -1 - int(BRIGHTEST_RATIO * image.size)
    return np.minimum(image, np.partition(image, first_kept, axis=None)[first_kept])


def _name(frame: int) -> str:
    return f"frame{frame:02d}"


def _read_raw(file: Path) -> np.ndarray:
    _check_present(file)
    image = read_image(file)
    if image.dtype != np.uint16:
        message = (
            f"{file}: expected pixels of 16 bit, but got {image.dtype}: most cells are lost when brightness is "
            "converted. Take the file from the archive again."
        )
        raise DatasetError(message)
    _check_size(file, image.shape, (1, *SIZE))
    return image[0]


def _read_seg(file: Path) -> np.ndarray:
    _check_present(file)
    label = read_label(file)
    _check_size(file, label.shape, SIZE)
    if unknown := sorted(set(np.unique(label).tolist()) - set(range(len(CLASS_NAMES)))):
        message = (
            f"{file}: expected label values 0 (background), 1 (cell) and 2 (edge), but got {unknown[:10]}. "
            "Take the file from the archive again."
        )
        raise DatasetError(message)
    return label.astype(np.uint8)


def _check_present(file: Path) -> None:
    if not file.is_file():
        n_frames = sum(map(len, FRAMES.values()))
        message = f"{file}: expected all {n_frames} frames of the archive, but got no such file. {SOURCE.remedy}"
        raise DatasetError(message)


def _check_size(file: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        message = (
            f"{file}: expected one channel of {SIZE[0]} rows x {SIZE[1]} columns, but got shape {shape}. "
            "Take the file from the archive again."
        )
        raise DatasetError(message)


SOURCE = Source(
    name="h1299",
    title="H1299 cells, fluorescence (15 frames, compressed U-Net paper)",
    class_names=CLASS_NAMES,
    prepare=prepare_h1299,
    synthesize=None,
    remedy=(
        "Get the annotated H1299 frames of the Alon lab from the authors of arXiv:1709.05860 (Arbelle and Riklin "
        "Raviv), as folders Train and Val with Raw and Seg in each, and run "
        "`frem-search data prepare h1299 SOURCE` with the folder that holds both."
    ),
)
