"""Take trials of a study until its budget is spent."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from optuna.trial import TrialState

from frem_search.errors import DeviceMemoryError, FremSearchError, LeaseLostError, ParameterError
from frem_search.leases import Held, Leases
from frem_search.space import Space, resolve

if TYPE_CHECKING:
    from frem_search.objective import Outcome
    from frem_search.training.folds import Folds
    from frem_search.training.member import EpochReport

BEHIND_IMAGES = 10**6  # the step of the mean over images, of a trial that is pruned by fold
MOST_REPORTS = 50  # that Optuna gets of a trial: its intermediate values are what slows a study down
BUSY_POLL_S = 2.0
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
class TrialEvent:
    """Something that happened to a trial, for whoever shows progress.

    Args:
        kind: `claimed`, `adopted`, `epoch`, `complete`, `pruned`, `failed`, `released`, `lost` or `waiting`.
        number: The trial's number; -1 while waiting for others.
        params: Of a claimed or adopted trial.
        epoch: How many epochs are done.
        report: Of an epoch that was trained here.
        value: Of a finished trial.
        reason: Why it did not complete.
    """

    kind: str
    number: int
    params: Mapping[str, Any] | None = None
    epoch: int = 0
    report: "EpochReport | None" = None
    value: float | None = None
    reason: str = ""


@dataclass(eq=False)
class _Slot:
    """A trial in training.

    Args:
        held: Its lease.
        saved_at: When its last checkpoint was stored, by `time.monotonic`.
    """

    held: Held
    saved_at: float


class Worker:
    """Trains trials, some of them side by side, and tells what happens as it happens.

    A trial that ends leaves its slot to the next one at the end of its epoch; nobody waits for the others.

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
        self._errors_in_a_row = 0
        self._n_slots = n_slots
        self._slots: dict[int, _Slot] = {}
        self._is_spent = False
        self._claim_at = -math.inf

    def work(self) -> Generator[TrialEvent, None, None]:
        """Take trials until the budget is spent or the worker is asked to stop."""
        reason = "stopped"
        try:
            while True:
                try:
                    yield from self._fill_slots()
                    if not self._slots and (self._is_spent or self._is_stopping()):
                        return
                    yield from self._train() if self._slots else self._wait()
                except DeviceMemoryError as error:
                    yield from self._out_of_memory(error)
        except (FremSearchError, OSError) as error:
            reason = str(error)
            raise
        finally:
            # Whoever stops listening, a signal or an error: no trial waits for the end of a lease that nobody needs.
            for number in list(self._slots):
                self._let_go(number, reason=reason)

    def _wait(self) -> Iterator[TrialEvent]:
        """Wait for trials that others hold: they may leave one behind."""
        yield TrialEvent("waiting", -1)
        while time.monotonic() < self._claim_at and not self._is_stopping():
            time.sleep(0.1)

    def _fill_slots(self) -> Iterator[TrialEvent]:
        """Claim a trial for each free slot, as far as there are trials."""
        while len(self._slots) < self._n_slots and time.monotonic() >= self._claim_at and not self._is_stopping():
            held = self._leases.claim()
            if isinstance(held, Held):
                yield from self._guarded(held, self._begin(held))
                continue
            self._is_spent = held == "spent"
            self._claim_at = time.monotonic() + BUSY_POLL_S
            return

    def _begin(self, held: Held) -> Iterator[TrialEvent]:
        """Give a claimed trial a slot."""
        # An adopted trial is stored after its first epoch: one that is killed again and again still advances.
        self._slots[held.number] = _Slot(held, -math.inf if held.is_adopted else time.monotonic())
        params = resolve(self._space, held.trial.params)
        yield TrialEvent("adopted" if held.is_adopted else "claimed", held.number, params=params)
        trial = self._objective.admit(held.number, params)
        held.epoch = trial.epoch
        if held.is_adopted:
            self._leases.resumed(held)
            # What was trained while the database was away, by a worker that did not live to tell it.
            for step, value in self._owed(held, trial):
                self._leases.report(held, value, step=step)
            if trial.is_done:  # it was not pruned when it came there
                yield self._complete(held)
            elif held.reported and self._leases.should_prune(held):
                yield self._prune(held, BELOW_OTHERS)

    def _train(self) -> Iterator[TrialEvent]:
        """Train the trials of all slots until none is left, and fill slots that become free."""
        with closing(self._objective.epochs()) as reports:
            for report in reports:
                held = self._slots[report.key].held
                yield from self._guarded(held, self._after_epoch(held, report))
                yield from self._fill_slots()

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
            yield self._fail(held, error)
        except (FremSearchError, OSError) as error:
            # The machine's fault, not the trial's: it waits for the next worker, and this one ends.
            self._let_go(held.number, reason=str(error), is_forgiven=False)
            raise
        except Exception as error:  # noqa: BLE001 whatever the code of a network, loss or metric raises
            yield self._fail(held, error)

    def _after_epoch(self, held: Held, report: "EpochReport") -> Iterator[TrialEvent]:
        """Report, prune, finish, store or let go, whatever is due."""
        if held.is_lost:
            message = f"trial {held.number}: another worker took it while this one was out of touch."
            raise LeaseLostError(message)
        if report.error is not None:
            raise report.error
        held.epoch = report.epoch
        yield TrialEvent("epoch", held.number, epoch=report.epoch, report=report)
        if reason := self._reason_to_prune(held, report):
            yield self._prune(held, reason)
        elif report.is_done:
            yield self._complete(held)
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
        due = self._due(held, report)
        for step, value in due:
            self._leases.report(held, value, step=step)
        return BELOW_OTHERS if due and not report.is_done and self._leases.should_prune(held) else ""

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
        self._objective.save_checkpoint(held.number)
        trial = self._objective.trial(held.number)
        self._leases.checkpointed(held, epoch=trial.epoch, curve=trial.curve)
        self._slots[held.number].saved_at = time.monotonic()

    def _complete(self, held: Held) -> TrialEvent:
        outcome = self._objective.finish(held.number)
        self._tell(held, TrialState.COMPLETE, {"result": outcome.result}, value=outcome.score, shown=outcome.shown)
        # A few more than the one that fell out of the best, in case another worker finished at the same time.
        ranking = self._leases.ranking(most=2 * KEPT_WEIGHTS)
        for number in {held.number, *ranking}.difference(ranking[:KEPT_WEIGHTS]):
            self._objective.discard(number, weights=True)
        self._forget(held.number)
        return TrialEvent("complete", held.number, value=outcome.score)

    def _prune(self, held: Held, reason: str) -> TrialEvent:
        trial = self._objective.trial(held.number)
        value = trial.best_score
        if trial.in_sequence and trial.image_scores:
            # A pruned trial's last report is its value, by which TPE ranks it: not that of one image.
            value = sum(trial.image_scores) / len(trial.image_scores)
            self._leases.report(held, value, step=BEHIND_IMAGES)
        self._tell(held, TrialState.PRUNED, {"reason": reason})
        self._forget(held.number)
        return TrialEvent("pruned", held.number, value=value, reason=reason)

    def _tell(
        self,
        held: Held,
        state: TrialState,
        attrs: Mapping[str, Any],
        *,
        value: float | None = None,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        provenance = self._objective.provenance(held.number)
        trial = self._objective.trial(held.number)
        step = 0 if trial.in_sequence else self._n_epochs  # whose steps are images, the last of them reported
        attrs = {**attrs, "provenance": provenance}
        self._leases.tell(held, state=state, value=value, step=step, attrs=attrs, shown=shown, curve=trial.curve)
        self._objective.discard(held.number, weights=False)
        self._errors_in_a_row = 0

    def _fail(self, held: Held, error: Exception) -> TrialEvent:
        """Fail a trial; a worker whose trials fail one after another ends with the error."""
        event = self._end(held, kind="failed", reason=f"{type(error).__name__}: {error}")
        if event.kind == "failed":
            self._errors_in_a_row += 1
            if self._errors_in_a_row >= MOST_ERRORS_IN_A_ROW:
                raise error
        return event

    def _out_of_memory(self, error: DeviceMemoryError) -> Iterator[TrialEvent]:
        """Halve what trains side by side; a single trial ends if its own shapes need too much, else the worker."""
        numbers = list(self._slots)
        if len(numbers) == 1 and self._objective.train_in_turn():
            reason = "out of memory; its folds train in turn from here on"
            self._let_go(numbers[0], reason=reason)
            yield TrialEvent("released", numbers[0], reason=reason)
            return
        if len(numbers) == 1 and self._objective.searches_shapes:
            yield self._end(self._slots[numbers[0]].held, kind="pruned", reason=str(error))
            return
        if len(numbers) <= 1:
            raise error
        self._n_slots = len(numbers) // 2
        reason = f"out of memory with {len(numbers)} trials side by side; {self._n_slots} from here on"
        # All of them, in whatever state that epoch is: each is adopted again and goes on from its checkpoint.
        for number in numbers:
            self._let_go(number, reason=reason)
            yield TrialEvent("released", number, reason=reason)

    def _end(self, held: Held, *, kind: str, reason: str) -> TrialEvent:
        """Tell a trial that nothing can be known of, unless it was lost."""
        state = TrialState.PRUNED if kind == "pruned" else TrialState.FAIL
        try:
            self._leases.tell(held, state=state, attrs={"reason": reason})
            self._objective.discard(held.number, weights=False)
        except LeaseLostError as lost:
            kind, reason = "lost", str(lost)
        self._forget(held.number)
        return TrialEvent(kind, held.number, reason=reason)

    def _let_go(self, number: int, *, reason: str, is_forgiven: bool = True) -> None:
        self._leases.release(self._slots[number].held, reason=reason, is_forgiven=is_forgiven)
        self._forget(number)

    def _forget(self, number: int) -> None:
        del self._slots[number]
        self._objective.release(number)
        self._claim_at = -math.inf
