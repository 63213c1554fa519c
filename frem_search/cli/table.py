"""Trials as a table to read and as CSV to compute with."""

import csv
import io

from frem_search.cli.rows import aligned
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.study.status import format_value, one_line


def trials_table(record: StudyRecord) -> str:
    """Return one line per trial, columns aligned."""
    names = list(record.searched)
    rows = [["trial", "state", record.score, "test", *names, "epoch", "seconds", "reason"]]
    for trial in record.trials:
        cells = [str(trial.number), trial.state, _score(trial.value), _score(_test_score(trial, record.score))]
        cells += [format_value(trial.params.get(name, "")) for name in names]
        seconds = trial.user_attrs.get("provenance", {}).get("seconds")
        cells += [str(trial.epoch), "" if seconds is None else f"{seconds:.1f}", one_line(trial.reason)]
        rows.append(cells)
    return "\n".join(aligned(rows)) + "\n"


def trials_csv(record: StudyRecord) -> str:
    """Return one row per trial, numbers in full."""
    names = list(record.searched)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["number", "state", "value", "test", *names, "epoch", "seconds", "started", "finished", "reason"])
    for trial in record.trials:
        writer.writerow(
            [
                trial.number,
                trial.state,
                trial.value,
                _test_score(trial, record.score),
                *(trial.params.get(name) for name in names),
                trial.epoch,
                trial.user_attrs.get("provenance", {}).get("seconds"),
                trial.started.isoformat() if trial.started else None,
                trial.finished.isoformat() if trial.finished else None,
                trial.reason,
            ]
        )
    return out.getvalue()


def _test_score(trial: TrialRecord, score: str) -> float | None:
    return trial.user_attrs.get("result", {}).get("test", {}).get(score)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
