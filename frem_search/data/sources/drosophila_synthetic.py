"""Generated electron micrographs that stand in for the Drosophila set: same number, size, classes, tiles and folds.

Twenty sections of 1024x1024: thin and thick processes side by side with dark membranes, some cut aslant and blurred;
cytoplasm of uneven grey with vesicles and grain; mitochondria, dark with stripes; synapses, small smudges on membranes.
Sections do not continue each other, but the tiles of a section are one picture. No microscope and no pixel size; the
images are under this project's licence. Double precision throughout, for the reason given in `mouse_synthetic`.
Split: as `drosophila`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from frem_search.data.nnunet import write_folder
from frem_search.data.sources.drosophila import CLASS_NAMES, N_SECTIONS, SECTION_SIZE, tile_folds, tiles
from frem_search.data.sources.geometry import Cells, nearest_cells, pair_values, smooth_field
from frem_search.data.sources.source import Source
from frem_search.seeds import generator

SHAPE = (SECTION_SIZE, SECTION_SIZE)


class Blob(NamedTuple):
    """An ellipse with a bent outline: its window in the section, and a level that grows from 0 there to 1 inside."""

    window: tuple[slice, slice]
    level: np.ndarray


def synthesize_drosophila(folder: Path) -> None:
    """Write the generated tiles as an nnU-Net folder."""
    cases = (tile for i in range(N_SECTIONS) for tile in tiles(i, *draw_section(i)))
    write_folder(
        folder, cases, class_names=CLASS_NAMES, splits=tile_folds(), channel_names=["electrons"], title=SOURCE.title
    )


def draw_section(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one section and its label [h w]; a function of the number alone."""
    rng = generator("drosophila_synthetic", number)
    points = _centres(rng)
    rows, columns = (
        at + 14 * smooth_field(rng, SHAPE, scale=70) + 3 * smooth_field(rng, SHAPE, scale=16)
        for at in np.indices(SHAPE, dtype=np.float64)
    )
    cells = nearest_cells(points, rows, columns, reach=_reach(points))
    half_width = pair_values(rng.uniform(2.1, 4.0, size=(len(points),) * 2), cells) + 0.5 * smooth_field(
        rng, SHAPE, scale=25
    )
    grey = _cytoplasm(rng, cells, len(points))
    label = (cells.wall_distance < half_width).astype(np.uint8)
    slant = pair_values(rng.choice([0.75, 1.0, 2.0], p=[0.5, 0.35, 0.15], size=(len(points),) * 2), cells)
    wall = np.exp(-0.5 * (cells.wall_distance / (0.8 * half_width * slant)) ** 2) / np.sqrt(slant)
    for blob in _mitochondria(rng, cells):
        _stain_mitochondrion(rng, blob, grey, label)
    grey += (rng.uniform(28, 42) + 9 * smooth_field(rng, SHAPE, scale=12) - grey) * np.clip(wall, 0, 1)
    for blob in _synapses(rng, cells):
        _stain_synapse(rng, blob, grey, label)
    return _photograph(rng, grey), label


def _centres(rng: np.random.Generator) -> np.ndarray:
    """Return points that crowd in some places: thin processes run in bundles between thick ones."""
    spacing = np.exp(np.clip(0.75 * smooth_field(rng, SHAPE, scale=170) + 4.05, 3.1, 5.0))
    points = np.empty((0, 2))
    for point in rng.uniform(-60, SECTION_SIZE + 60, size=(6000, 2)):
        row, column = np.clip(point, 0, SECTION_SIZE - 1).astype(int)
        if not len(points) or ((points - point) ** 2).sum(axis=1).min() > spacing[row, column] ** 2:
            points = np.vstack([points, point])
    return points


def _reach(points: np.ndarray) -> np.ndarray:
    """Return how far the cell of each point may extend: further where points lie apart, and the bend on top."""
    apart = np.sort(np.hypot(*(points[:, None] - points).T), axis=0)
    return 1.4 * apart[8] + 60


