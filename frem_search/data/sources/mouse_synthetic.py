"""Generated fluorescence images that stand in for the mouse set: same number, size, classes and split.

Polygonal cells with uneven, broken membranes; round nuclei, none, one or two in a cell, some hardly visible; granules
and cytoplasm that glow by themselves; light that falls off; blur by optics and by what lies out of focus; a dozen
photons in a bright pixel. Some cells store fat: their cytoplasm glows brighter, and their discs are droplets, which
look like nuclei and count as cytoplasm, so that a network needs to see the cell around a disc. Labels are the geometry
before all of that: membranes of 4 to 8 pixels, and whole discs. No microscope and no pixel size; the images are under
this project's licence. Split: as `mouse`.

Double precision throughout: processors round differently in the last bit, and in single precision that would turn a few
grey values, hence the fingerprint, and workers on two machines could not share a study.
"""

from pathlib import Path

import numpy as np

from frem_search.data.cases import Case
from frem_search.data.folds import random_split
from frem_search.data.nnunet import write_folder
from frem_search.data.sources.geometry import Cells, nearest_cells, pair_values, smooth_field
from frem_search.data.sources.mouse import CLASS_NAMES, N_IMAGES, N_TEST, N_TRAIN, N_VAL, SIZE
from frem_search.data.sources.source import Source
from frem_search.seeds import generator

CELL_SIZE = (72, 100)  # pixels from cell to cell; at the 64 pixels of quick studies, a quarter of that
HALF_WIDTH = (2.0, 4.0)  # pixels of a membrane
STORING = 0.4  # share of cells with droplets in the place of nuclei


def synthesize_mouse(folder: Path) -> None:
    """Write the generated images as an nnU-Net folder."""
    cases = [draw_case(i) for i in range(N_IMAGES)]
    split = random_split([case.name for case in cases], n_train=N_TRAIN, n_val=N_VAL, n_test=N_TEST, seed=0)
    write_folder(
        folder, cases, class_names=CLASS_NAMES, splits=[split], channel_names=["fluorescence"], title=SOURCE.title
    )


def draw_case(number: int) -> Case:
    """Draw one image and its label; a function of the number alone."""
    rng = generator("mouse_synthetic", number)
    spacing = rng.uniform(*CELL_SIZE)
    points = _centres(rng, spacing)
    rows, columns = (at + 2.5 * smooth_field(rng, SIZE, scale=18) for at in np.indices(SIZE, dtype=np.float64))
    cells = nearest_cells(points, rows, columns, reach=np.full(len(points), 2.2 * spacing))
    half_width = pair_values(rng.uniform(*HALF_WIDTH, size=(len(points),) * 2), cells)
    is_storing = rng.uniform(size=len(points)) < STORING
    glow, is_nucleus = _discs(rng, points, cells, spacing, is_storing)
    is_membrane = cells.wall_distance < half_width
    label = np.where(is_membrane, 1, np.where(is_nucleus, 2, 0)).astype(np.uint8)
    light = _membranes(rng, cells, half_width, len(points)) + glow + _cytoplasm(rng, cells, is_storing)
    return Case(f"image{number:02d}", _photograph(rng, light), label)


def _centres(rng: np.random.Generator, spacing: float) -> np.ndarray:
    """Return a shaken hexagonal lattice that reaches beyond the image: liver cells are of much the same size."""
    rows, columns = np.meshgrid(
        np.arange(-2, SIZE[0] / spacing * 1.16 + 2), np.arange(-2, SIZE[1] / spacing + 2), indexing="ij"
    )
    lattice = np.stack([rows * 0.866, columns + 0.5 * (rows % 2)], axis=-1).reshape(-1, 2)
    return spacing * (lattice + rng.uniform(-0.27, 0.27, size=lattice.shape) + rng.uniform(0, 1, size=2))


