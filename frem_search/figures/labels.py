"""The words and number formats that all figures share."""

from typing import Any

from frem_search.errors import UsageError
from frem_search.study.record import StudyRecord, TrialRecord

SCORE_LABELS = {
    "mean_iou": "mean IoU", "cell_iou": "cell IoU", "seg": "SEG", "v_rand": "V-Rand", "v_info": "V-Info",
    "v_rand_multicut": "V-Rand after multicut", "v_info_multicut": "V-Info after multicut",
}  # fmt: skip


def score_label(score: str) -> str:
    """Return a metric's name as an axis title spells it.

    >>> score_label("mean_iou"), score_label("pixel_accuracy")
    ('mean IoU', 'pixel accuracy')
    """
    return SCORE_LABELS.get(score, score.replace("_", " "))


def format_value(value: Any) -> str:
    """Return a parameter's value, short enough for a label.

    >>> format_value(632), format_value(0.000123456), format_value("unet")
    ('632', '0.0001235', 'unet')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_score(value: float | None) -> str:
    """Return a score with the four digits of the paper's tables.

    >>> format_score(0.61617), format_score(None)
    ('0.6162', 'no score')
    """
    return "no score" if value is None else f"{value:.4f}"


def subtitle(record: StudyRecord) -> str:
    """Return the line under a figure's title: study, dataset, number of trials."""
    n_finished = sum(trial.state in {"complete", "pruned"} for trial in record.trials)
    planned = f"{n_finished} of {record.n_trials} trials" if n_finished < record.n_trials else f"{n_finished} trials"
    return f"{record.name} · {record.dataset} · {planned}"


def impossible(record: StudyRecord, figure: str, *, needs: str, got: str, remedy: str) -> UsageError:
    """Return the error of a figure that cannot be drawn for this study."""
    return UsageError(f"{record.name}: {figure} needs {needs}, but {got}. {remedy}.")


def describe(trial: TrialRecord, *, score: str, names: tuple[str, ...]) -> str:
    """Return the lines that appear when the pointer is on a trial."""
    params = [f"{name} = {format_value(trial.params[name])}" for name in names if name in trial.params]
    return "<br>".join([f"<b>trial {trial.number}</b>", *params, f"{score} = {format_score(trial.value)}", trial.state])
