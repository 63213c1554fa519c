"""V^Rand and V^Info: how well the regions of a result are those of the labels, whatever the width of membranes.

Source: Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics",
Frontiers in Neuroanatomy 9:142, 2015, eq. 3 and 6 with alpha = 0.5, restricted to the foreground, after border
thinning; and the program with which the ISBI 2012 challenge computes them, Fiji's Trainable Segmentation.

- Foreground restriction: pixels that the labels call membrane are not counted.
- Border thinning: a threshold makes the result cell or membrane, its 4-connected cells grow into the membrane pixel by
  pixel, and a line of one pixel is left where two of them meet. Each pixel of a line is a region of its own.
- The score of a threshold is the mean over images, that of the result the highest over `THRESHOLDS`.

Differs from the paper's text, and agrees with the program: the labels' membranes are not thinned, since they are not
counted; a result that is all membrane is one region, as is one that is all cell.
Differs from the program: pixels that two cells reach at once may lie on the other side of a line, which changes a score
by about 0.001; two images of one region each agree, so that V^Info is 1, not 0; an image whose labels are all membrane
is left out of the mean, and where all are, the score is 0, not NaN.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from frem_search.segmentation.metrics.cells import CELL, cell_score, check_classes
from frem_search.segmentation.metrics.regions import Overlaps, label_regions, overlaps
from frem_search.segmentation.metrics.score import Score

# 0, 0.1, ..., 1 as in the program, whose sum of ten tenths stays just below 1: there, only a sure pixel is cell.
THRESHOLDS = (*(i / 10 for i in range(10)), 1 - 2**-24)


def v_rand(pred: Float[Tensor, "n k h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the best mean F-score of Rand split and Rand merge in [0, 1], computed on the CPU.

    Args:
        pred: Probabilities of membrane and cell.
        target: 0 membrane, 1 cell.
        n_classes: 2.

    Raises:
        UsageError: There are not two classes.

    >>> import torch
    >>> target = torch.tensor([[[1, 1, 0, 1, 1]]])
    >>> cell = torch.tensor([[[0.9, 0.8, 0.75, 0.8, 0.9]]])  # up to 0.7 both cells are one, from 0.75 on two
    >>> v_rand(torch.stack([1 - cell, cell], dim=1), target, n_classes=2).value.item()
    1.0
    >>> cell[..., 2] = 0.95  # all pairs within a cell are found, 8 of 16; with precision 0.5, F is 2/3
    >>> round(v_rand(torch.stack([1 - cell, cell], dim=1), target, n_classes=2).value.item(), 4)
    0.6667
    """
    check_classes("v_rand", n_classes, needed=2)
    return _best_threshold(rand_f_score, pred, target)


