"""What there is to look at of a trained trial: its learning curve as CSV, some predictions as PNG."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_IMAGES = 4
PANEL = 256  # pixels: larger images are thinned out to this size, smaller ones enlarged towards it
GAP = 6  # pixels between panels
# After Okabe and Ito: colours that people with any kind of colour vision tell apart, the first one for background.
CLASS_COLOURS = (
    (32, 32, 32), (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167),
)  # fmt: skip


def curve_csv(curve: Mapping[str, Sequence[Any]], class_names: Sequence[str]) -> bytes:
    r"""Return a curve as CSV, a row for each epoch; the scores of the classes have a column each.

    >>> curve_csv({"epoch": [1], "score": [0.5], "per_class": [[0.75, None]]}, ("ground", "disc"))
    b'epoch,score,score of ground,score of disc\n1,0.5,0.75,\n'
    """
    header, columns = [], []
    for name, column in curve.items():
        if name != "per_class":
            header.append(name)
            columns.append(column)
            continue
        for i, class_name in enumerate(class_names):
            header.append(f"score of {class_name}")
            columns.append([None if cells is None else cells[i] for cells in column])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue().encode()


def predictions_png(images: np.ndarray, labels: np.ndarray, pred: np.ndarray) -> bytes:
    """Return one picture: a row for each image, in it the image, its label and the prediction.

    Args:
        images: [n c h w], of any range; the first three channels are red, green and blue if there are three.
        labels: [n h w], classes.
        pred: [n h w], classes.
    """
    import imagecodecs

    rows = [
        _beside([_grey(image), _coloured(label), _coloured(classes)])
        for image, label, classes in zip(images, labels, pred, strict=True)
    ]
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(_beside(rows, axis=0)), level=6))


def _beside(panels: list[np.ndarray], *, axis: int = 1) -> np.ndarray:
    gap_shape = [*panels[0].shape]
    gap_shape[axis] = GAP
    gap = np.full(gap_shape, 255, np.uint8)
    return np.concatenate([each for panel in panels for each in (panel, gap)][:-1], axis=axis)


def _sized(panel: np.ndarray) -> np.ndarray:
    """Return [h w ...] thinned out or repeated: classes have nothing in between."""
    longest = max(panel.shape[:2])
    step, times = -(-longest // PANEL), max(1, PANEL // longest)
    return panel[::step, ::step].repeat(times, axis=0).repeat(times, axis=1)


def _grey(image: np.ndarray) -> np.ndarray:
    """Return [c h w] as [h w 3] of bytes: grey values or colours, stretched but for the outermost hundredth."""
    channels = np.moveaxis(image[:3] if len(image) >= 3 else image[:1], 0, -1).astype(np.float64)
    low, high = np.quantile(channels, (0.01, 0.99))
    stretched = _sized((np.clip((channels - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8))
    return np.broadcast_to(stretched, (*stretched.shape[:2], 3))


def _coloured(classes: np.ndarray) -> np.ndarray:
    """Return [h w] of classes as [h w 3] of bytes; the ninth class has the first one's colour again."""
    return np.array(CLASS_COLOURS, np.uint8)[_sized(classes).astype(np.intp) % len(CLASS_COLOURS)]
