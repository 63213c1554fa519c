"""Metrics by name: what a study maximizes on its validation images."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from frem_search.metrics.iou import mean_iou_score
from frem_search.metrics.score import Score

__all__ = ["METRICS", "Metric", "Score"]


class Metric(NamedTuple):
    """A metric and what it compares with the labels.

    Args:
        function: Called as ``function(pred, target, n_classes=...)``.
        takes: Class indices of shape (n, h, w), or probabilities of shape (n, k, h, w).
    """

    function: Callable[..., Score]
    takes: Literal["classes", "probabilities"]


METRICS: dict[str, Metric] = {"mean_iou": Metric(mean_iou_score, takes="classes")}
