"""How far a study is: budget, states, workers, best trial, time left."""

from datetime import timedelta
from typing import Any

from frem_search.record import StudyRecord, TrialRecord

STATES = ("complete", "pruned", "running", "waiting", "enqueued", "fail")


def status_json(record: StudyRecord) -> dict[str, Any]:
    """Return the object that `status --json` prints; its shape is frozen by a test."""
    best = record.best
    return {
        "study": record.name,
        "storage": record.storage,
        "dataset": record.dataset,
        "n_trials": record.n_trials,
        "states": {state: sum(trial.state == state for trial in record.trials) for state in STATES},
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "workers": [
            {"worker": trial.worker, "trial": trial.number, "epoch": trial.epoch}
            for trial in record.trials
            if trial.state == "running"
        ],
    }


def trials_json(record: StudyRecord) -> list[dict[str, Any]]:
    """Return the list that `trials --format json` prints; its shape is frozen by a test."""
    return [
        {
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "params": trial.params,
            "user_attrs": trial.user_attrs,
            "started": trial.started.isoformat() if trial.started else None,
            "finished": trial.finished.isoformat() if trial.finished else None,
            "epoch": trial.epoch,
            "reason": trial.reason,
        }
        for trial in record.trials
    ]


def time_left(record: StudyRecord) -> timedelta | None:
    """Return about how long the rest of the budget takes, judged by the pace of the finished trials."""
    seconds = [trial.user_attrs["provenance"]["seconds"] for trial in record.trials if "provenance" in trial.user_attrs]
    if not seconds:
        return None
    finished = sum(trial.state in ("complete", "pruned", "fail") for trial in record.trials)
    side_by_side = max(1, sum(trial.state == "running" for trial in record.trials))
    return timedelta(seconds=round(sum(seconds) / len(seconds) * max(record.n_trials - finished, 0) / side_by_side))


def status_lines(record: StudyRecord) -> list[str]:
    """Return what `status` prints."""
    states = status_json(record)["states"]
    finished = states["complete"] + states["pruned"] + states["fail"]
    counts = ", ".join(f"{n} {state}" for state, n in states.items() if n)
    lines = [
        f"{record.name}: {record.title}",
        f"  dataset   {record.dataset}",
        f"  storage   {record.storage}",
        f"  trials    {finished} of {record.n_trials} finished" + (f": {counts}" if counts else ""),
    ]
    if record.best is not None:
        lines.append(f"  best      {describe_trial(record.best, record.score)}")
    lines += [
        f"  training  trial {trial.number}, epoch {trial.epoch} of {record.n_epochs}, on {trial.worker}"
        for trial in record.trials
        if trial.state == "running"
    ]
    lines += [
        f"  {trial.state:8}  trial {trial.number}, epoch {trial.epoch}: "
        + (one_line(trial.reason) or "its worker is gone")
        for trial in record.trials
        if trial.state in ("waiting", "fail")
    ]
    left = time_left(record)
    if left is not None and finished < record.n_trials:
        lines.append(f"  time left about {left}")
    return lines


def describe_trial(trial: TrialRecord, score: str) -> str:
    """Return number, score and parameters of a trial in a line.

    >>> trial = TrialRecord(3, "complete", 0.61234, {"B": 8, "X": 250.0}, {}, None, None, {})
    >>> describe_trial(trial, "mean_iou")
    'trial 3: mean_iou 0.6123 with B = 8, X = 250'
    """
    value = "none" if trial.value is None else f"{trial.value:.4f}"
    params = ", ".join(f"{name} = {format_value(value)}" for name, value in trial.params.items())
    return f"trial {trial.number}: {score} {value}" + (f" with {params}" if params else "")


def one_line(reason: str) -> str:
    """Return a reason without line breaks, which PyTorch's errors are full of."""
    return " ".join(reason.split())


def format_value(value: object) -> str:
    """Return a parameter's value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
