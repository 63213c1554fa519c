"""A study read back from the storage, as plain data: all that status, export and figures look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from frem_search.errors import StudyNotFoundError, did_you_mean
from frem_search.system.processes import is_gone

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from frem_search.storage.database import Storage


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it was stored.

    Args:
        number: Optuna's number of the trial, from 0.
        state: One of complete, pruned, running, waiting, enqueued, fail.
        value: The score; of a pruned trial the last one that it reported.
        params: The parameters that were suggested or enqueued.
        user_attrs: What the worker noted about the trial.
        started: When a worker took the trial first.
        finished: When the trial was told.
        curve: Columns of equal length, one row per epoch; a column may be missing and a cell may be None.
            Columns: epoch, train_loss, score, best_score, per_class (one list per epoch, one number per class),
            bottleneck, skip, enhanced_sum, other_sum, seconds.
        epoch: How far the training is, as of the last sign of life.
        worker: Who holds it, or held it last.
        reason: Why it was pruned, failed or let go of, or that nothing is heard of its worker.
        attempts: How many in a row, the present one included, have stored no further checkpoint; stops do not count.
        total_attempts: How often a worker took it.
    """

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    user_attrs: dict[str, Any]
    started: datetime | None
    finished: datetime | None
    curve: Mapping[str, list[Any]]
    epoch: int = 0
    worker: str = ""
    reason: str = ""
    attempts: int = 0
    total_attempts: int = 0


@dataclass(frozen=True)
class StudyRecord:
    """One study as it was stored.

    Args:
        name: The name under which the storage keeps it.
        title: The study file's own words for it.
        dataset: The dataset that the trials were really trained on.
        score: The metric that is maximized, as METRICS spells it.
        n_trials: How many trials the study is meant to have.
        class_names: The dataset's classes in the order of their indices.
        contract: What the study was begun with; `contract["space"]` maps a parameter to `{"value": v}`,
            `{"choices": [...]}` or `{"low": l, "high": h, "log": bool, "step": s}`.
        trials: Every trial in the order of its number.
        uid: Of this very study, which its artifacts are kept under.
        storage: Where it was read from, without the password.
    """

    name: str
    title: str
    dataset: str
    score: str
    n_trials: int
    class_names: tuple[str, ...]
    contract: dict[str, Any]
    trials: tuple[TrialRecord, ...]
    uid: str = ""
    storage: str = ""

    @property
    def n_epochs(self) -> int:
        """Epochs of a trial: of all its folds together if they are trained one after another."""
        n_epochs: int = self.contract["n_epochs"]
        return n_epochs * self.contract["n_folds"] if _is_pruned_by_fold(self.contract) else n_epochs

    @property
    def n_finished(self) -> int:
        """How many trials have come to an end, whatever it was."""
        return sum(trial.state in ("complete", "pruned", "fail") for trial in self.trials)

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        """The trials that ran to their end."""
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial of the highest value; among equals, the one of the lowest number."""
        valued = [trial for trial in self.complete if trial.value is not None]
        return max(valued, key=lambda trial: (trial.value, -trial.number), default=None)

    @property
    def searched(self) -> tuple[str, ...]:
        """The names of the parameters that are choices or ranges, in the study file's order."""
        return tuple(name for name, entry in self.contract.get("space", {}).items() if "value" not in entry)


def read_record(storage: "Storage", name: str, *, has_curves: bool = True, patience_s: float = 10.0) -> StudyRecord:
    """Return a stored study as it is now.

    Args:
        storage: The database.
        name: The study's.
        has_curves: Whether to read the curves, which are most of the data.
        patience_s: For how long a database that is away is waited for.

    Raises:
        StudyNotFoundError: There is no such study.
        DatabaseAwayError: The database stayed away.
    """
    return storage.retrying(lambda: _read(storage, name, has_curves=has_curves), patience_s=patience_s)