def _discs(
    rng: np.random.Generator, points: np.ndarray, cells: Cells, spacing: float, is_storing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the light of nuclei and droplets [h w], and where the nuclei are."""
    glow, is_nucleus = np.zeros(SIZE), np.zeros(SIZE, dtype=bool)
    rows, columns = np.indices(SIZE, dtype=np.float64)
    for i, point in enumerate(points):
        count = rng.choice(3, p=[0.15, 0.65, 0.2])
        radius = spacing * rng.uniform(0.19, 0.25) * (0.8 if count == 2 else 1.0)
        turn, brightness = (
            rng.uniform(0, 2 * np.pi),
            rng.choice([0.15, 0.55, 0.95], p=[0.2, 0.35, 0.45]) * rng.uniform(0.8, 1.2),
        )
        step = np.array([np.sin(turn), np.cos(turn)]) * (radius + 1.5)
        centres = [point + step, point - step] if count == 2 else [point + rng.normal(0, 2, size=2)] * count
        for row, column in centres:
            window = tuple(slice(int(max(0, at - radius - 2)), int(max(0, at + radius + 3))) for at in (row, column))
            inside = radius - np.hypot(rows[window] - row, columns[window] - column)
            inside = np.where(cells.cell[window] == i, np.minimum(inside, cells.wall_distance[window] - 2.5), -1)
            glow[window] += brightness * np.clip(inside + 0.5, 0, 1)
            if not is_storing[i]:
                is_nucleus[window] |= inside > 0
    return glow * (1 + 0.25 * smooth_field(rng, SIZE, scale=4)), is_nucleus


def _membranes(rng: np.random.Generator, cells: Cells, half_width: np.ndarray, n_cells: int) -> np.ndarray:
    profile = np.exp(-0.5 * (cells.wall_distance / (0.7 * half_width)) ** 2)
    wall = pair_values(rng.lognormal(-0.15, 0.5, size=(n_cells, n_cells)), cells)
    gaps = 1 / (1 + np.exp(-3 * (smooth_field(rng, SIZE, scale=9) + 0.55)))
    return profile * wall * gaps * np.exp(0.3 * smooth_field(rng, SIZE, scale=4))


def _cytoplasm(rng: np.random.Generator, cells: Cells, is_storing: np.ndarray) -> np.ndarray:
    cell = (rng.lognormal(-1.5, 0.2, size=len(is_storing)) * np.where(is_storing, 1.5, 0.5))[cells.cell]
    grain = np.exp(0.35 * smooth_field(rng, SIZE, scale=3) + 0.35 * smooth_field(rng, SIZE, scale=11))
    granules = np.maximum(smooth_field(rng, SIZE, scale=2.5) - 2.3, 0) * (smooth_field(rng, SIZE, scale=20) > 0.3)
    return cell * grain + 0.9 * granules


def _photograph(rng: np.random.Generator, light: np.ndarray) -> np.ndarray:
    """Return 8 bit grey values of what the camera sees."""
    from scipy import ndimage

    sharp = ndimage.gaussian_filter(light, rng.uniform(0.9, 1.6))
    haze = ndimage.gaussian_filter(light, rng.uniform(4, 7))
    share = np.clip(0.4 + 0.15 * smooth_field(rng, SIZE, scale=80), 0.15, 0.8)
    lamp = np.clip(1 + 0.25 * smooth_field(rng, SIZE, scale=130), 0.4, None)
    expected = (0.06 + (1 - share) * sharp + share * haze) * lamp * rng.uniform(9, 16)
    photons = rng.poisson(expected) + rng.normal(0, 0.8, size=SIZE)
    return np.clip(12 + photons * rng.uniform(7, 10), 0, 255).astype(np.uint8)


SOURCE = Source(
    name="mouse_synthetic",
    title="Generated fluorescence images with the geometry, classes and split of mouse (50 images)",
    class_names=CLASS_NAMES,
    prepare=None,
    synthesize=synthesize_mouse,
    remedy="It is generated on its first use.",
)
