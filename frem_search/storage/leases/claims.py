"""Who gets which trial: adopted, enqueued or new, decided under the lock of the study's row."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from frem_search.errors import StudyNotFoundError
from frem_search.storage.statements import (
    COUNTS,
    FINISH,
    KEEP_NOTE,
    LOCK_LEASE,
    LOCK_STUDY,
    RUNNING_TRIAL,
    RUNNING_TRIALS,
    TAKE,
)
from frem_search.storage.trial_notes import note_attrs, note_version_key, trial_note
from frem_search.system.processes import is_gone, this_process

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

ATTEMPTS = "attempts"  # the user attribute with the ends of a trial's earlier attempts


@dataclass
class Unsent:
    """What the database has not been told yet, because it was out of reach."""

    reports: dict[int, float] = field(default_factory=dict)
    resumed: int | None = None  # the epoch from which the trial really goes on
    checkpoint: tuple[int, str] | None = None  # its epoch, and the curve up to it as JSON


@dataclass(eq=False)
class Held:
    """A trial that this worker holds.

    Args:
        trial: As Optuna has it.
        token: Of the lease.
        is_adopted: Whether it was begun before.
        attempt: How many attempts in a row, this one counted, have advanced no checkpoint.
        epoch: How far the training is, for `status`.
        is_lost: Whether somebody else holds it now.
        reported: The last step that the storage has.
        unjudged: Steps that are stored and at which the pruner was not asked yet.
        unsent: What the storage does not have yet.
    """

    trial: optuna.Trial | FrozenTrial
    token: str
    is_adopted: bool
    attempt: int
    epoch: int = 0
    is_lost: bool = False
    reported: int = 0
    unjudged: list[int] = field(default_factory=list)
    unsent: Unsent = field(default_factory=Unsent)

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def id(self) -> int:
        """The trial's key in Optuna's tables."""
        return self.trial._trial_id


class Claims:
    """Claims of one worker on trials of one study.

    Args:
        storage: The database.
        study: Optuna's study, with sampler and pruner.
        distributions: Of every searched parameter; all are drawn when a trial is claimed.
        device: What the worker trains on, for `status`.
        lease_s: After how long without a sign of life the trial may be taken by others.
        max_attempts: How many attempts may fail to advance a checkpoint before the trial is FAIL.
    """

    def __init__(
        self,
        storage: "Storage",
        study: optuna.Study,
        *,
        distributions: Mapping[str, BaseDistribution],
        device: str,
        lease_s: float,
        max_attempts: int,
    ) -> None:
        self._storage, self._study, self._distributions = storage, study, dict(distributions)
        self._of_study = {"study_id": study._study_id}
        self._device, self._lease_s, self._max_attempts = device, lease_s, max_attempts
        self._worker = uuid.uuid4().hex
        self.given_up: dict[int, str] = {}  # by the last claim: numbers, and why

    def claim(self, connection: sa.Connection, held: Mapping[int, Held]) -> Held | Literal["spent", "busy"]:
        """Adopt an orphan, else take an enqueued trial, else ask for a new one.

        Args:
            connection: Of a transaction that Optuna's storage shares, and that has locked the study.
            held: What this worker holds already, by the trials' keys.

        Returns:
            The trial; or "spent" if there is nothing left to do, or "busy" if somebody still holds trials, which may
            become orphans.

        Raises:
            StudyNotFoundError: It was deleted.
        """
        n_trials = self._lock_study(connection)
        self.given_up = {}
        is_any_held = False
        for row in connection.execute(RUNNING_TRIALS, self._of_study).all():
            if not self._is_orphan(row, held) or not self._is_still_orphan(connection, row, held):
                is_any_held = True
                continue
            attempt = row.attempts + (not self._is_unanswered(row, held))
            if attempt <= self._max_attempts:
                return self._adopt(connection, row, attempt=attempt, is_new=self._is_unanswered(row, held))
            self._give_up(connection, row)
        counts = connection.execute(COUNTS, self._of_study).one()
        if not counts.enqueued and counts.numbers >= n_trials:
            return "busy" if is_any_held else "spent"
        with self._storage.reading_once():
            trial = self._study.ask(fixed_distributions=self._distributions)
        return self._take(connection, Held(trial, uuid.uuid4().hex, is_adopted=False, attempt=1))

    def _lock_study(self, connection: sa.Connection) -> int:
        """Take the lock on the study's row, which Optuna takes too for every new number; return the budget."""
        row = connection.execute(LOCK_STUDY, self._of_study).first()
        if row is None or row.value_json is None:
            what = "the study was deleted" if row is None else "the study's budget was removed"
            message = f"{self._study.study_name}: {what} while this worker was at it."
            raise StudyNotFoundError(message)
        return int(json.loads(row.value_json))

    def _is_orphan(self, row: Any, held: Mapping[int, Held]) -> bool:
        if row.worker == self._worker and row.token is not None:
            return self._is_unanswered(row, held)
        return row.token is None or row.is_expired or is_gone(row)

    def _is_still_orphan(self, connection: sa.Connection, row: Any, held: Mapping[int, Held]) -> bool:
        """Lock an orphan's lease and look again: its worker may have been telling the trial at this very moment."""
        of_trial = self._of_study | {"trial_id": row.trial_id}
        connection.execute(LOCK_LEASE, of_trial)
        again = connection.execute(RUNNING_TRIAL, of_trial).first()
        return again is not None and self._is_orphan(again, held)

    def _is_unanswered(self, row: Any, held: Mapping[int, Held]) -> bool:
        """Whether we claimed a trial and do not know it: the connection was lost before the answer came."""
        mine = held.get(row.trial_id)
        return row.worker == self._worker and row.token is not None and (mine is None or mine.token != row.token)

    def _adopt(self, connection: sa.Connection, row: Any, *, attempt: int, is_new: bool) -> Held:
        storage = self._storage.optuna
        trial = storage.get_trial(row.trial_id)
        if lacking := {name: each for name, each in self._distributions.items() if name not in trial.params}:
            # Begun by another program, which draws parameters one by one.
            unfinished = optuna.trial.Trial(self._study, row.trial_id)
            for name, distribution in lacking.items():
                unfinished._suggest(name, distribution)  # as `Study.ask` does it
            trial = storage.get_trial(row.trial_id)
        if row.host is not None and not is_new:
            storage.set_trial_user_attr(row.trial_id, ATTEMPTS, [*trial.user_attrs.get(ATTEMPTS, []), _ended(row)])
        held = Held(trial, uuid.uuid4().hex, is_adopted=True, attempt=attempt, epoch=row.checkpoint_epoch)
        held.reported = max(trial.intermediate_values, default=0)
        held.unjudged = [held.reported] if held.reported else []
        return self._take(connection, held)

    def _take(self, connection: sa.Connection, held: Held) -> Held:
        values = {"trial_id": held.id, **self._of_study, "token": held.token, "worker": self._worker}
        values |= vars(this_process())
        values |= {"device": self._device, "lease_s": self._lease_s, "attempt": held.attempt}
        connection.execute(TAKE, values)
        return held

    def _give_up(self, connection: sa.Connection, row: Any) -> None:
        ends = [*self._storage.optuna.get_trial(row.trial_id).user_attrs.get(ATTEMPTS, []), _ended(row)]
        reason = f"{row.attempts} attempts in a row advanced no checkpoint; the last ended: {ends[-1]['ended']}"
        attrs = {"reason": reason, ATTEMPTS: ends}
        finish(self._storage, row.trial_id, state=TrialState.FAIL, value=None, attrs=attrs)
        connection.execute(FINISH, {"trial_id": row.trial_id, "token": None, "epoch": 0})
        keep_note(connection, self._of_study["study_id"], row.trial_id, trial_note("fail", attrs))
        self.given_up[row.number] = reason


