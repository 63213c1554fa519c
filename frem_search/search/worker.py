"""Take trials of a study until its budget is spent."""

import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from optuna.trial import TrialState

from frem_search.errors import (
    ArtifactError,
    DatabaseAwayError,
    DeviceMemoryError,
    FremSearchError,
    LeaseLostError,
    ParameterError,
)
from frem_search.search.events import TrialEvent
from frem_search.storage.leases.claims import Held
from frem_search.storage.leases.leases import Leases
from frem_search.study.space import Space, resolve

if TYPE_CHECKING:
    from frem_search.training.member import EpochReport
    from frem_search.training.objective import Outcome
    from frem_search.training.trial import Folds

BEHIND_IMAGES = 10**6  # the step of the mean over images, of a trial that is pruned by fold
MOST_REPORTS = 50  # that Optuna gets of a trial: its intermediate values are what slows a study down
BUSY_POLL_S = 2.0
PATIENCE_S = 600.0  # with a database that is away, when there is nothing to train meanwhile
MOST_ERRORS_IN_A_ROW = 3
BELOW_OTHERS = "its score is below what the pruner asks for"
KEPT_WEIGHTS = 3  # of the best trials; one of FREM's has 31 MB


class TrialTrainer(Protocol):
    """What a worker asks of an objective."""

    def admit(self, number: int, params: Mapping[str, Any]) -> "Folds":
        """Begin a trial, or go on with it."""

    def epochs(self) -> "Generator[EpochReport, None, None]":
        """Train what was admitted, until nothing of it is left to train."""

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is."""

    def finish(self, number: int) -> "Outcome":
        """Score a trial and store what it leaves behind."""

    def release(self, number: int) -> None:
        """Let a trial go, if it was admitted."""

    def discard(self, number: int, *, weights: bool) -> None:
        """Remove what a finished trial needs no longer."""

    def sweep(self, finished: Collection[int]) -> None:
        """Remove what trials that have ended left behind because their worker was killed."""

    def train_in_turn(self) -> bool:
        """Use less memory for a single trial; return whether that is possible."""

    @property
    def searches_shapes(self) -> bool:
        """Whether one trial may need more memory than another."""

    def trial(self, number: int) -> "Folds":
        """Return a trial in training."""

    def provenance(self, number: int) -> dict[str, Any]:
        """Return the conditions of a trial."""


@dataclass(frozen=True)
class _Verdict:
    """How a trial ended, and what the storage gets to know of that.

    Args:
        kind: Of its event.
        state: Optuna's.
        attrs: User attributes.
        score: For whoever shows progress.
        value: Of a complete trial, or of a pruned one whose reports are no scores of the whole.
        step: At which the value is reported.
        shown: The attributes that announce its files.
        curve: Its columns.
    """

    kind: str
    state: TrialState
    attrs: Mapping[str, Any]
    score: float | None = None
    value: float | None = None
    step: int = 0
    shown: Mapping[str, str] | None = None
    curve: Mapping[str, Any] | None = None


@dataclass(eq=False)
class _Slot:
    """A trial in training.

    Args:
        held: Its lease.
        saved_at: When its last checkpoint was stored, by `time.monotonic`; minus infinity if one is due.
        verdict: How it ended, as long as the database is away and cannot be told.
    """

    held: Held
    saved_at: float
    verdict: _Verdict | None = None


class Worker:
    """Trains trials, some of them side by side, and tells what happens as it happens.

    A trial that ends leaves its slot to the next one at the end of its epoch; nobody waits for the others. While the
    database is away, training goes on.

    Args:
        leases: Through which trials are claimed and told.
        objective: Which trains them.
        space: The study's, to complete what was drawn.
        n_epochs: The study's.
        n_slots: How many trials train side by side; halved when the device has no memory for them.
        is_stopping: Asked after every epoch; once it says yes, the trials are stored and let go.
        checkpoint_every_s: At most so much training is lost when the worker is killed.
    """

    def __init__(
        self,
        leases: Leases,
        objective: TrialTrainer,
        *,
        space: Space,
        n_epochs: int,
        n_slots: int = 1,
        is_stopping: Callable[[], bool] = lambda: False,
        checkpoint_every_s: float = 60.0,
    ) -> None:
        self._leases, self._objective, self._space = leases, objective, space
        self._report_every = -(-n_epochs // MOST_REPORTS)
        self._n_epochs, self._is_stopping = n_epochs, is_stopping
        self._checkpoint_every_s = checkpoint_every_s
        self._errors_in_a_row = self._n_finished = 0
        self._n_slots = n_slots
        self._slots: dict[int, _Slot] = {}
        self._is_spent = self._is_away_told = False
        self._claim_at = -math.inf
        self._idle_since: float | None = None  # nothing to train, and no database

    def work(self) -> Generator[TrialEvent, None, None]:
        """Take trials until the budget is spent or the worker is asked to stop.

        Raises:
            DatabaseAwayError: The database stayed away for ten minutes, and there was nothing to train.
            FremSearchError: Of this machine, which the trials outlive.
        """
        reason = "stopped"
        try:
            self._sweep()
            while True:
                try:
                    yield from self._between_epochs()
                    if not self._is_training and self._is_stopping():
                        yield from self._leave_untold()
                    if not self._slots and (self._is_spent or self._is_stopping()):
                        break
                    if self._is_training:
                        self._idle_since = None
                        yield from self._train()
                    else:
                        yield from self._wait()
                except DeviceMemoryError as error:
                    yield from self._out_of_memory(error)
            self._sweep()
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            # Whoever stops listening, a signal or an error: no trial waits for the end of a lease that nobody needs.
            for number in list(self._slots):
                self._let_go(number, reason=reason)

    @property
    def _is_training(self) -> bool:
        return any(slot.verdict is None for slot in self._slots.values())

    def _between_epochs(self) -> Iterator[TrialEvent]:
        """Tell what could not be told before, fill free slots, and say whether the database is there."""
        for slot in [slot for slot in self._slots.values() if slot.verdict is not None]:
            yield from self._guarded(slot.held, self._conclude(slot))
        yield from self._fill_slots()
        is_away = self._leases.away_since is not None
        if is_away != self._is_away_told:
            self._is_away_told = is_away
            yield TrialEvent("away" if is_away else "back", -1, reason=self._leases.away_because if is_away else "")

    def _wait(self) -> Iterator[TrialEvent]:
        """Wait for trials that others hold, as they may leave one behind, or for the database."""
        if self._leases.away_since is None:
            self._idle_since = None
            yield TrialEvent("waiting", -1)
        else:
            self._idle_since = self._idle_since or time.monotonic()
            if time.monotonic() - self._idle_since > PATIENCE_S:
                yield from self._leave_untold()
                raise DatabaseAwayError(self._leases.away_because)
        until = max(self._claim_at, time.monotonic() + 0.1)
        while time.monotonic() < until and not self._is_stopping():
            time.sleep(0.1)

    def _fill_slots(self) -> Iterator[TrialEvent]:
        """Claim a trial for each free slot, as far as there are trials."""
        while len(self._slots) < self._n_slots and time.monotonic() >= self._claim_at and not self._is_stopping():
            try:
                held = self._leases.claim()
            except DatabaseAwayError:
                return
            if isinstance(held, Held):
                self._is_spent = False
                # An adopted trial is stored after its first epoch: one that is killed again and again still advances.
                self._slots[held.number] = _Slot(held, -math.inf if held.is_adopted else time.monotonic())
            for number, reason in self._leases.given_up.items():
                self._objective.sweep([number])
                self._keep_best(number, is_complete=False)
                yield TrialEvent("failed", number, reason=reason, n_finished=self._n_finished)
            if isinstance(held, Held):
                yield from self._guarded(held, self._begin(held))
                continue
            self._is_spent = held == "spent"
            self._claim_at = time.monotonic() + BUSY_POLL_S
            return

    def _begin(self, held: Held) -> Iterator[TrialEvent]:
        """Begin a claimed trial, or go on with it."""
        params = resolve(self._space, held.trial.params)
        if not held.is_adopted:
            yield TrialEvent("claimed", held.number, params=params)
        trial = self._objective.admit(held.number, params)
        held.epoch = trial.epoch
        if held.is_adopted:
            yield TrialEvent("adopted", held.number, params=params, epoch=trial.epoch, reason=trial.set_aside)
            self._leases.resumed(held)
            # What was trained while the database was away, by a worker that did not live to tell it.
            for step, value in self._owed(held, trial):
                self._leases.report(held, value, step=step)
            if trial.is_done:  # its worker was stopped before it could tell
                yield from self._complete(held)
            elif self._should_prune(held):
                yield from self._prune(held, BELOW_OTHERS)

    def _train(self) -> Iterator[TrialEvent]:
        """Train the trials of all slots until none is left, and fill slots that become free."""
        with closing(self._objective.epochs()) as reports:
            for report in reports:
                held = self._slots[report.key].held
                yield from self._guarded(held, self._after_epoch(held, report))
                yield from self._between_epochs()

    def _guarded(self, held: Held, events: Iterator[TrialEvent]) -> Iterator[TrialEvent]:
        """Pass on what happens to a trial, and let an error end what it concerns: the trial, or the worker."""
        try:
            yield from events
        except LeaseLostError as error:
            self._forget(held.number)
            yield TrialEvent("lost", held.number, reason=str(error))
        except DeviceMemoryError:
            raise
        except ParameterError as error:  # of an enqueued trial, say: no other worker could train it either
            yield from self._conclude(self._slots[held.number], _failed("failed", TrialState.FAIL, _told(error)))
        except (FremSearchError, OSError) as error:
            # The machine's fault, not the trial's: it waits for the next worker, and this one ends.
            self._let_go(held.number, reason=str(error), is_forgiven=False)
            raise
        except Exception as error:  # noqa: BLE001 whatever the code of a network, loss or metric raises
            yield from self._fail(held, error)

    def _after_epoch(self, held: Held, report: "EpochReport") -> Iterator[TrialEvent]:
        """Report, prune, finish, store or let go, whatever is due."""
        if held.is_lost:
            self._leases.require(held)
        if report.error is not None:
            raise report.error
        held.epoch = report.epoch
        yield TrialEvent("epoch", held.number, epoch=report.epoch, report=report)
        if reason := self._reason_to_prune(held, report):
            yield from self._prune(held, reason)
        elif report.is_done:
            yield from self._complete(held)
        elif self._is_stopping():
            self._checkpoint(held)
            self._let_go(held.number, reason="stopped")
            yield TrialEvent("released", held.number, reason="stopped")
        elif time.monotonic() - self._slots[held.number].saved_at > self._checkpoint_every_s:
            self._checkpoint(held)

    def _reason_to_prune(self, held: Held, report: "EpochReport") -> str:
        """Report what is due; return why the trial ends here, or nothing."""
        if not report.is_finite:
            return f"the training loss was no number in epoch {report.epoch}"
        for step, value in self._due(held, report):
            self._leases.report(held, value, step=step)
        return BELOW_OTHERS if not report.is_done and self._should_prune(held) else ""

    def _should_prune(self, held: Held) -> bool:
        # The images of a fold are one report; epochs are judged as they came.
        return self._leases.should_prune(held, at_each=not self._objective.trial(held.number).in_sequence)

    def _due(self, held: Held, report: "EpochReport") -> list[tuple[int, float]]:
        """Return what is to be reported after an epoch: by epoch the best score, of folds in sequence each image's."""
        trial = self._objective.trial(held.number)
        if trial.in_sequence:
            return self._owed(held, trial)
        is_due = not report.is_done and self._is_due(held, report.epoch)
        return [(report.epoch, report.best_score)] if is_due else []

    def _owed(self, held: Held, trial: "Folds") -> list[tuple[int, float]]:
        """Return all that was due and that the storage does not have."""
        if trial.in_sequence:
            return [(step, score) for step, score in enumerate(trial.image_scores, 1) if step > held.reported]
        curve = trial.curve
        pairs = zip(curve["epoch"], curve["best_score"], strict=True)
        return [(epoch, best) for epoch, best in pairs if self._is_due(held, epoch)]

    def _is_due(self, held: Held, epoch: int) -> bool:
        return epoch % self._report_every == 0 and epoch > held.reported

    def _checkpoint(self, held: Held) -> None:
        self._leases.require(held)  # nobody may overwrite what the trial's next worker has stored
        self._objective.save_checkpoint(held.number)
        trial = self._objective.trial(held.number)
        self._leases.checkpointed(held, epoch=trial.epoch, curve=trial.curve)
        self._slots[held.number].saved_at = time.monotonic()

    def _complete(self, held: Held) -> Iterator[TrialEvent]:
        self._leases.require(held)
        outcome = self._objective.finish(held.number)
        trial = self._objective.trial(held.number)
        step = 0 if trial.in_sequence else self._n_epochs  # whose steps are images, the last of them reported
        attrs = {"result": outcome.result, "provenance": self._objective.provenance(held.number)}
        verdict = _Verdict(
            "complete", TrialState.COMPLETE, attrs, outcome.score, outcome.score, step, outcome.shown, trial.curve
        )
        yield from self._conclude(self._slots[held.number], verdict)

    def _prune(self, held: Held, reason: str) -> Iterator[TrialEvent]:
        trial = self._objective.trial(held.number)
        value, step = None, 0
        if trial.in_sequence and trial.image_scores:
            # A pruned trial's last report is its value, by which TPE ranks it: not that of one image.
            value, step = sum(trial.image_scores) / len(trial.image_scores), BEHIND_IMAGES
        attrs = {"reason": reason, "provenance": self._objective.provenance(held.number)}
        verdict = _Verdict(
            "pruned",
            TrialState.PRUNED,
            attrs,
            trial.best_score if value is None else value,
            value,
            step,
            curve=trial.curve,
        )
        yield from self._conclude(self._slots[held.number], verdict)

    def _fail(self, held: Held, error: Exception) -> Iterator[TrialEvent]:
        """Fail a trial; a worker whose trials fail one after another ends with the error."""
        events = list(self._conclude(self._slots[held.number], _failed("failed", TrialState.FAIL, _told(error))))
        yield from events
        if any(event.kind == "lost" for event in events):
            return
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= MOST_ERRORS_IN_A_ROW:
            raise error

    def _conclude(self, slot: _Slot, verdict: _Verdict | None = None) -> Iterator[TrialEvent]:
        """Tell how a trial ended; while the database is away it stays in its slot, and is told later."""
        number, verdict = slot.held.number, verdict or slot.verdict
        assert verdict is not None
        told = {name: each for name, each in vars(verdict).items() if name not in ("kind", "score")}
        try:
            self._leases.tell(slot.held, **told)
        except DatabaseAwayError:
            slot.verdict = verdict
            if verdict.state is not TrialState.COMPLETE:
                self._objective.release(number)  # nothing of it is trained any more
            return
        except LeaseLostError as error:
            self._forget(number)
            yield TrialEvent("lost", number, reason=str(error))
            return
        if verdict.state is not TrialState.FAIL:
            self._errors_in_a_row = 0
        self._objective.discard(number, weights=False)
        is_best = self._keep_best(number, is_complete=verdict.state is TrialState.COMPLETE)
        self._forget(number)
        yield TrialEvent(
            verdict.kind,
            number,
            value=verdict.score,
            reason=verdict.attrs.get("reason", ""),
            n_finished=self._n_finished,
            is_best=is_best,
        )

    def _keep_best(self, number: int, *, is_complete: bool) -> bool:
        """See where the study stands now that a trial has ended, and keep the best ones' weights; is it the best?"""
        try:
            # A few more than the one that fell out of the best, in case another worker finished at the same time.
            self._n_finished, ranking = self._leases.standing(most=2 * KEPT_WEIGHTS)
        except DatabaseAwayError:
            self._n_finished += 1
            return False
        if is_complete:
            for each in {number, *ranking}.difference(ranking[:KEPT_WEIGHTS]):
                self._objective.discard(each, weights=True)
        return ranking[:1] == [number]

    def _leave_untold(self) -> Iterator[TrialEvent]:
        """Let go of trials that have ended and could not be told: who adopts them does it."""
        for number, slot in list(self._slots.items()):
            if slot.verdict is not None and slot.verdict.state is TrialState.COMPLETE and not slot.held.is_lost:
                with suppress(ArtifactError):  # then its last epochs are trained again
                    self._objective.save_checkpoint(number)
            self._let_go(number, reason="stopped")
            yield TrialEvent("released", number, reason="stopped")

    def _sweep(self) -> None:
        """Remove what trials left behind whose workers were killed; another worker does it if this one cannot."""
        with suppress(DatabaseAwayError, ArtifactError):
            self._objective.sweep(self._leases.finished())

    def _out_of_memory(self, error: DeviceMemoryError) -> Iterator[TrialEvent]:
        """Halve what trains side by side; a single trial ends if its own shapes need too much, else the worker."""
        numbers = [number for number, slot in self._slots.items() if slot.verdict is None]
        if len(numbers) == 1 and self._objective.train_in_turn():
            reason = "out of memory; its folds train in turn from here on"
            self._let_go(numbers[0], reason=reason)
            yield TrialEvent("released", numbers[0], reason=reason)
            return
        if len(numbers) == 1 and self._objective.searches_shapes:
            yield from self._conclude(self._slots[numbers[0]], _failed("pruned", TrialState.PRUNED, str(error)))
            return
        if len(numbers) <= 1:
            for number in numbers:
                self._let_go(number, reason=str(error))
            message = f"{error} {error.remedy}"
            raise DeviceMemoryError(message)
        self._n_slots = len(numbers) // 2
        reason = f"out of memory with {len(numbers)} trials side by side; {self._n_slots} from here on"
        # All of them, in whatever state that epoch is: each is adopted again and goes on from its checkpoint.
        for number in numbers:
            self._let_go(number, reason=reason)
            yield TrialEvent("released", number, reason=reason)

    def _let_go(self, number: int, *, reason: str, is_forgiven: bool = True) -> None:
        self._leases.release(self._slots[number].held, reason=reason, is_forgiven=is_forgiven)
        self._forget(number)

    def _forget(self, number: int) -> None:
        del self._slots[number]
        self._objective.release(number)
        self._claim_at = -math.inf


def _failed(kind: str, state: TrialState, reason: str) -> _Verdict:
    """Return the verdict on a trial of which nothing else can be known."""
    return _Verdict(kind, state, {"reason": reason})


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