def v_info(pred: Float[Tensor, "n k h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the best mean F-score of information split and information merge in [0, 1], computed on the CPU.

    Args:
        pred: Probabilities of membrane and cell.
        target: 0 membrane, 1 cell.
        n_classes: 2.

    Raises:
        UsageError: There are not two classes.

    >>> import torch
    >>> target = torch.tensor([[[1, 1, 0, 1, 1]]])
    >>> probs = torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    >>> v_info(probs, target, n_classes=2).value.item()
    1.0
    """
    check_classes("v_info", n_classes, needed=2)
    return _best_threshold(info_f_score, pred, target)


def rand_f_score(found: Overlaps) -> float:
    """Return the F-score of Rand split and merge (eq. 3): twice the pairs in one region of both, by those of either.

    Args:
        found: Of the counted pixels; those without a region of the result are regions of one pixel.
    """
    # A pixel is paired with itself too, as in the paper's squares of shares. Sums of integers do not round.
    n_alone = found.reference.sum() - found.shared.sum()
    in_reference = np.sum(found.reference**2)
    in_result = np.sum(found.result**2) + n_alone
    in_both = np.sum(found.shared**2) + n_alone
    return float(2 * in_both / (in_reference + in_result))


def info_f_score(found: Overlaps) -> float:
    """Return the F-score of information split and merge (eq. 6): twice the mutual information, by both entropies.

    Args:
        found: Of the counted pixels; those without a region of the result are regions of one pixel.
    """
    n_pixels = int(found.reference.sum())
    of_reference, of_result, of_both = (
        _entropy(counts, n_pixels) for counts in (found.reference, found.result, found.shared)
    )
    total = of_reference + of_result
    return 1.0 if total == 0 else min(1.0, max(0.0, 2 * (total - of_both) / total))


def thin(cells: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Number the 4-connected cells and let them grow until membranes are lines of one pixel, which are 0.

    >>> thin(np.array([[True, False, False, False, True]])).tolist()
    [[1, 1, 0, 2, 2]]
    """
    from scipy import ndimage

    regions = label_regions(cells)
    if regions.max() < 2:  # nobody is met, so that no line is left; without any cell, the membrane is the region
        return np.ones_like(regions)
    # The nearest cell, counted in steps to a neighbour, is the first to arrive: no other lies on the way.
    steps, nearest = ndimage.distance_transform_cdt(~cells, metric="taxicab", return_indices=True)
    grown: np.ndarray = regions[tuple(nearest)]
    return _with_lines(grown, steps)


def _with_lines(grown: Int[np.ndarray, "h w"], steps: Int[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Return grown regions with 0 where neighbours of two regions would touch."""
    is_line = np.zeros(grown.shape, dtype=bool)
    for before, after in (np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:]):
        meets = grown[before] != grown[after]
        # Of two pixels that meet, the one that was reached later; no pixel of a cell, which is reached in no step.
        is_later = steps[after] >= steps[before]
        is_line[after] |= meets & is_later
        is_line[before] |= meets & ~is_later
    thinned = np.pad(np.where(is_line, 0, grown), 1)
    rows, columns = np.nonzero(is_line)
    # A pixel that is left between one region and lines belongs to that region; no two neighbours are asked at once.
    for parity in (0, 1):
        of_parity = (rows + columns) % 2 == parity
        row, column = rows[of_parity] + 1, columns[of_parity] + 1
        own = grown[row - 1, column - 1]
        around = np.stack([thinned[row + up, column + right] for up, right in ((-1, 0), (1, 0), (0, -1), (0, 1))])
        is_needless = ((around == 0) | (around == own)).all(axis=0)
        thinned[row[is_needless], column[is_needless]] = own[is_needless]
    return thinned[1:-1, 1:-1]


def foreground_overlaps(reference: Int[np.ndarray, "h w"], result: Int[np.ndarray, "h w"]) -> Overlaps:
    """Return the overlaps in the pixels where the reference has a region: nothing else is counted."""
    is_counted = reference > 0
    return overlaps(reference[is_counted], result[is_counted])


def images_with_cells(target: Integer[Tensor, "n h w"]) -> Iterator[tuple[int, Int[np.ndarray, "h w"]]]:
    """Yield the position of every image that has a cell, and its cells numbered from 1 on."""
    for i, labels in enumerate(target.numpy(force=True)):
        reference = label_regions(labels == CELL)
        if reference.any():
            yield i, reference


def _best_threshold(
    f_score: Callable[[Overlaps], float], pred: Float[Tensor, "n 2 h w"], target: Integer[Tensor, "n h w"]
) -> Score:
    probs = pred[:, CELL].numpy(force=True)
    scores = [_scores(f_score, probs[i], reference) for i, reference in images_with_cells(target)]
    return cell_score(float(np.mean(scores, axis=0).max()) if scores else 0.0, n_classes=2)


def _scores(
    f_score: Callable[[Overlaps], float], probs: Float[np.ndarray, "h w"], reference: Int[np.ndarray, "h w"]
) -> list[float]:
    """Return the score of an image at each threshold."""
    scores: list[float] = []
    n_before = -1
    for threshold in THRESHOLDS:
        cells = probs > threshold
        n_cells = int(np.count_nonzero(cells))
        # What a higher threshold leaves is a part of what a lower one leaves: with as many pixels it is the same.
        scores.append(scores[-1] if n_cells == n_before else f_score(foreground_overlaps(reference, thin(cells))))
        n_before = n_cells
    return scores


def _entropy(counts: Int[np.ndarray, " n"], n_pixels: int) -> float:
    """Return the entropy in nats of regions of so many pixels, all others being regions of one."""
    ordered = np.sort(counts[counts > 1]).astype(np.float64)  # equal regions in any order have equal sums
    return math.log(n_pixels) - float(np.sum(ordered * np.log(ordered))) / n_pixels