def _ended(row: Any) -> dict[str, Any]:
    """Return how an attempt ended, for the trial's history."""
    ended = row.reason or ("its lease ran out" if row.is_expired and not is_gone(row) else "its worker is gone")
    return {"worker": f"{row.host}:{row.pid}", "epoch": row.epoch, "ended": ended}


def finish(
    storage: "Storage", trial_id: int, *, state: TrialState, value: float | None, attrs: Mapping[str, Any]
) -> None:
    """Store a trial's end with Optuna; the value of a pruned one is its last report."""
    # Not by trial and study, which would read the whole trial again for each of these.
    for key, attr in attrs.items():
        storage.optuna.set_trial_user_attr(trial_id, key, attr)
    if state is TrialState.PRUNED:
        reports = storage.optuna.get_trial(trial_id).intermediate_values
        value = reports[max(reports)] if reports else value
    storage.optuna.set_trial_state_values(trial_id, state, None if value is None else [value])


def keep_note(connection: sa.Connection, study_id: int, trial_id: int, note: str) -> None:
    """Store what the dashboard shows of a trial in words, unless somebody wrote something there."""
    attrs = {key: json.dumps(attr) for key, attr in note_attrs(trial_id, note).items()}
    values = {"keys": list(attrs), "values": list(attrs.values()), "version_key": note_version_key(trial_id)}
    connection.execute(KEEP_NOTE, values | {"study_id": study_id})