def _read(storage: "Storage", name: str, *, has_curves: bool) -> StudyRecord:
    import optuna
    import sqlalchemy as sa

    with storage.transaction() as connection:
        # One moment for trials and leases: else a trial that is claimed in between would look as if nobody held it.
        connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        try:
            study = optuna.load_study(study_name=name, storage=storage.optuna)
        except KeyError:
            raise not_found(storage, name) from None
        attrs = study.user_attrs
        if "contract" not in attrs:
            message = f"{name}: a study that another program made; frem-search cannot read it."
            raise StudyNotFoundError(message)
        of_study = {"study_id": study._study_id}
        leases = {row.trial_id: row for row in connection.execute(sa.text(LEASES), of_study)}
        curves = (
            {row.trial_id: row.curve for row in connection.execute(sa.text(CURVES), of_study)} if has_curves else {}
        )
        stored = study.get_trials(deepcopy=False)
    contract = dict(attrs["contract"])
    by_epoch = not _is_pruned_by_fold(contract)
    trials = (
        _trial_record(t, leases.get(t._trial_id), curves.get(t._trial_id, {}), reports_by_epoch=by_epoch)
        for t in stored
    )
    return StudyRecord(
        name=name,
        title=attrs["title"],
        dataset=contract["dataset"],
        score=contract["score"],
        n_trials=attrs["n_trials"],
        class_names=tuple(contract["class_names"]),
        contract=contract,
        trials=tuple(trials),
        uid=attrs["uid"],
        storage=storage.label,
    )


def _trial_record(
    trial: "FrozenTrial", lease: Any, curve: Mapping[str, list[Any]], *, reports_by_epoch: bool
) -> TrialRecord:
    state = _state(trial.state.name, lease)
    return TrialRecord(
        number=trial.number,
        state=state,
        value=trial.value,
        params=dict(trial.params),
        user_attrs=dict(trial.user_attrs),
        started=trial.datetime_start,
        finished=trial.datetime_complete,
        curve=curve,
        epoch=_epoch(trial, lease, has_reports=reports_by_epoch and state == "running") if lease else 0,
        worker=f"{lease.host}:{lease.pid} {lease.device}" if lease else "",
        reason=trial.user_attrs.get("reason") or (_why_waiting(lease) if state == "waiting" else ""),
        attempts=lease.attempts if lease else 0,
        total_attempts=lease.total_attempts if lease else 0,
    )


LEASES = """
    SELECT trial_id, token IS NOT NULL AS is_held, expires_at < now() AS is_expired, epoch, attempts, total_attempts,
           reason, device, host, pid, boot_id, pid_namespace, pid_started
    FROM frem_lease WHERE study_id = :study_id
"""
CURVES = "SELECT trial_id, curve FROM frem_curve JOIN trials USING (trial_id) WHERE study_id = :study_id"


def not_found(storage: "Storage", name: str) -> StudyNotFoundError:
    """Return the error for a study that the storage does not hold, with the names that it holds."""
    import optuna

    known = optuna.get_all_study_names(storage.optuna)
    return StudyNotFoundError(
        f"{name}: no such study in the storage ({storage.label}).{did_you_mean(name, known)} Start it with "
        "`frem-search run`, or give --quick, --dataset or --storage as it was started with; `frem-search study list "
        "--stored` shows what is there."
    )


def _state(state: str, lease: Any) -> str:
    """Return our word for Optuna's state: a RUNNING trial that nobody holds is waiting for a worker."""
    if state == "RUNNING":
        is_held = lease is not None and lease.is_held and not lease.is_expired and not is_gone(lease)
        return "running" if is_held else "waiting"
    return "enqueued" if state == "WAITING" else state.lower()


def _epoch(trial: "FrozenTrial", lease: Any, *, has_reports: bool) -> int:
    """Return how far a trial is; in training a lease tells that when it is renewed, and a report at once.

    A trial that was adopted may have reports from behind the checkpoint that it goes on from.
    """
    epoch: int = lease.epoch
    return max((epoch, *trial.intermediate_values)) if has_reports and lease.total_attempts == 1 else epoch


def _why_waiting(lease: Any) -> str:
    if lease is None:
        return "begun by another program"
    if lease.reason or not lease.is_held:
        return lease.reason or ""
    # Only of a process of this machine it is known; another one may be stopped, or out of the database's reach.
    return "its worker is gone" if is_gone(lease) else "no sign of life from its worker"


def _is_pruned_by_fold(contract: Mapping[str, Any]) -> bool:
    """Whether the folds of a trial are trained one after another, and its reports are of images."""
    return bool(contract.get("pruner", {}).get("name") == "wilcoxon")
