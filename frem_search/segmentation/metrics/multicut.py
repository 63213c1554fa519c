"""V^Rand and V^Info of the cells that a multicut makes of a result, as the gated CLmser paper reports them.

Source: "Regularize network skip connections by gating mechanisms for electron microscopy image segmentation", section
4.2: post-processing by multicut, then the scores of `metrics/rand.py`.
Differs: no threshold is searched for, since the multicut takes probabilities as they are; no border is thinned, since
its regions have none between them. The labels themselves need not score 1: cells of few pixels have no fragment of
their own, and a multicut may join them to their neighbours (V^Rand of ISBI 2012's own labels: 0.98).
"""

from collections.abc import Callable

from jaxtyping import Float, Integer
from torch import Tensor

from frem_search.segmentation.metrics.cells import CELL, cell_score, check_classes
from frem_search.segmentation.metrics.lifted_multicut import multicut
from frem_search.segmentation.metrics.rand import foreground_overlaps, images_with_cells, info_f_score, rand_f_score
from frem_search.segmentation.metrics.regions import Overlaps
from frem_search.segmentation.metrics.score import Score


def v_rand_multicut(pred: Float[Tensor, "n k h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the mean V^Rand in [0, 1] of images cut by `multicut`, computed on the CPU.

    Args:
        pred: Probabilities of membrane and cell.
        target: 0 membrane, 1 cell.
        n_classes: 2.

    Raises:
        UsageError: There are not two classes, or the package bioimage-cpp is not installed.
    """
    check_classes("v_rand_multicut", n_classes, needed=2)
    return _mean_score(rand_f_score, pred, target)


def v_info_multicut(pred: Float[Tensor, "n k h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the mean V^Info in [0, 1] of images cut by `multicut`, computed on the CPU.

    Args:
        pred: Probabilities of membrane and cell.
        target: 0 membrane, 1 cell.
        n_classes: 2.

    Raises:
        UsageError: There are not two classes, or the package bioimage-cpp is not installed.
    """
    check_classes("v_info_multicut", n_classes, needed=2)
    return _mean_score(info_f_score, pred, target)


def _mean_score(
    f_score: Callable[[Overlaps], float], pred: Float[Tensor, "n 2 h w"], target: Integer[Tensor, "n h w"]
) -> Score:
    probs = pred[:, CELL].numpy(force=True)
    scores = [f_score(foreground_overlaps(reference, multicut(probs[i]))) for i, reference in images_with_cells(target)]
    return cell_score(sum(scores) / len(scores) if scores else 0.0, n_classes=2)
