"""One image file in, one array out: PNG and TIFF, with every failure told by file."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from frem_search.errors import DatasetError

ENDINGS = (".png", ".tif", ".tiff")
# imagecodecs raises RuntimeErrors, tifffile ValueErrors and, on cut files, whatever its parser stumbled over.
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, struct.error)


def read_image(file: Path) -> np.ndarray:
    """Return a 2-D image as [c h w] in the file's own number type; an RGB file has three channels."""
    try:
        array = _decode_png(file) if file.suffix.lower() == ".png" else _decode_tiff(file)
    except UNREADABLE as error:
        message = f"{file}: expected a readable PNG or TIFF image, but got: {error}. Copy or export the file again."
        raise DatasetError(message) from error
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if array.dtype.kind not in "uif" or not array.size:
        message = (
            f"{file}: expected pixels of integers or floats, but got {array.dtype} of shape {array.shape}. "
            "Save the image as 8 or 16 bit."
        )
        raise DatasetError(message)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        message = f"{file}: expected finite numbers, but got NaN or infinity. Replace them before the dataset is read."
        raise DatasetError(message)
    return array


def read_label(file: Path) -> np.ndarray:
    """Return a label image as [h w] of integers."""
    array = read_image(file)
    if array.shape[0] != 1 or array.dtype.kind not in "ui":
        message = (
            f"{file}: expected one channel of integers, each the number of a class, but got {array.shape[0]} channels "
            f"of {array.dtype}. Save the labels as 8 bit grey values, not as colours."
        )
        raise DatasetError(message)
    return array[0]


def write_image(file: Path, array: np.ndarray) -> None:
    """Write [h w], or [h w c] for colours; PNG for 8 and 16 bit, TIFF for every number type."""
    if file.suffix.lower() == ".png":
        import imagecodecs

        file.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array), level=4))
        return
    import tifffile

    tifffile.imwrite(file, array, photometric="rgb" if array.ndim == 3 else "minisblack")


def image_files(folder: Path) -> list[Path]:
    """Return the PNG and TIFF files of a folder by name; hidden files are left out."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and not f.name.startswith("."))


def _decode_png(file: Path) -> np.ndarray:
    import imagecodecs

    array: np.ndarray = imagecodecs.png_decode(file.read_bytes())
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _decode_tiff(file: Path) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series: Any = tiff.series[0]
        axes, array = series.axes, series.asarray()
    if axes in ("YX", "SYX", "CYX"):
        return array[None] if array.ndim == 2 else array
    if axes in ("YXS", "YXC"):
        return np.moveaxis(array, -1, 0)
    message = (
        f"{file}: expected a 2-D image, of one or several channels, but got axes {axes} of shape {array.shape}. "
        "Save every section as a file of its own."
    )
    raise DatasetError(message)
