"""Take trials of a study until its budget is spent."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from frem_search.artifacts import Artifacts
from frem_search.data.dataset import load_dataset
from frem_search.errors import DeviceMemoryError, FremSearchError, LeaseLostError, ParameterError
from frem_search.leases import Held, Leases
from frem_search.objective import Objective, Outcome
from frem_search.parameters import check, first_image_size
from frem_search.space import Space, distributions, resolve
from frem_search.storage import Storage
from frem_search.study import OpenStudy, make_contract, open_study
from frem_search.study_file import StudyFile
from frem_search.training.device import best_precision, describe_device, find_device
from frem_search.training.member import EpochReport, Member

MOST_REPORTS = 50  # that Optuna gets of a trial: its intermediate values are what slows a study down
BUSY_POLL_S = 2.0
MOST_ERRORS_IN_A_ROW = 3
BELOW_OTHERS = "its score is below what the pruner asks for"
KEPT_WEIGHTS = 3  # of the best trials; one of FREM's has 31 MB


class TrialTrainer(Protocol):
    """What a worker asks of an objective."""

    def admit(self, number: int, params: Mapping[str, Any]) -> Member:
        """Begin a trial, or go on with it."""

    def epochs(self) -> Iterator[EpochReport]:
        """Train what was admitted."""

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is."""

    def finish(self, number: int) -> Outcome:
        """Score a trial and store what it leaves behind."""

    def release(self, number: int) -> None:
        """Let a trial go."""

    def discard(self, number: int, *, weights: bool) -> None:
        """Remove what a finished trial needs no longer."""

    @property
    def searches_shapes(self) -> bool:
        """Whether one trial may need more memory than another."""

    def member(self, number: int) -> Member:
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
        report: Of an epoch.
        value: Of a finished trial.
        reason: Why it did not complete.
    """

    kind: str
    number: int
    params: Mapping[str, Any] | None = None
    report: EpochReport | None = None
    value: float | None = None
    reason: str = ""


class Worker:
    """Trains trials one after another, and tells what happens as it happens.

    Args:
        leases: Through which trials are claimed and told.
        objective: Which trains them.
        space: The study's, to complete what was drawn.
        n_epochs: The study's.
        is_stopping: Asked after every epoch; once it says yes, the trial is stored and let go.
        checkpoint_every_s: At most so much training is lost when the worker is killed.
    """

    def __init__(
        self,
        leases: Leases,
        objective: TrialTrainer,
        *,
        space: Space,
        n_epochs: int,
        is_stopping: Callable[[], bool] = lambda: False,
        checkpoint_every_s: float = 60.0,
    ) -> None:
        self._leases, self._objective, self._space = leases, objective, space
        self._report_every = -(-n_epochs // MOST_REPORTS)
        self._n_epochs, self._is_stopping = n_epochs, is_stopping
        self._checkpoint_every_s = checkpoint_every_s
        self._errors_in_a_row = 0

    def work(self) -> Generator[TrialEvent, None, None]:
        """Take trials until the budget is spent or the worker is asked to stop."""
        while not self._is_stopping():
            held = self._leases.claim()
            if held == "spent":
                return
            if held == "busy":
                yield TrialEvent("waiting", -1)
                self._sleep(BUSY_POLL_S)
                continue
            assert isinstance(held, Held)
            try:
                yield from self._train(held)
            except LeaseLostError as error:
                yield TrialEvent("lost", held.number, reason=str(error))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_stopping():
            time.sleep(0.1)

    def _train(self, held: Held) -> Iterator[TrialEvent]:
        """Train one trial to whatever end it comes to."""
        try:
            params = resolve(self._space, held.trial.params)
            yield TrialEvent("adopted" if held.is_adopted else "claimed", held.number, params=params)
            self._objective.admit(held.number, params)
            try:
                yield from self._run(held)
            finally:
                self._objective.release(held.number)
            self._errors_in_a_row = 0
        except LeaseLostError:
            raise
        except (KeyboardInterrupt, GeneratorExit):
            self._leases.release(held, reason="stopped")
            raise
        except ParameterError as error:  # of an enqueued trial, say: no other worker could train it either
            yield self._fail(held, error)
        except DeviceMemoryError as error:
            yield self._out_of_memory(held, error)
        except (FremSearchError, OSError) as error:
            # The machine's fault, not the trial's: it waits for the next worker, and this one ends.
            self._leases.release(held, reason=str(error), is_forgiven=False)
            raise
        except Exception as error:  # noqa: BLE001 whatever the code of a network, loss or metric raises
            yield self._fail(held, error)

    def _run(self, held: Held) -> Iterator[TrialEvent]:
        """Train an admitted trial epoch by epoch."""
        held.epoch = self._objective.member(held.number).epoch
        if held.is_adopted:
            self._leases.resumed(held)
        if held.is_adopted and held.reported and self._leases.should_prune(held):
            yield self._prune(held, BELOW_OTHERS)
            return
        # An adopted trial is stored after its first epoch: one that is killed again and again still advances.
        saved_at = -math.inf if held.is_adopted else time.monotonic()
        for report in self._objective.epochs():
            held.epoch = report.epoch
            yield TrialEvent("epoch", held.number, report=report)
            if reason := self._reason_to_prune(held, report):
                yield self._prune(held, reason)
                return
            if report.is_done:
                break
            is_stopping = self._is_stopping()
            if is_stopping or time.monotonic() - saved_at > self._checkpoint_every_s:
                self._checkpoint(held)
                saved_at = time.monotonic()
            if is_stopping:
                self._leases.release(held, reason="stopped")
                yield TrialEvent("released", held.number, reason="stopped")
                return
        yield self._complete(held)

    def _reason_to_prune(self, held: Held, report: EpochReport) -> str:
        """Report what is due; return why the trial ends here, or nothing."""
        if held.is_lost:
            message = f"trial {held.number}: another worker took it while this one was out of touch."
            raise LeaseLostError(message)
        if not report.is_finite:
            return f"the training loss was no number in epoch {report.epoch}"
        is_due = report.epoch % self._report_every == 0 and report.epoch > held.reported
        if report.is_done or not is_due:
            return ""
        self._leases.report(held, report.best_score, step=report.epoch)
        return BELOW_OTHERS if self._leases.should_prune(held) else ""

    def _checkpoint(self, held: Held) -> None:
        self._objective.save_checkpoint(held.number)
        member = self._objective.member(held.number)
        self._leases.checkpointed(held, epoch=member.epoch, curve=member.curve)

    def _complete(self, held: Held) -> TrialEvent:
        outcome = self._objective.finish(held.number)
        self._tell(held, TrialState.COMPLETE, {"result": outcome.result}, value=outcome.score)
        # A few more than the one that fell out of the best, in case another worker finished at the same time.
        ranking = self._leases.ranking(most=2 * KEPT_WEIGHTS)
        for number in {held.number, *ranking}.difference(ranking[:KEPT_WEIGHTS]):
            self._objective.discard(number, weights=True)
        return TrialEvent("complete", held.number, value=outcome.score)

    def _prune(self, held: Held, reason: str) -> TrialEvent:
        self._tell(held, TrialState.PRUNED, {"reason": reason})
        return TrialEvent("pruned", held.number, value=self._objective.member(held.number).best_score, reason=reason)

    def _out_of_memory(self, held: Held, error: DeviceMemoryError) -> TrialEvent:
        """End a trial whose own shapes need too much; for any other this machine is too small, and the worker ends."""
        if not self._objective.searches_shapes:
            self._leases.release(held, reason=str(error))
            raise error
        self._leases.tell(held, state=TrialState.PRUNED, attrs={"reason": str(error)})
        self._objective.discard(held.number, weights=False)
        return TrialEvent("pruned", held.number, reason=str(error))

    def _fail(self, held: Held, error: Exception) -> TrialEvent:
        """Fail a trial; a worker whose trials fail one after another ends with the error."""
        reason = f"{type(error).__name__}: {error}"
        self._errors_in_a_row += 1
        self._leases.tell(held, state=TrialState.FAIL, attrs={"reason": reason})
        self._objective.discard(held.number, weights=False)
        if self._errors_in_a_row >= MOST_ERRORS_IN_A_ROW:
            raise error
        return TrialEvent("failed", held.number, reason=reason)

    def _tell(self, held: Held, state: TrialState, attrs: Mapping[str, Any], *, value: float | None = None) -> None:
        provenance = self._objective.provenance(held.number)
        curve = self._objective.member(held.number).curve
        attrs = {**attrs, "provenance": provenance}
        self._leases.tell(held, state=state, value=value, step=self._n_epochs, attrs=attrs, curve=curve)
        self._objective.discard(held.number, weights=False)


@contextmanager
def open_worker(
    study_file: StudyFile,
    storage: Storage,
    *,
    device: str = "auto",
    artifacts: str,
    is_stopping: Callable[[], bool] = lambda: False,
    checkpoint_every_s: float = 60.0,
) -> Iterator[tuple[OpenStudy, Worker]]:
    """Check everything that can be checked, begin or join the study, and give a worker for it.

    Args:
        study_file: The study.
        storage: Its database.
        device: As `find_device` takes it.
        artifacts: The URL of checkpoints, weights and predictions.
        is_stopping: As `Worker` takes it.
        checkpoint_every_s: As `Worker` takes it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check(study_file)
    chosen = find_device(device)
    dataset = load_dataset(study_file.dataset, image_size=first_image_size(study_file))
    dataset.indices("train", fold=study_file.fold)
    Artifacts(artifacts, "").check()
    contract = make_contract(
        study_file,
        precision=best_precision(chosen) if study_file.precision == "auto" else study_file.precision,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
    )
    study = open_study(storage, study_file, contract)
    objective = Objective(
        study_file,
        dataset,
        device=chosen,
        precision=study.contract["precision"],
        artifacts=Artifacts(artifacts, study.artifacts_prefix),
        study_uid=study.uid,
    )
    leases = Leases(
        storage, study.optuna, distributions=distributions(study_file.space), device=describe_device(chosen)
    )
    with leases:
        yield (
            study,
            Worker(
                leases,
                objective,
                space=study_file.space,
                n_epochs=study_file.n_epochs,
                is_stopping=is_stopping,
                checkpoint_every_s=checkpoint_every_s,
            ),
        )
