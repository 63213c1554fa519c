"""Intersection over union: from one confusion matrix over all pixels of all images, and of cells by the frame."""

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from frem_search.segmentation.metrics.cells import CELL, check_classes
from frem_search.segmentation.metrics.score import Score


def confusion_matrix(
    pred: Integer[Tensor, "*pixels"], target: Integer[Tensor, "*pixels"], *, n_classes: int
) -> Int[Tensor, "k k"]:
    """Count the pixels of each target class (rows) and predicted class (columns); matrices of batches may be summed.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), n_classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    cells = (target.long() * n_classes + pred.long()).flatten()
    # Not bincount: on CUDA it reads the largest cell back to know its length, which waits for the device.
    empty = torch.zeros(n_classes**2, dtype=torch.int64, device=cells.device)
    return empty.scatter_add(0, cells, torch.ones_like(cells)).reshape(n_classes, n_classes)


def class_iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Return each class's intersection over union in [0, 1], NaN for a class that is in neither.

    >>> class_iou(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])).tolist()
    [0.5, 0.5, nan]
    """
    intersection = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return intersection.double() / union


def mean_iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, ""]:
    """Return the mean of `class_iou` over the classes present in prediction or target.

    >>> round(mean_iou(torch.tensor([[1, 1], [0, 2]])).item(), 4)  # (1/2 + 2/3) / 2
    0.5833
    """
    return class_iou(confusion).nanmean()


def iou_counts(
    pred: Integer[Tensor, "*pixels"], target: Integer[Tensor, "*pixels"], *, n_classes: int
) -> Int[Tensor, "2 k"]:
    """Count the pixels of each class's intersection and union; counts of batches may be summed.

    As `confusion_matrix` knows them, but of operations that `torch.func.vmap` takes and CUDA repeats bit for bit.

    >>> iou_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), n_classes=2).tolist()
    [[1, 1], [2, 2]]
    """
    classes = torch.arange(n_classes, device=pred.device).view(-1, *(1 for _ in pred.shape))
    of_pred, of_target = (each[None] == classes for each in (pred, target))
    return torch.stack([either.flatten(1).sum(dim=1) for either in (of_pred & of_target, of_pred | of_target)])


def mean_of_counts(counts: Int[Tensor, "2 k"]) -> Float[Tensor, ""]:
    """Return `mean_iou` of what `iou_counts` counted."""
    intersection, union = counts
    return (intersection.double() / union).nanmean()


def mean_iou_score(pred: Integer[Tensor, "n h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return `mean_iou` over all pixels of all images together, and `class_iou`.

    >>> pred, target = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 1], [0, 1]]])
    >>> round(mean_iou_score(pred, target, n_classes=2).value.item(), 4)  # (1/2 + 2/3) / 2
    0.5833
    """
    confusion = confusion_matrix(pred, target, n_classes=n_classes)
    return Score(mean_iou(confusion), class_iou(confusion))


def cell_iou(pred: Integer[Tensor, "n h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the IoU of class 1 over all pixels of all images together, and `class_iou`.

    Source: "Segmentation of biological cells with a compressed U-Net", section "Training": intersection of the true and
    the predicted cells' area over their union.
    Differs: where neither labels nor prediction have a cell, the score is 0 and not NaN, which a search cannot rank.

    Args:
        pred: Classes.
        target: Classes.
        n_classes: At least 2.

    Raises:
        UsageError: There is no class 1.

    >>> pred, target = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 1], [0, 1]]])
    >>> round(cell_iou(pred, target, n_classes=2).value.item(), 4)  # 2 pixels of 3
    0.6667
    """
    check_classes("cell_iou", n_classes, needed=None)
    per_class = class_iou(confusion_matrix(pred, target, n_classes=n_classes))
    return Score(per_class[CELL].nan_to_num(nan=0.0), per_class)


def cell_iou_per_frame(pred: Integer[Tensor, "n h w"], target: Integer[Tensor, "n h w"], *, n_classes: int) -> Score:
    """Return the mean over images of the IoU of class 1, NaN for the other classes.

    A frame with few cells counts as much as one with many; in `cell_iou` each counts by its pixels.

    Source: "Segmentation of biological cells with a compressed U-Net", section "Training", as its authors' program
    averages it (github.com/dorlivne/Segmentation): an image whose labels have no cell is left out.
    Differs: where no image has one, the score is 0 and not NaN, which a search cannot rank.

    Args:
        pred: Classes.
        target: Classes.
        n_classes: At least 2.

    Raises:
        UsageError: There is no class 1.

    >>> target = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 1]], [[0, 0, 0, 0]]])
    >>> pred = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 1, 1]], [[1, 0, 0, 0]]])
    >>> cell_iou_per_frame(pred, target, n_classes=2).value.item()  # (4/4 + 1/2) / 2; of all pixels 5/7
    0.75
    """
    check_classes("cell_iou_per_frame", n_classes, needed=None)
    of_result, of_labels = ((each == CELL).flatten(1) for each in (pred, target))
    union = (of_result | of_labels).sum(dim=1)
    per_frame = (of_result & of_labels).sum(dim=1).double() / union.clamp(min=1)
    # Of a frame without a cell the intersection is empty, so that its 0 adds nothing.
    value = per_frame.sum() / of_labels.any(dim=1).sum().clamp(min=1)
    is_cell = torch.arange(n_classes, device=value.device) == CELL
    return Score(value, torch.where(is_cell, value, torch.nan))
