"""SEG of the Cell Tracking Challenge, by hand and against scikit-image's regions."""

import numpy as np
import pytest
import torch
from skimage.measure import label as skimage_label

from frem_search.segmentation.metrics.seg import seg


def score(pred, target, *, n_classes=2):
    pred, target = (torch.tensor(each)[None] for each in (pred, target))
    return seg(pred, target, n_classes=n_classes).value.item()


ROW = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]])  # cells of four, two and three pixels


@pytest.mark.parametrize(
    ("pred", "expected"),
    [
        (ROW, 1.0),
        ([[0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]], (3 / 4 + 1 + 1) / 3),
        ([[0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1]], (0 + 1 + 1) / 3),  # half of the first is not more than half
        ([[1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]], (3 / 5 + 1 + 1) / 3),
        ([[0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1]], (0 + 1 + 1) / 3),  # split in halves
        ([[0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]], (4 / 7 + 2 / 7 + 1) / 3),  # merged: both are covered by one
        ([[0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0]], 2 / 3),  # missed
        (np.zeros_like(ROW), 0.0),
    ],
)
def test_small_rows_by_hand(pred, expected):
    assert score(pred, ROW) == pytest.approx(expected, rel=1e-12)


def test_a_cell_that_only_the_result_has_costs_nothing():
    target = np.zeros((9, 9), dtype=np.int64)
    target[:3, :3] = 1
    pred = target.copy()
    pred[5:, 5:] = 1
    assert score(pred, target) == 1


def test_pixels_that_touch_at_a_corner_are_two_cells():
    target = np.eye(2, dtype=np.int64)
    assert score([[1, 0], [0, 0]], target) == 0.5


def test_edges_and_other_classes_are_no_cell_and_part_cells():
    target = np.array([[1, 1, 2, 1, 1, 0]])
    assert score(target, target, n_classes=3) == 1
    assert score([[1, 1, 1, 1, 1, 0]], target, n_classes=3) == pytest.approx(2 / 5)  # each of both is covered by it


def test_every_cell_counts_alike_whatever_image_it_is_in():
    many, one = np.zeros((2, 5, 5), dtype=np.int64)
    many[::2, ::2], one[2, 2] = 1, 1
    pred, target = torch.from_numpy(np.stack([many, 0 * one])), torch.from_numpy(np.stack([many, one]))
    assert seg(pred, target, n_classes=2).value.item() == pytest.approx(9 / 10)


def test_noise_equals_the_definition_on_scikit_images_regions():
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=(2, 40, 30))
    pred = np.where(rng.random(target.shape) < 0.85, target, rng.integers(3, size=target.shape))
    values = []
    for labels, classes in zip(target, pred, strict=True):
        cells, found = (skimage_label(each == 1, connectivity=1) for each in (labels, classes))
        for i in range(1, cells.max() + 1):
            cell = cells == i
            best = [found == j for j in range(1, found.max() + 1) if 2 * (cell & (found == j)).sum() > cell.sum()]
            values.append((cell & best[0]).sum() / (cell | best[0]).sum() if best else 0)
    score = seg(torch.from_numpy(pred), torch.from_numpy(target), n_classes=3)
    assert 0.3 < score.value < 0.9
    assert score.value.item() == pytest.approx(np.mean(values), rel=1e-12)
    assert score.per_class.isnan().tolist() == [True, False, True]
    assert score.per_class[1] == score.value
