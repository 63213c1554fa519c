"""All images of one file: a PNG holds one, a TIFF one for each page."""

from pathlib import Path

import numpy as np

from frem_search.data.images import UNREADABLE, read_image
from frem_search.errors import DatasetError


def read_pages(file: Path) -> list[np.ndarray]:
    """Return the images of a file as [c h w]; channels that a TIFF itself calls channels are those of one image.

    Raises:
        DatasetError: It cannot be read, or its pixels are no finite numbers.
    """
    pages = [] if file.suffix.lower() == ".png" else _stack(file)
    if len(pages) < 2:
        return [read_image(file)]
    if any(page.dtype.kind not in "uif" or not np.isfinite(page).all() for page in pages):
        message = f"{file}: expected pages of finite numbers, but got {pages[0].dtype} or NaN. Save it as 8 or 16 bit."
        raise DatasetError(message)
    return pages


def _stack(file: Path) -> list[np.ndarray]:
    """Return the pages of a TIFF; none of a file that holds one image or cannot be read, which `read_image` tells."""
    import tifffile

    try:
        with tifffile.TiffFile(file) as tiff:
            return [page for series in tiff.series for page in _split(series.axes, series.asarray())]
    except UNREADABLE:
        return []


def _split(axes: str, array: np.ndarray) -> list[np.ndarray]:
    if not axes.endswith(("YX", "YXS", "YXC")):
        message = f"axes {axes}"
        raise ValueError(message)
    if axes.endswith(("YXS", "YXC")):
        array = np.moveaxis(array, -1, -3)
    elif not axes.endswith(("SYX", "CYX")):
        array = array[..., None, :, :]
    array = array.astype(np.uint8) if array.dtype.kind == "b" else array
    return list(array.reshape(-1, *array.shape[-3:]))
