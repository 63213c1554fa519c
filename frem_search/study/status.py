"""How far a study is: budget, states, workers, best trial, time left."""

from datetime import timedelta
from typing import Any

from frem_search.storage.leases.leases import MAX_ATTEMPTS
from frem_search.study.record import StudyRecord, TrialRecord

STATES = ("complete", "pruned", "running", "waiting", "enqueued", "fail")


def status_json(record: StudyRecord) -> dict[str, Any]:
    """Return the object that `status --json` prints; its shape is frozen by a test."""
    best, left = record.best, time_left(record)
    return {
        "study": record.name,
        "storage": record.storage,
        "dataset": record.dataset,
        "score": record.score,
        "n_trials": record.n_trials,
        "n_epochs": record.n_epochs,
        "states": {state: sum(trial.state == state for trial in record.trials) for state in STATES},
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "workers": [{"worker": trial.worker, **_progress(trial)} for trial in _in_state(record, "running")],
        "waiting": [{**_progress(trial), "reason": trial.reason} for trial in _in_state(record, "waiting")],
        "time_left_s": None if left is None else left.total_seconds(),
    }


def _progress(trial: TrialRecord) -> dict[str, int]:
    return {
        "trial": trial.number,
        "epoch": trial.epoch,
        "attempts": trial.attempts,
        "total_attempts": trial.total_attempts,
    }


def _in_state(record: StudyRecord, *states: str) -> list[TrialRecord]:
    return [trial for trial in record.trials if trial.state in states]


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
            "attempts": trial.attempts,
            "total_attempts": trial.total_attempts,
            "reason": trial.reason,
        }
        for trial in record.trials
    ]


def time_left(record: StudyRecord) -> timedelta | None:
    """Return about how long the rest of the budget takes, judged by the pace of the finished trials.

    As many train side by side as do now, or one after another if none does.
    """
    seconds = [trial.user_attrs["provenance"]["seconds"] for trial in record.trials if "provenance" in trial.user_attrs]
    if not seconds:
        return None
    side_by_side = max(1, len(_in_state(record, "running")))
    n_left = max(record.n_trials - record.n_finished, 0)
    return timedelta(seconds=round(sum(seconds) / len(seconds) * n_left / side_by_side))


def count_line(record: StudyRecord) -> str:
    """Return how much of the budget is spent, in a line."""
    return f"{record.n_finished} of {record.n_trials} trials finished"


def end_line(record: StudyRecord) -> str:
    """Return how a worker's work ended, in a line."""
    return f"{'budget spent' if record.n_finished >= record.n_trials else 'stopped'}: {count_line(record)}"


def status_lines(record: StudyRecord) -> list[str]:
    """Return what `status` prints."""
    counts = ", ".join(f"{n} {state}" for state, n in status_json(record)["states"].items() if n)
    lines = [
        f"{record.name}: {record.title}",
        f"  dataset   {record.dataset}",
        f"  storage   {record.storage}",
        f"  trials    {record.n_finished} of {record.n_trials} finished" + (f": {counts}" if counts else ""),
    ]
    if record.best is not None:
        lines.append(f"  best      {describe_trial(record.best, record.score)}")
    running = _in_state(record, "running")
    lines += [_training_line(trial, record.n_epochs) for trial in running]
    lines += [_idle_line(trial) for trial in _in_state(record, "waiting", "fail")]
    left = time_left(record)
    if left is not None and record.n_finished < record.n_trials:
        lines.append(f"  time left about {left}" + ("" if running else " with one worker"))
    return lines


def _training_line(trial: TrialRecord, n_epochs: int) -> str:
    again = f", attempt {trial.attempts} of {MAX_ATTEMPTS}" if trial.attempts > 1 else ""
    return f"  training  trial {trial.number}, epoch {trial.epoch} of {n_epochs}, on {trial.worker}{again}"


def _idle_line(trial: TrialRecord) -> str:
    is_counted = trial.attempts and trial.state == "waiting"
    spent = f", {trial.attempts} of {MAX_ATTEMPTS} attempts spent" if is_counted else ""
    why = f": {one_line(trial.reason)}" if trial.reason else ""
    return f"  {trial.state:8}  trial {trial.number}, epoch {trial.epoch}{spent}{why}"


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