def _blob(rng: np.random.Generator, centre: np.ndarray, radii: np.ndarray, turn: float) -> Blob:
    reach = 1.5 * radii.max()
    window = tuple(slice(int(max(0, at - reach)), int(np.clip(at + reach, 1, SECTION_SIZE))) for at in centre)
    rows, columns = np.ogrid[window]
    rows, columns = rows - centre[0], columns - centre[1]
    along, across = columns * np.cos(turn) + rows * np.sin(turn), rows * np.cos(turn) - columns * np.sin(turn)
    angle = np.arctan2(across, along)
    outline = 1 + sum(0.045 * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return Blob((window[0], window[1]), 1 - np.hypot(along / radii[0], across / radii[1]) / outline)


def _mitochondria(rng: np.random.Generator, cells: Cells) -> Iterator[Blob]:
    for _ in range(int(rng.integers(23, 36))):
        centres = rng.uniform(0, SECTION_SIZE, size=(30, 2))
        room = cells.wall_distance[tuple(centres.astype(int).T)]
        best = int(np.argmax(np.minimum(room, 32)))
        radius = min(rng.uniform(16, 34), 0.98 * room[best])
        if radius > 10:
            blob = _blob(rng, centres[best], radius * np.array([rng.uniform(1.0, 1.5), 1.0]), rng.uniform(0, np.pi))
            is_own_cell = cells.cell[blob.window] == cells.cell[tuple(centres[best].astype(int))]
            yield Blob(blob.window, np.where(is_own_cell, blob.level, -1))


def _stain_mitochondrion(rng: np.random.Generator, blob: Blob, grey: np.ndarray, label: np.ndarray) -> None:
    is_cytoplasm = label[blob.window] == 0
    inside = np.clip(blob.level * 12, 0, 1) * is_cytoplasm
    rim = np.exp(-0.5 * ((blob.level - 0.08) / 0.06) ** 2)
    rows, columns = np.ogrid[blob.window]
    turn, period = rng.uniform(0, np.pi), rng.uniform(6, 10)
    bend = 2.0 * np.sin(rows / rng.uniform(7, 14)) + 2.0 * np.cos(columns / rng.uniform(7, 14))
    stripes = np.sin(2 * np.pi * (rows * np.cos(turn) + columns * np.sin(turn) + bend) / period)
    stain = rng.uniform(78, 125) + rng.uniform(12, 30) * stripes - 55 * rim
    grey[blob.window] += inside * (stain - grey[blob.window])
    label[blob.window] = np.where((blob.level > 0) & is_cytoplasm, 2, label[blob.window])


def _synapses(rng: np.random.Generator, cells: Cells) -> Iterator[Blob]:
    walls = np.argwhere(cells.wall_distance < 1)
    for centre in walls[rng.integers(0, len(walls), size=int(rng.integers(7, 13)))]:
        yield _blob(rng, centre, np.array([rng.uniform(14, 28), rng.uniform(8, 13)]), rng.uniform(0, np.pi))


def _stain_synapse(rng: np.random.Generator, blob: Blob, grey: np.ndarray, label: np.ndarray) -> None:
    strength = rng.uniform(0.6, 0.95) * np.clip(blob.level * 2.2 + 0.25, 0, 1)
    grey[blob.window] += strength * (rng.uniform(22, 48) - grey[blob.window])
    label[blob.window][blob.level > 0] = 3


def _cytoplasm(rng: np.random.Generator, cells: Cells, n_cells: int) -> np.ndarray:
    grey = np.clip(rng.normal(172, 12, size=n_cells), 140, 200)[cells.cell] + 7 * smooth_field(rng, SHAPE, scale=45)
    crowded = np.clip(
        rng.normal(0.6, 0.35, size=n_cells)[cells.cell] + 0.25 * smooth_field(rng, SHAPE, scale=30), 0.1, 1
    )
    # Where a band-limited field crosses a level lie small closed curves: the outlines of vesicles.
    rings = np.exp(-0.5 * ((smooth_field(rng, SHAPE, scale=5) - 1.1) / 0.3) ** 2)
    specks = np.maximum(smooth_field(rng, SHAPE, scale=3) - 0.6, 0)
    return grey - crowded * (85 * rings + 42 * specks)


def _photograph(rng: np.random.Generator, grey: np.ndarray) -> np.ndarray:
    """Return 8 bit grey values of what the microscope records."""
    from scipy import ndimage

    grain = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 0.7)
    seen = ndimage.gaussian_filter(grey, 0.75) + 34 * grain + 5 * smooth_field(rng, SHAPE, scale=250)
    return np.clip(seen, 0, 255).astype(np.uint8)


SOURCE = Source(
    name="drosophila_synthetic",
    title="Generated electron micrographs with the geometry, classes and folds of drosophila (320 tiles)",
    class_names=CLASS_NAMES,
    prepare=None,
    synthesize=synthesize_drosophila,
    remedy="It is generated on its first use.",
)
