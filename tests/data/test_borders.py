"""Distances to the two nearest cells agree with a transform of the whole image for every single cell."""

import time

import numpy as np
import pytest
from scipy import ndimage

from frem_search.data.borders import FAR, border_distances


def by_brute_force(label, cell_class=1):
    """For every pixel and cell the least distance to any of the cell's pixels, one pair of pixels after another."""
    cells, n = ndimage.label(label == cell_class, structure=[[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    here = np.argwhere(np.ones(label.shape))
    each = [np.hypot(*(here[:, None] - np.argwhere(cells == i)).T).min(axis=0) for i in range(1, n + 1)]
    return np.sort(each, axis=0)[:2].sum(axis=0).reshape(label.shape)


def draw(text):
    return np.array([[int(c) for c in row] for row in text.split()], dtype=np.uint8)


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(draw("1000 0000 0000 0001"), id="two specks in corners"),
        pytest.param(draw("110011 110011 000000 111111"), id="cells at every edge of the image"),
        pytest.param(draw("10101 01010 10101"), id="specks that touch at corners are cells of their own"),
        pytest.param(draw("1111111 1000001 1011101 1010101 1011101 1000001 1111111"), id="one within another"),
        pytest.param(draw("1001" + "0" * 60 + "1"), id="one row, the third far away"),
        pytest.param(draw("12021 22222 10001"), id="other classes are ground"),
        pytest.param(draw("11 01 00 10"), id="higher than wide"),
    ],
)
def test_small_images_agree_with_brute_force(label):
    np.testing.assert_allclose(border_distances(label), by_brute_force(label), rtol=1e-6)


@pytest.mark.parametrize("share", [0.002, 0.02, 0.3, 0.7])
@pytest.mark.parametrize("size", [(23, 31), (40, 17)])
def test_random_images_agree_with_brute_force(share, size):
    rng = np.random.default_rng(int(1000 * share))
    label = (rng.random(size) < share).astype(np.uint8)
    label[0, 0] = label[-1, -1] = 1
    np.testing.assert_allclose(border_distances(label), by_brute_force(label), rtol=1e-6)


def test_cells_far_from_each_other_are_found_however_far():
    label = np.zeros((9, 400), np.uint8)
    label[4, 3:6] = label[:2, 390] = label[8, 210] = 1
    np.testing.assert_allclose(border_distances(label), by_brute_force(label), rtol=1e-6)


@pytest.mark.parametrize("text", ["000 000", "010 000", "111 111", "222 220"])
def test_fewer_than_two_cells_are_far_from_everything(text):
    distances = border_distances(draw(text))
    assert distances.dtype == np.float32
    assert (distances == FAR).all()


def test_which_class_is_that_of_cells_can_be_said():
    label = draw("10020 10000 00002")
    np.testing.assert_allclose(border_distances(label, cell_class=2), by_brute_force(label, 2), rtol=1e-6)
    assert (border_distances(label, cell_class=3) == FAR).all()


def make_frame(n_cells=55, size=(512, 640)):
    """Discs at random places, as many and as large as nuclei are in a frame of H1299."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]]
    label = np.zeros(size, np.uint8)
    for r, c, radius in zip(*(rng.uniform(0, n, n_cells) for n in size), rng.uniform(8, 20, n_cells), strict=True):
        label[(rows - r) ** 2 + (columns - c) ** 2 < radius**2] = 1
    return label


def test_a_whole_frame_agrees_with_one_transform_for_each_cell_and_is_quick():
    label = make_frame()
    started = time.process_time()
    distances = border_distances(label)
    seconds = time.process_time() - started
    cells, n = ndimage.label(label)
    assert n > 30
    nearest = np.full((2, *label.shape), np.inf)
    for i in range(1, n + 1):
        nearest = np.sort([*nearest, ndimage.distance_transform_edt(cells != i)], axis=0)[:2]
    np.testing.assert_allclose(distances, nearest.sum(axis=0), rtol=1e-5)
    assert seconds < 1.5  # 0.16 measured
