"""V^Rand and V^Info, by hand and against scikit-image's tables, errors and watershed."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.metrics import adapted_rand_error, contingency_table, variation_of_information
from skimage.segmentation import watershed

from frem_search.segmentation.metrics.rand import (
    THRESHOLDS,
    foreground_overlaps,
    info_f_score,
    rand_f_score,
    thin,
    v_info,
    v_rand,
)
from frem_search.segmentation.metrics.regions import label_regions, overlaps


def probabilities(cell):
    cell = torch.as_tensor(np.asarray(cell), dtype=torch.float32)
    cell = cell if cell.ndim == 3 else cell[None]
    return torch.stack([1 - cell, cell], dim=1)


def score(function, cell, target):
    target = torch.as_tensor(np.asarray(target)).long()
    return function(probabilities(cell), target if target.ndim == 3 else target[None], n_classes=2).value.item()


def grid(n=3, *, size=20, wall=2):
    """n x n square cells between membranes."""
    cell = np.ones((n * (size + wall) - wall,) * 2, dtype=np.int64)
    for i in range(1, n):
        at = i * (size + wall) - wall
        cell[at : at + wall] = cell[:, at : at + wall] = 0
    return cell


def blurred_sections(n=3, size=160):
    """Bent membranes between cells that differ in size, and a result that misses some of them."""
    rng = np.random.default_rng(0)
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal((size, size)), 7) for _ in range(n)])
    target = np.abs(fields) > 0.25 * fields.std()
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal((size, size)), 2) for _ in range(n)])
    cell = np.stack([ndimage.gaussian_filter(each.astype(float), 1.5) for each in target]) + 1.2 * noise
    return cell.clip(0, 1), target.astype(np.int64)


# ---- F-scores of two segmentations.


def random_segmentations():
    rng = np.random.default_rng(0)
    reference = rng.integers(1, 6, size=(30, 40))
    result = np.where(rng.random(reference.shape) < 0.8, reference, rng.integers(1, 9, size=reference.shape))
    return reference, result


def test_overlaps_equal_scikit_images_table():
    reference, result = random_segmentations()
    reference[3:5], result[4:9] = 0, 0
    table = contingency_table(reference, result).toarray()[1:, 1:]
    found = overlaps(reference, result)
    ours = np.zeros_like(table)
    ours[found.rows, found.columns] = found.shared
    np.testing.assert_array_equal(ours, table)
    np.testing.assert_array_equal(found.reference, np.bincount(reference.ravel())[1:])
    np.testing.assert_array_equal(found.result, np.bincount(result.ravel())[1:])


def test_rand_f_score_counts_pairs_as_scikit_image_does_but_for_pairs_of_a_pixel_with_itself():
    reference, result = random_segmentations()
    found, n = overlaps(reference, result), reference.size
    # scikit-image counts pairs of two pixels, the paper squares of shares: n pairs more in every sum.
    error, precision, recall = adapted_rand_error(reference, result)
    pairs = np.sum(found.shared**2) - n
    assert precision == pytest.approx(pairs / (sum(found.reference**2) - n))
    assert recall == pytest.approx(pairs / (sum(found.result**2) - n))
    in_both, in_either = pairs, (sum(found.result**2) + sum(found.reference**2)) / 2 - n
    assert 1 - error == pytest.approx(in_both / in_either)
    assert rand_f_score(found) == pytest.approx((in_both + n) / (in_either + n), rel=1e-12)


def test_info_f_score_follows_from_scikit_images_variation_of_information():
    reference, result = random_segmentations()
    # H(result | reference) and H(reference | result), in bits.
    splits, merges = variation_of_information(reference, result)
    shares = [np.bincount(each.ravel())[1:] / each.size for each in (reference, result)]
    of_reference, of_result = (-np.sum(each * np.log2(each)) for each in shares)
    mutual = of_reference - merges
    assert mutual == pytest.approx(of_result - splits)
    assert info_f_score(overlaps(reference, result)) == pytest.approx(
        2 * mutual / (of_reference + of_result), rel=1e-12
    )


def test_pixels_without_a_region_are_regions_of_their_own():
    reference, result = random_segmentations()
    result[:4] = 0
    numbered = result.copy()
    numbered[:4] = 100 + np.arange(4 * 40).reshape(4, 40)
    for f_score in (rand_f_score, info_f_score):
        assert f_score(overlaps(reference, result)) == pytest.approx(f_score(overlaps(reference, numbered)), rel=1e-12)


def test_pixels_that_the_reference_calls_membrane_are_not_counted():
    reference, result = random_segmentations()
    reference[10:14] = 0
    changed = result.copy()
    changed[10:14] = 7
    assert (
        foreground_overlaps(reference, changed).shared.sum() == foreground_overlaps(reference, changed).reference.sum()
    )
    for f_score in (rand_f_score, info_f_score):
        assert f_score(foreground_overlaps(reference, result)) == f_score(foreground_overlaps(reference, changed))


# ---- Thinning.


def test_thin_membranes_of_any_width_are_lines_of_one_pixel_in_their_middle():
    for wall in range(1, 8):
        cells = np.ones((4, 10 + wall), dtype=bool)
        cells[:, 5 : 5 + wall] = False
        thinned = thin(cells)
        middle = 5 + wall // 2
        np.testing.assert_array_equal(thinned, np.repeat([[1] * middle + [0] + [2] * (9 + wall - middle)], 4, axis=0))


def test_no_two_regions_touch_after_thinning_and_cells_stay_what_they_are():
    cells = np.random.default_rng(0).random((60, 70)) < 0.5
    thinned = thin(cells)
    for one, other in ((thinned[:, 1:], thinned[:, :-1]), (thinned[1:], thinned[:-1])):
        assert not ((one != other) & (one > 0) & (other > 0)).any()
    np.testing.assert_array_equal(thinned[cells], label_regions(cells)[cells])
    assert 0 < (thinned == 0).mean() < 0.3


def test_no_pixel_of_a_line_is_needless():
    cells, _ = blurred_sections(1)
    thinned = np.pad(thin(cells[0] > 0.5), 1)
    for row, column in zip(*np.nonzero(thinned[1:-1, 1:-1] == 0), strict=True):
        around = thinned[[row, row + 2, row + 1, row + 1], [column + 1, column + 1, column, column + 2]]
        assert len(set(around.tolist()) - {0}) != 1


@pytest.mark.parametrize(
    "cells", [np.zeros((5, 6), bool), np.ones((5, 6), bool), np.eye(6, dtype=bool) & (np.arange(6) < 1)]
)
def test_without_two_cells_all_is_one_region(cells):
    np.testing.assert_array_equal(thin(cells), np.ones(cells.shape))


def watershed_with_lines(cells):
    """What `thin` does, by scikit-image."""
    if not cells.any():
        return np.ones(cells.shape, dtype=np.int64)
    return watershed((~cells).astype(float), skimage_label(cells, connectivity=1), connectivity=1, watershed_line=True)


def test_scores_after_thinning_are_close_to_those_of_scikit_images_watershed():
    cell, target = blurred_sections()
    seen = []
    for image, labels in zip(cell, target, strict=True):
        reference = label_regions(labels == 1)
        for threshold in (0.7, 0.8, 0.9):
            cells = image > threshold
            for f_score in (rand_f_score, info_f_score):
                ours, theirs = (
                    f_score(foreground_overlaps(reference, each)) for each in (thin(cells), watershed_with_lines(cells))
                )
                assert ours == pytest.approx(theirs, abs=2e-3)
                seen.append(theirs)
    assert sum(0.3 < each < 0.97 for each in seen) > 12


# ---- Scores of probabilities.


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_truth_scores_one(function):
    _, target = blurred_sections()
    assert score(function, target, target) == 1


def share_of_regions(table):
    """Precision and recall of pairs from squared shares, in the words of the paper: p_ij, s_i and t_j."""
    p = table / table.sum()
    return np.sum(p**2) / np.sum(p.sum(axis=0) ** 2), np.sum(p**2) / np.sum(p.sum(axis=1) ** 2)


def share_of_information(table):
    """Mutual information by the entropy of either."""
    p = table / table.sum()
    rows, columns = p.sum(axis=1, keepdims=True), p.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mutual = np.nansum(p * np.log(p / (rows * columns)))
        return mutual / -np.nansum(columns * np.log(columns)), mutual / -np.nansum(rows * np.log(rows))


@pytest.mark.parametrize(("function", "shares"), [(v_rand, share_of_regions), (v_info, share_of_information)])
def test_scores_are_those_of_the_papers_formulas_on_scikit_images_tables(function, shares):
    cell, target = blurred_sections()
    means = []
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):  # no lower one is better, which the fields were drawn for
        scores = []
        for image, labels in zip(cell.astype(np.float32), target, strict=True):
            found = watershed_with_lines(image > np.float32(threshold))
            found[found == 0] = found.max() + 1 + np.arange(np.count_nonzero(found == 0))
            reference = skimage_label(labels == 1, connectivity=1)
            table = contingency_table(reference, found, ignore_labels=(0,)).toarray()[1:]
            split, merge = shares(table)
            scores.append(2 * split * merge / (split + merge))
        means.append(np.mean(scores))
    assert 0.6 < max(means) < 0.95
    assert score(function, cell, target) == pytest.approx(max(means), abs=2e-3)


def test_a_merge_by_hand():
    target = grid(2)
    merged = target.copy()
    merged[8, 20:22] = 1  # a hole in the membrane between two of four cells of 400 pixels
    in_reference, in_result, in_both = 4 * 400**2, 800**2 + 2 * 400**2, 4 * 400**2
    assert score(v_rand, merged, target) == pytest.approx(2 * in_both / (in_reference + in_result), rel=1e-12)
    # Entropies: log 4 of four equal cells, 1.5 bits of the result; the result follows from the reference.
    assert score(v_info, merged, target) == pytest.approx(2 * 1.5 / (2 + 1.5), rel=1e-12)


def test_a_split_by_hand():
    target = grid(2)
    split = target.copy()
    split[:20, 5:9] = 0  # through one cell; a line of 20 pixels is left, 7 columns before it and 12 after
    parts = [20 * 7, 20 * 12]
    in_reference, in_result = 4 * 400**2, 3 * 400**2 + sum(part**2 for part in parts) + 20
    assert score(v_rand, split, target) == pytest.approx(2 * in_result / (in_reference + in_result), rel=1e-12)
    shares = np.array([400, 400, 400, *parts, *[1] * 20]) / 1600
    of_result = -np.sum(shares * np.log2(shares))
    assert score(v_info, split, target) == pytest.approx(2 * 2 / (2 + of_result), rel=1e-12)


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_each_merge_and_each_split_costs(function):
    target = grid()
    scores = [1.0]
    for at in (5, 30, 50):
        merged = target.copy()
        merged[5 : at + 1, 20:22] = 1
        merged[at, 42:44] = 1
        scores.append(score(function, merged, target))
        split = target.copy()
        split[:, at] = 0
        assert score(function, split, target) < 1
        both = merged.copy()
        both[:, at] = 0
        assert score(function, both, target) < score(function, split, target)
    assert all(each < 1 for each in scores[1:])


@pytest.mark.parametrize("function", [v_rand, v_info])
@pytest.mark.parametrize("n_pixels", range(1, 9))
def test_wider_membranes_cost_nothing_between_straight_walls(function, n_pixels):
    target = grid()
    wider = ndimage.binary_erosion(target, iterations=n_pixels, border_value=1)
    assert wider.mean() < target.mean() - 0.05
    assert score(function, wider, target) == 1


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_wider_membranes_cost_little_where_they_bend(function):
    _, target = blurred_sections()
    wider = np.stack([ndimage.binary_erosion(each, iterations=1, border_value=1) for each in target])
    assert 0.985 < score(function, wider, target) <= 1


@pytest.mark.parametrize("function", [v_rand, v_info])
@pytest.mark.parametrize("threshold", [*(i / 10 for i in range(10)), 1 - 2**-24, 0.45])
def test_cells_are_what_is_above_a_tenth_or_quite_sure(function, threshold):
    membrane = np.float32(threshold)
    # No other threshold lies between the two: below, all is cell, and above, all is membrane.
    cell = np.where(grid(), np.nextafter(membrane, np.float32(2)), membrane)
    assert (score(function, cell, grid()) == 1) == (threshold in THRESHOLDS)
    assert len(THRESHOLDS) == 11


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_the_threshold_is_one_for_all_images_and_the_mean_is_over_images(function):
    target = np.stack([grid(), grid()])
    cell = target.astype(np.float32)
    cell[0] = 0.45 * cell[0]  # found below 0.4
    cell[1, :, 20:22] = 0.55  # found from 0.6 on
    low, high = score(function, cell > 0.4, target), score(function, cell > 0.6, target)
    assert score(function, cell, target) == pytest.approx(max(low, high), rel=1e-12)
    assert score(function, cell, target) < 1
    assert low == pytest.approx((1 + score(function, cell[1] > 0.4, target[1])) / 2, rel=1e-12)


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_an_image_without_a_cell_is_left_out_of_the_mean(function):
    target = np.stack([grid(), 0 * grid()])
    cell = np.stack([grid(), grid()])
    cell[0, 5, 20:22] = 1
    assert score(function, cell, target) == pytest.approx(score(function, cell[0], target[0]), rel=1e-12)


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_one_cell_found_whole_scores_one_and_cut_less(function):
    target = np.ones((20, 20), dtype=np.int64)
    assert score(function, target, target) == 1
    cut = target.copy()
    cut[9] = 0
    assert score(function, cut, target) < 0.9


@pytest.mark.parametrize("function", [v_rand, v_info])
def test_skipping_equal_thresholds_changes_nothing(function, monkeypatch):
    cell, target = blurred_sections(1)
    expected = score(function, cell, target)
    twice = tuple(sorted([*THRESHOLDS, *THRESHOLDS]))
    monkeypatch.setattr("frem_search.segmentation.metrics.rand.THRESHOLDS", twice)
    assert score(function, cell, target) == expected


def test_half_precision_probabilities_are_taken():
    cell, target = blurred_sections(1)
    score = v_rand(probabilities(cell).to(torch.float16), torch.from_numpy(target), n_classes=2)
    assert 0 < score.value < 1
    assert score.per_class.isnan().tolist() == [True, False]
