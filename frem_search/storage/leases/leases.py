"""Hold trials, report on them and let go of them: a RUNNING trial belongs to whoever holds its lease."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from frem_search.errors import DatabaseAwayError, LeaseLostError, StorageError
from frem_search.storage.leases.claims import Claims, Held, Unsent, finish, keep_note
from frem_search.storage.leases.renewal import Renewal
from frem_search.storage.statements import (
    CHECKPOINTED,
    FINISH,
    FINISHED,
    FINISHED_NUMBERS,
    HOLD,
    KEEP_CURVE,
    RANKING,
    RELEASE,
    RESUMED,
    SHARE_STUDY,
)
from frem_search.storage.trial_notes import trial_note
from frem_search.storage.watchdog import ANSWER_S, answers_within

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

T = TypeVar("T")
LEASE_S = 180.0
MAX_ATTEMPTS = 3
BLINK_S = 1.0  # patience with a database that is away
SHORT_ANSWER_S = 3.0  # patience with one that does not answer, while trials wait for it
AWAY_PAUSE_S = 5.0  # before it is looked for again; more where a look itself takes long
LONGEST_PAUSE_S = 60.0


class Standing(NamedTuple):
    """Where a study stands.

    Args:
        n_finished: Trials that ended, whichever way.
        ranking: Numbers of the best complete trials, best first.
    """

    n_finished: int
    ranking: list[int]


class Leases:
    """The leases that one worker holds on trials of one study; as a context, renewed by a thread.

    Nothing here waits for a database that is away: training goes on, and what it has to be told is kept. Only a claim
    waits for one that does not answer, as others may hold the study's row.

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
        device: str = "cpu",
        lease_s: float = LEASE_S,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self._storage, self._study = storage, study
        self._study_id = study._study_id
        self._held: dict[int, Held] = {}
        self._claims = Claims(
            storage, study, distributions=distributions, device=device, lease_s=lease_s, max_attempts=max_attempts
        )
        self._renewal = Renewal(storage, self._held, lease_s=lease_s)
        self._notes: dict[int, str] = {}  # of told trials, by their keys
        self.away_since: float | None = None  # by `time.monotonic`, if the database was out of reach at the last look
        self.away_because = ""
        self._look_again_at = -math.inf

    def __enter__(self) -> "Leases":
        self._renewal.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._renewal.stop()
        with suppress(StorageError):  # the database may be what ended the worker
            self.keep_notes()

    def claim(self) -> Held | Literal["spent", "busy"]:
        """Adopt an orphan, else take an enqueued trial, else ask for a new one.

        Returns:
            The trial; or "spent" if there is nothing left to do, or "busy" if others still hold trials, which may
            become orphans.

        Raises:
            DatabaseAwayError: The database is out of reach.
            StorageError: It refuses.
            StudyNotFoundError: The study was deleted.
        """

        def claim() -> Held | Literal["spent", "busy"]:
            self._storage.get_to_know(self._study_id)
            with self._storage.transaction() as connection:
                claimed = self._claims.claim(connection, self._held)
                self._store_notes(connection)
                return claimed

        # Others hold the study's lock in turn: that may take its time.
        claimed = self._reach(claim, answer_s=ANSWER_S)
        self._notes.clear()
        if isinstance(claimed, Held):
            self._held[claimed.id] = claimed
        return claimed

    @property
    def given_up(self) -> Mapping[int, str]:
        """Trials that the last claim has failed, by number, and why."""
        return self._claims.given_up

    def report(self, held: Held, value: float, *, step: int) -> None:
        """Store a report, unless it is stored already; while the database is away it is kept for later.

        Raises:
            LeaseLostError: The trial is not ours any more.
        """
        if step > held.reported:
            held.unsent.reports[step] = value
            self._send(held)

    def should_prune(self, held: Held, *, at_each: bool = True) -> bool:
        """Whether the stored reports say that the trial should end here; while the database is away it goes on.

        Args:
            held: The trial.
            at_each: Whether it may have been at any of the reports since this was last asked, or only at the last:
                what was stored late must not spare a trial.
        """
        if held.unsent.reports or not held.unjudged or isinstance(self._study.pruner, optuna.pruners.NopPruner):
            return False

        def judge() -> bool:
            trial = self._storage.optuna.get_trial(held.id)
            steps = held.unjudged if at_each else held.unjudged[-1:]
            return any(self._study.pruner.prune(self._study, _up_to(trial, step)) for step in steps)

        try:
            is_worse = self._reach(judge)
        except DatabaseAwayError:
            return False
        held.unjudged.clear()
        return is_worse

    def resumed(self, held: Held) -> None:
        """Note where the trial really goes on: behind an unusable checkpoint, or before one that could not be noted.

        Raises:
            LeaseLostError: The trial is not ours any more.
        """
        held.unsent.resumed = held.epoch
        self._send(held)

    def require(self, held: Held) -> None:
        """Make sure that the trial is still ours, before a file of it is written; if the database is away, believe so.

        Raises:
            LeaseLostError: The trial is not ours any more.
        """
        if held.is_lost:
            self._lose(held, "it was taken while this worker was out of touch")
        self._send(held)

    def checkpointed(self, held: Held, *, epoch: int, curve: Mapping[str, Any]) -> None:
        """Note that a checkpoint at `epoch` is stored, with the curve up to it; while the database is away, later.

        Raises:
            LeaseLostError: The trial is not ours any more.
        """
        held.unsent.checkpoint = epoch, json.dumps(curve)
        self._send(held)

    def tell(
        self,
        held: Held,
        *,
        state: TrialState,
        value: float | None = None,
        step: int = 0,
        attrs: Mapping[str, Any],
        shown: Mapping[str, str] | None = None,
        curve: Mapping[str, Any] | None = None,
    ) -> None:
        """Finish a trial: last report, state, value, attributes and curve in one transaction.

        Its note for the dashboard follows with the next claim: it belongs to the study, whose row claims lock in turn,
        and no tell should stand in that line.

        Args:
            held: The trial.
            state: How it ended.
            value: Of a complete trial; that of a pruned one is its last report.
            step: At which the value is reported too; 0 for not at all.
            attrs: The trial's user attributes.
            shown: The attributes that announce files to Optuna's dashboard.
            curve: Its columns.

        Raises:
            DatabaseAwayError: The database is out of reach; to be told again.
            LeaseLostError: The trial is not ours any more; nothing was changed.
        """

        def store() -> None:
            with self._storage.transaction() as connection:
                if self._require(connection, held).is_told:
                    return  # stored before, but the connection was lost before the answer came
                self._store_unsent(connection, held)
                if value is not None and step > held.reported:
                    self._storage.optuna.set_trial_intermediate_value(held.id, step, value)
                for key, attr in (shown or {}).items():
                    self._storage.optuna.set_trial_system_attr(held.id, key, attr)
                finish(self._storage, held.id, state=state, value=value, attrs=attrs)
                connection.execute(FINISH, {"trial_id": held.id, "token": held.token, "epoch": held.epoch})
                if curve is not None:
                    connection.execute(KEEP_CURVE, {"trial_id": held.id, "curve": json.dumps(curve)})

        self._reach(store)
        self._held.pop(held.id, None)
        self._notes[held.id] = trial_note(state.name.lower(), {**held.trial.user_attrs, **attrs})

    def release(self, held: Held, *, reason: str, is_forgiven: bool = True) -> None:
        """Let go of a trial, so that the next claim adopts it; while the database is away, the lease runs out.

        Args:
            held: The trial.
            reason: Why, for `status`.
            is_forgiven: Whether the attempt does not count: the worker was asked to stop.
        """
        self._held.pop(held.id, None)
        values = {"trial_id": held.id, "token": held.token, "reason": reason, "forgiven": int(is_forgiven)}

        def store() -> None:
            with self._storage.transaction() as connection:
                connection.execute(RELEASE, values)

        with suppress(StorageError):
            self._reach(store)

    def keep_notes(self) -> None:
        """Store the notes of told trials that no claim has stored since.

        Raises:
            StorageError: The database is out of reach.
        """

        def store() -> None:
            with self._storage.transaction() as connection:
                if connection.execute(SHARE_STUDY, {"study_id": self._study_id}).first() is not None:
                    self._store_notes(connection)

        if self._notes:
            self._reach(store, answer_s=ANSWER_S)  # claims hold the study's row in turn
            self._notes.clear()

    def standing(self, *, most: int) -> Standing:
        """Return how many trials have ended, and the best of them.

        Args:
            most: How many of the best at most.

        Raises:
            DatabaseAwayError: The database is out of reach.
        """
        of_study = {"study_id": self._study_id}

        def read() -> Standing:
            with self._storage.engine.connect() as connection:
                ranking = connection.execute(RANKING, of_study | {"most": most}).scalars()
                return Standing(connection.execute(FINISHED, of_study).scalar_one(), list(ranking))

        return self._reach(read)

    def finished(self) -> list[int]:
        """Return the numbers of all trials that have ended.

        Raises:
            DatabaseAwayError: The database is out of reach.
        """

        def read() -> list[int]:
            with self._storage.engine.connect() as connection:
                return list(connection.execute(FINISHED_NUMBERS, {"study_id": self._study_id}).scalars())

        return self._reach(read)

    def _reach(self, action: Callable[[], T], *, answer_s: float | None = None) -> T:
        """Do something in the database, or raise at once if it was away a moment ago."""
        began = time.monotonic()
        if began < self._look_again_at:
            raise DatabaseAwayError(self.away_because)
        try:
            with answers_within(SHORT_ANSWER_S if answer_s is None else answer_s):
                result = self._storage.retrying(action, patience_s=BLINK_S)
        except DatabaseAwayError as error:
            now = time.monotonic()
            self.away_because = str(error)
            self.away_since = began if self.away_since is None else self.away_since
            # A look that has to wait for its failure must not take most of the time.
            self._look_again_at = now + min(max(AWAY_PAUSE_S, 5 * (now - began)), LONGEST_PAUSE_S)
            raise
        except LeaseLostError:
            self.away_since = None
            raise
        self.away_since = None
        return result

    def _send(self, held: Held) -> None:
        """Store what is not stored yet, if the database is there; training does not wait for it."""

        def store() -> None:
            with self._storage.transaction() as connection:
                self._require(connection, held)
                self._store_unsent(connection, held)

        with suppress(DatabaseAwayError):
            self._reach(store)
            steps = [step for step in sorted(held.unsent.reports) if step > held.reported]
            held.unjudged += steps
            held.reported = max((held.reported, *steps))
            held.unsent = Unsent()

    def _store_unsent(self, connection: sa.Connection, held: Held) -> None:
        for step, value in sorted(held.unsent.reports.items()):
            # Not by held.trial.report: that one remembers what was rolled back, and would not store it again.
            self._storage.optuna.set_trial_intermediate_value(held.id, step, value)
        if held.unsent.resumed is not None:
            values = {"trial_id": held.id, "token": held.token, "epoch": held.unsent.resumed}
            connection.execute(RESUMED, values)
        if held.unsent.checkpoint is not None:
            epoch, curve = held.unsent.checkpoint
            connection.execute(CHECKPOINTED, {"trial_id": held.id, "epoch": epoch})
            connection.execute(KEEP_CURVE, {"trial_id": held.id, "curve": curve})

    def _store_notes(self, connection: sa.Connection) -> None:
        for trial_id, note in self._notes.items():
            keep_note(connection, self._study_id, trial_id, note)

    def _require(self, connection: sa.Connection, held: Held) -> Any:
        """Lock the lease's row, so that until the transaction ends nobody can take the trial; return the row."""
        row = connection.execute(HOLD, {"trial_id": held.id, "token": held.token}).first()
        if row is None:
            self._lose(held, "it was deleted with its study")
        elif not row.is_told and not row.is_running:
            self._lose(held, "somebody else has finished it")
        elif not row.is_told and not row.is_held:
            self._lose(held, "another worker holds it now")
        return row

    def _lose(self, held: Held, why: str) -> None:
        held.is_lost = True
        self._held.pop(held.id, None)
        message = f"trial {held.number}: {why}, so this worker lets go of it."
        raise LeaseLostError(message)


def _up_to(trial: FrozenTrial, step: int) -> FrozenTrial:
    """Return a trial as it was when it had reported a step."""
    earlier = copy.copy(trial)
    reports: Iterable[tuple[int, float]] = trial.intermediate_values.items()
    earlier.intermediate_values = {each: value for each, value in reports if each <= step}
    return earlier
