"""Metrics by name: what a study maximizes on its validation images."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from frem_search.errors import UsageError
from frem_search.segmentation.metrics.cells import check_classes
from frem_search.segmentation.metrics.iou import cell_iou, cell_iou_per_frame, mean_iou_score
from frem_search.segmentation.metrics.lifted_multicut import load_library
from frem_search.segmentation.metrics.multicut import v_info_multicut, v_rand_multicut
from frem_search.segmentation.metrics.rand import v_info, v_rand
from frem_search.segmentation.metrics.score import Score
from frem_search.segmentation.metrics.seg import seg

__all__ = ["METRICS", "Metric", "Score", "check_score", "lacking"]


class Metric(NamedTuple):
    """A metric and what it compares with the labels.

    Args:
        function: Called as ``function(pred, target, n_classes=...)``.
        takes: Class indices of shape (n, h, w), or probabilities of shape (n, k, h, w).
        on_device: Whether it runs where the prediction is and does not wait for it; the others run on the CPU.
        n_classes: How many classes the labels must have; None is any number.
        load: Loads the package of an extra that the metric needs, and tells if it is not installed.
    """

    function: Callable[..., Score]
    takes: Literal["classes", "probabilities"]
    on_device: bool
    n_classes: int | None = None
    load: Callable[[], object] | None = None


METRICS: dict[str, Metric] = {
    "mean_iou": Metric(mean_iou_score, takes="classes", on_device=True),
    "cell_iou": Metric(cell_iou, takes="classes", on_device=True),
    "cell_iou_per_frame": Metric(cell_iou_per_frame, takes="classes", on_device=True),
    "seg": Metric(seg, takes="classes", on_device=False),
    "v_rand": Metric(v_rand, takes="probabilities", on_device=False, n_classes=2),
    "v_info": Metric(v_info, takes="probabilities", on_device=False, n_classes=2),
    "v_rand_multicut": Metric(v_rand_multicut, "probabilities", on_device=False, n_classes=2, load=load_library),
    "v_info_multicut": Metric(v_info_multicut, "probabilities", on_device=False, n_classes=2, load=load_library),
}


def check_score(name: str, *, n_classes: int, is_extra: bool = False) -> None:
    """Raise unless a metric can be computed of a dataset on this machine, before anything is trained.

    Args:
        name: A name of `METRICS`.
        n_classes: Of the dataset.
        is_extra: Whether a study only tells the metric beside its score, and so does without it where it must.

    Raises:
        UsageError: The metric needs another number of classes, or, unless it is an extra one, a package that is not
            installed.
    """
    metric = METRICS[name]
    check_classes(name, n_classes, needed=metric.n_classes)
    if metric.load is not None and not is_extra:
        metric.load()


def lacking(names: Iterable[str]) -> dict[str, str]:
    """Return those metrics of `METRICS` whose package is not installed on this machine, with what to do about it."""
    reasons = {}
    for name in names:
        load = METRICS[name].load
        if load is None:
            continue
        try:
            load()
        except UsageError as error:
            reasons[name] = str(error)
    return reasons
