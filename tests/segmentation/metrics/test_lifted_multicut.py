"""The multicut closes gaps that a threshold lets cells run together through."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from frem_search.errors import UsageError
from frem_search.segmentation.metrics.lifted_multicut import multicut
from frem_search.segmentation.metrics.multicut import v_info_multicut, v_rand_multicut
from frem_search.segmentation.metrics.rand import v_info, v_rand
from frem_search.segmentation.metrics.regions import label_regions


def two_cells(*, gap=0, wall=4, sure=0.95):
    """The probability of cell: two rooms with a wall between them that has a gap of so many rows."""
    cell = np.full((48, 70), sure, dtype=np.float32)
    cell[:, 33 : 33 + wall] = 1 - sure
    if gap:
        top = 24 - gap // 2
        cell[top : top + gap, 33 : 33 + wall] = sure
    return cell


def rooms(segmentation):
    """The regions in the middle of the two rooms."""
    return segmentation[24, 16], segmentation[24, 54]


@pytest.mark.parametrize("gap", [2, 6, 10])
@pytest.mark.parametrize("wall", [2, 4, 7])
def test_a_broken_membrane_is_closed_where_a_threshold_merges_two_cells(gap, wall):
    cell = two_cells(gap=gap, wall=wall)
    assert label_regions(cell > 0.5).max() == 1
    segmentation = multicut(cell)
    left, right = rooms(segmentation)
    assert left != right
    assert set(np.unique(segmentation)) == {1, 2}
    # It is closed where the wall was, but for some pixels where it is open.
    assert (segmentation[:, :30] == left).mean() > 0.98
    assert (segmentation[:, 33 + wall + 3 :] == right).mean() > 0.98


def test_lifted_edges_close_a_gap_that_neighbours_alone_would_leave_open(monkeypatch):
    cell = two_cells(gap=16, sure=0.7)
    left, right = rooms(multicut(cell))
    assert left != right
    monkeypatch.setattr("frem_search.segmentation.metrics.lifted_multicut.LIFTED_WEIGHT", 0.0)
    left, right = rooms(multicut(cell))
    assert left == right


@pytest.mark.parametrize(("gap", "wall"), [(22, 2), (36, 4)])
def test_an_opening_as_long_as_the_membrane_is_no_gap(gap, wall):
    left, right = rooms(multicut(two_cells(gap=gap, wall=wall)))
    assert left == right


def test_what_is_hardly_a_membrane_is_no_membrane():
    cell = two_cells()
    left, right = rooms(multicut(np.where(cell > 0.5, cell, np.float32(0.6))))
    assert left == right


def test_cells_are_cut_at_faint_membranes_that_hold_together():
    cell = ndimage.gaussian_filter(two_cells(), 1) + np.random.default_rng(0).normal(0, 0.05, (48, 70))
    left, right = rooms(multicut(cell.astype(np.float32)))
    assert left != right


@pytest.mark.parametrize("seed", range(3))
def test_every_pixel_has_a_region_numbered_from_one_on_and_the_same_again(seed):
    cell = ndimage.gaussian_filter(np.random.default_rng(seed).random((90, 80)), 3)
    cell = ((cell - cell.min()) / np.ptp(cell)).astype(np.float32)
    segmentation = multicut(cell)
    assert segmentation.dtype == np.int32
    assert segmentation.shape == cell.shape
    assert set(np.unique(segmentation)) == set(range(1, segmentation.max() + 1))
    assert segmentation.max() > 2
    for region in range(1, segmentation.max() + 1):
        assert label_regions(segmentation == region).max() == 1
    np.testing.assert_array_equal(multicut(cell.copy()), segmentation)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, np.nan])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (20, 30)])
def test_one_value_everywhere_is_one_region(value, shape):
    np.testing.assert_array_equal(multicut(np.full(shape, value, dtype=np.float32)), np.ones(shape))


def test_a_pixel_that_is_no_number_counts_as_membrane():
    cell = two_cells()
    np.testing.assert_array_equal(
        multicut(np.where(cell > 0.5, cell, np.float32(np.nan))), multicut(np.where(cell > 0.5, cell, np.float32(0)))
    )


def test_probabilities_are_not_changed_and_may_lie_anywhere_in_memory():
    cell = two_cells(gap=6)
    before, across = cell.copy(), np.asfortranarray(cell)
    np.testing.assert_array_equal(multicut(across), multicut(cell))
    np.testing.assert_array_equal(multicut(cell.astype(np.float64)), multicut(cell))
    np.testing.assert_array_equal(cell, before)


def test_the_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bioimage_cpp", None)
    with pytest.raises(
        UsageError, match=r"expected the package bioimage-cpp.*`pip install \"frem-search\[multicut\]\"`"
    ):
        multicut(two_cells())


@pytest.mark.parametrize(("with_multicut", "by_threshold"), [(v_rand_multicut, v_rand), (v_info_multicut, v_info)])
def test_scores_after_multicut_are_better_where_membranes_are_broken(with_multicut, by_threshold):
    cell = torch.from_numpy(np.stack([two_cells(gap=6), two_cells(gap=10)]))
    target = torch.from_numpy(np.stack([two_cells() > 0.5] * 2)).long()
    probabilities = torch.stack([1 - cell, cell], dim=1)
    assert with_multicut(probabilities, target, n_classes=2).value == 1
    assert by_threshold(probabilities, target, n_classes=2).value < 0.7
