"""SEG of the Cell Tracking Challenge: how well each cell of the labels is covered by one cell of the result."""

from jaxtyping import Integer
from torch import Tensor

from frem_search.segmentation.metrics.cells import CELL, cell_score, check_classes
from frem_search.segmentation.metrics.regions import label_regions, overlaps
from frem_search.segmentation.metrics.score import Score


def seg(pred: Integer[Tensor, "n h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the mean over all cells of all labels of a cell's IoU in [0, 1], computed on the CPU.

    Cells are the 4-connected regions of class 1, in labels and result. A cell of the labels is matched by the cell of
    the result that covers more than half of its pixels, of which there is one at most; without any, its IoU is 0. Cells
    that only the result has cost nothing. Labels without a single cell score 0.

    Source: Maska et al., "A benchmark for comparison of cell tracking algorithms", Bioinformatics 30(11), 2014; it is
    the "SegMeasure" of "Segmentation of biological cells with a compressed U-Net".
    Differs: cells are regions of a class instead of numbered ones, so that two cells that touch are one; specks count.
    The source is silent about labels without a cell: 0 and not NaN, because a search cannot rank NaN.

    Args:
        pred: Classes.
        target: Classes.
        n_classes: At least 2.

    Raises:
        UsageError: There is no class 1.

    >>> import torch
    >>> target = torch.tensor([[[1, 1, 1, 0, 1, 1]]])
    >>> pred = torch.tensor([[[1, 1, 0, 0, 0, 1]]])
    >>> seg(pred, target, n_classes=2).value.item()  # 2/3 of the first cell; of the second only half is covered
    0.3333333333333333
    """
    check_classes("seg", n_classes, needed=None)
    total, n_cells = 0.0, 0
    for labels, classes in zip(target.numpy(force=True), pred.numpy(force=True), strict=True):
        found = overlaps(label_regions(labels == CELL), label_regions(classes == CELL))
        is_match = 2 * found.shared > found.reference[found.rows]
        union = found.reference[found.rows] + found.result[found.columns] - found.shared
        total += float((found.shared / union)[is_match].sum())
        n_cells += len(found.reference)
    return cell_score(total / n_cells if n_cells else 0.0, n_classes=n_classes)
