"""Studies in the storage as a whole: which there are, and how one is removed with all that belongs to it."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import optuna
import sqlalchemy as sa

from frem_search.errors import ArtifactError, StorageError
from frem_search.storage.artifacts import Artifacts
from frem_search.study.record import not_found, read_record
from frem_search.study.stored import artifacts_prefix
from frem_search.system.processes import is_gone

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

STORED = sa.text("""
    SELECT s.study_name AS name, title.value_json AS title, contract.value_json AS contract,
           budget.value_json AS n_trials,
           count(t.trial_id) FILTER (WHERE t.state IN ('COMPLETE', 'PRUNED', 'FAIL')) AS n_finished,
           max(v.value) FILTER (WHERE t.state = 'COMPLETE') AS best
    FROM studies s
    JOIN study_user_attributes contract ON contract.study_id = s.study_id AND contract.key = 'contract'
    JOIN study_user_attributes title ON title.study_id = s.study_id AND title.key = 'title'
    JOIN study_user_attributes budget ON budget.study_id = s.study_id AND budget.key = 'n_trials'
    LEFT JOIN trials t ON t.study_id = s.study_id
    LEFT JOIN trial_values v ON v.trial_id = t.trial_id
    GROUP BY s.study_name, title.value_json, contract.value_json, budget.value_json
    ORDER BY s.study_name
""")
LOCK = sa.text("SELECT 1 FROM studies WHERE study_id = :study_id FOR UPDATE")
LIVE = sa.text("""
    SELECT t.number, l.host, l.pid, l.boot_id, l.pid_namespace, l.pid_started
    FROM frem_lease l JOIN trials t USING (trial_id)
    WHERE t.study_id = :study_id AND t.state = 'RUNNING' AND l.token IS NOT NULL AND l.expires_at >= now()
    ORDER BY t.number
""")


@dataclass(frozen=True)
class StoredStudy:
    """A line about a study in the storage.

    Args:
        name: Under which it is stored.
        title: Its own words.
        dataset: That its trials are trained on.
        n_trials: Its budget.
        n_finished: How many of them came to an end, whatever it was.
        n_epochs: Of every trial.
        best: The highest score.
    """

    name: str
    title: str
    dataset: str
    n_trials: int
    n_finished: int
    n_epochs: int
    best: float | None


def list_stored(storage: "Storage") -> list[StoredStudy]:
    """Return the studies of frem-search that a storage holds, by name."""
    with storage.engine.connect() as connection:
        rows = connection.execute(STORED).all()
    contracts = [json.loads(row.contract) for row in rows]
    return [
        StoredStudy(
            name=row.name,
            title=json.loads(row.title),
            dataset=contract["dataset"],
            n_trials=json.loads(row.n_trials),
            n_finished=row.n_finished,
            n_epochs=contract["n_epochs"],
            best=row.best,
        )
        for row, contract in zip(rows, contracts, strict=True)
    ]


class Removed(NamedTuple):
    """Where the artifacts of a deleted study lay.

    Args:
        name: Of their folder.
        url: The whole of it.
        had_files: Whether there were any: the study may have been run with another place for them.
    """

    name: str
    url: str
    had_files: bool


def delete_stored(storage: "Storage", name: str, *, artifacts: str, force: bool = False) -> Removed:
    """Remove a study: its trials, our rows beside them, its artifacts; return where the artifacts lay.

    Args:
        storage: The database.
        name: The study's.
        artifacts: The URL under which its artifacts lie.
        force: Remove it while workers train its trials; they notice at their next report, and end.

    Raises:
        StudyNotFoundError: There is no such study, or another program made it.
        StorageError: Workers are training its trials.
        ArtifactError: The study is gone, but its artifacts cannot be removed.
    """
    uid = read_record(storage, name, has_curves=False).uid
    prefix = artifacts_prefix(name, uid)
    folder = Artifacts(artifacts, prefix)

    def remove() -> None:
        with storage.transaction() as connection:
            try:
                study = optuna.load_study(study_name=name, storage=storage.optuna)
            except KeyError:
                return  # removed before, but the connection was lost before the answer came; or by somebody else
            if study.user_attrs.get("uid") != uid:
                raise not_found(storage, name)
            of_study = {"study_id": study._study_id}  # Optuna has no public name for it
            # A claim takes this lock too: none begins between the look at the leases and the end of the study.
            connection.execute(LOCK, of_study)
            live = [row for row in connection.execute(LIVE, of_study) if not is_gone(row)]
            if live and not force:
                raise StorageError(_at_work(name, live))
            storage.optuna.delete_study(of_study["study_id"])

    storage.retrying(remove)
    try:
        had_files = folder.remove_all()
    except OSError as error:
        message = (
            f"{folder.url('')}: the study is deleted, but its artifacts cannot be removed: {error.strerror or error}. "
            "Remove the folder yourself."
        )
        raise ArtifactError(message) from None
    return Removed(prefix, folder.url("").rstrip("/"), had_files)


def _at_work(name: str, live: list[sa.Row[tuple[object, ...]]]) -> str:
    workers = ", ".join(f"trial {row.number} on {row.host}:{row.pid}" for row in live)
    return (
        f"{name}: expected a study that nobody works on, but got {len(live)} in training: {workers}. "
        "Stop the workers by Ctrl-C or SIGTERM first, or add --force and lose what they do."
    )
