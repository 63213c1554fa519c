"""What a dataset contains, as numbers and as lines of text."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frem_search.data.fingerprint import fingerprint
from frem_search.data.nnunet import RawDataset


@dataclass(frozen=True)
class DatasetSummary:
    """The content of a dataset.

    Args:
        name: As it was asked for.
        folder: Where it lies.
        n_cases: Images with labels.
        sizes: Rows, columns and how many images have them, the most frequent first.
        channel_names: One for each channel.
        dtypes: The number types of the image files.
        class_ratios: The share of all pixels by class name, in [0, 1].
        split_sizes: Train, validation and test cases of each fold.
        fingerprint: SHA-256 of the content.
    """

    name: str
    folder: Path
    n_cases: int
    sizes: tuple[tuple[int, int, int], ...]
    channel_names: tuple[str, ...]
    dtypes: tuple[str, ...]
    class_ratios: dict[str, float]
    split_sizes: tuple[tuple[int, int, int], ...]
    fingerprint: str


def summarize(name: str, raw: RawDataset) -> DatasetSummary:
    """Count what `raw` contains."""
    sizes = Counter(case.label.shape for case in raw.cases)
    pixels = sum(np.bincount(case.label.ravel(), minlength=len(raw.class_names)) for case in raw.cases)
    ratios = np.asarray(pixels) / np.sum(pixels)
    return DatasetSummary(
        name=name,
        folder=raw.folder,
        n_cases=len(raw.cases),
        sizes=tuple((rows, columns, count) for (rows, columns), count in sizes.most_common()),
        channel_names=raw.channel_names,
        dtypes=tuple(sorted({str(case.image.dtype) for case in raw.cases})),
        class_ratios={name: float(ratio) for name, ratio in zip(raw.class_names, ratios, strict=True)},
        split_sizes=tuple((len(split.train), len(split.val), len(split.test)) for split in raw.splits),
        fingerprint=fingerprint(raw),
    )


def summary_lines(summary: DatasetSummary) -> list[str]:
    """Return the summary as text, one fact a line."""
    sizes = ", ".join(f"{rows} x {columns} ({count})" for rows, columns, count in summary.sizes)
    ratios = ", ".join(f"{name} {100 * ratio:.3g} %" for name, ratio in summary.class_ratios.items())
    folds = [
        f"fold {k}: {n_train} train, {n_val} validation, {n_test} test"
        for k, (n_train, n_val, n_test) in enumerate(summary.split_sizes)
    ]
    return [
        f"dataset: {summary.name}",
        f"folder: {summary.folder}",
        f"cases: {summary.n_cases}",
        f"rows x columns (images): {sizes}",
        f"channels: {', '.join(summary.channel_names)} ({', '.join(summary.dtypes)})",
        f"pixels: {ratios}",
        *folds,
        f"fingerprint: {summary.fingerprint}",
    ]
