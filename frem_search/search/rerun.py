"""A trial trained once more from nothing, to see whether it comes to the same score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from frem_search.errors import UsageError
from frem_search.search.stored_trial import matching_dataset, stored_study_file, trial_params
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.system.device import cpu_threads
from frem_search.training.member import EpochReport
from frem_search.training.side_by_side.layouts import ALONE
from frem_search.training.single import settle, train

CONDITIONS = ("frem_search", "torch", "device", "host", "precision", "layout")  # under which equal means every bit


@dataclass(frozen=True)
class Repeat:
    """A trial trained once more.

    Args:
        study: The study's name.
        number: The trial's.
        score: The metric.
        stored: Its score.
        repeated: The score of the repetition.
        differing: The conditions that are others than the trial's, each as it was and as it is.
    """

    study: str
    number: int
    score: str
    stored: float
    repeated: float
    differing: Mapping[str, tuple[Any, Any]]

    @property
    def is_same(self) -> bool:
        """Whether both scores are equal in every bit."""
        return self.stored == self.repeated

    @property
    def is_fault(self) -> bool:
        """Whether the scores differ under conditions that promise equal ones."""
        return not self.is_same and not self.differing


def rerun(
    record: StudyRecord,
    trial: TrialRecord,
    *,
    dataset: str,
    device: str,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> Repeat:
    """Train a complete trial from nothing, with the seed, parameters and precision that are stored, and compare.

    It is trained by itself, on as many threads as then.

    Args:
        record: The study.
        trial: One of its trials.
        dataset: Name or folder of the images that it was trained on.
        device: As `find_device` takes it.
        on_epoch: Told of every epoch.

    Raises:
        UsageError: The trial is not complete.
        ContractError: The images are others than those of the study.
    """
    if trial.state != "complete" or trial.value is None:
        message = f"{record.name}: trial {trial.number} is {trial.state}, but only a complete trial can be repeated."
        raise UsageError(message)
    settled = settle(stored_study_file(record, trial, dataset=dataset), trial_params(record, trial))
    loaded = matching_dataset(record, settled)
    then = trial.user_attrs.get("provenance", {})
    with cpu_threads(then.get("threads")):
        trained = train(settled, loaded, device=device, on_epoch=on_epoch)
    then, now = _computed(then), _computed(trained.provenance)
    # The name of a GPU says how it computes; "cpu" does not, so that there another host is another condition.
    names = [name for name in CONDITIONS if name != "host" or str(now["device"]).startswith("cpu")]
    differing = {name: (then.get(name), now[name]) for name in names if then.get(name) != now[name]}
    return Repeat(record.name, trial.number, record.score, trial.value, trained.outcome.score, differing)


def _computed(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return conditions with the layout as far as it decides about bits: a member that is not stacked is by itself."""
    layout = provenance.get("layout", ALONE)
    told = f"{provenance['cohort']} {layout}" if layout == "stacked" else "by itself"
    return {**provenance, "layout": told}


def repeat_json(repeat: Repeat) -> dict[str, Any]:
    """Return the object that `rerun --json` prints."""
    return {
        "study": repeat.study,
        "trial": repeat.number,
        "score": repeat.score,
        "stored": repeat.stored,
        "repeated": repeat.repeated,
        "is_same": repeat.is_same,
        "conditions": {name: {"then": then, "now": now} for name, (then, now) in repeat.differing.items()},
    }


def repeat_lines(repeat: Repeat) -> list[str]:
    """Return what `rerun` prints; every digit of a score is shown."""
    name = f"{repeat.study} trial {repeat.number}: {repeat.score}"
    conditions = [f"  {name}: {then} then, {now} now" for name, (then, now) in repeat.differing.items()]
    if repeat.is_same:
        other = ", under other conditions:" if conditions else "."
        return [f"{name} {repeat.stored!r}, the same in every bit{other}", *conditions]
    gap = f"{name} {repeat.stored!r} then, {repeat.repeated!r} now, {abs(repeat.repeated - repeat.stored):.2g} apart"
    if conditions:
        return [f"{gap}, under other conditions:", *conditions]
    return [
        f"{gap}, although device, precision and versions are the same. Something in the training is not repeatable."
    ]
