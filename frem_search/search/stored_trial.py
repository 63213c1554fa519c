"""A trial of a stored study, as something to train once more or to predict with."""

from pathlib import Path
from typing import Any

from frem_search.data.dataset import Dataset
from frem_search.errors import ArtifactError, ContractError, UsageError
from frem_search.segmentation.weights import Weights, load_weights
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import Sampler, StudyFile
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.study.space import resolve, searched, space_from_json
from frem_search.study.stored import artifacts_prefix
from frem_search.training.recipe import load_images
from frem_search.training.results import WEIGHTS, place


def find_trial(record: StudyRecord, which: str) -> TrialRecord:
    """Return a trial by number, or the `best` one.

    Raises:
        UsageError: There is no such trial.
    """
    if which == "best" and record.best is not None:
        return record.best
    found = [trial for trial in record.trials if str(trial.number) == which]
    if not found:
        has = f"trials 0 to {len(record.trials) - 1}" if record.trials else "no trial"
        complete = "" if record.complete else ", none of them complete"
        message = f"--trial: expected best or a number of {record.name}, which has {has}{complete}, but got {which!r}."
        raise UsageError(message)
    return found[0]


def trial_params(record: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    """Return all parameters of a trial, drawn and fixed.

    Raises:
        UsageError: Nothing was drawn for it yet.
    """
    space = space_from_json(record.contract["space"])
    if missing := [name for name in searched(space) if name not in trial.params]:
        message = f"{record.name}: trial {trial.number} is {trial.state} and has no value yet for {', '.join(missing)}."
        raise UsageError(message)
    return resolve(space, trial.params)


def stored_weights(record: StudyRecord, trial: TrialRecord, *, artifacts: str, fold: int | None = None) -> Weights:
    """Return the weights that a study kept of a trial.

    Args:
        record: The study.
        trial: One of its trials.
        artifacts: The URL under which studies keep their files.
        fold: Of a cross-validation, which fold's; None is the first one's.

    Raises:
        UsageError: There is no such fold.
        ArtifactError: It keeps none of this trial, or the file is torn.
    """
    stored = Artifacts(artifacts, artifacts_prefix(record.name, record.uid))
    n_folds = record.contract.get("n_folds")
    if n_folds is not None and not 0 <= (fold or 0) < n_folds:
        message = f"--fold: expected 0 to {n_folds - 1}, the folds of {record.name}, but got {fold}."
        raise UsageError(message)
    name = f"{place(trial.number, None if n_folds is None else fold or 0)}/{WEIGHTS}"
    content = stored.read(name)
    if content is None:
        message = (
            f"{stored.url(name)}: trial {trial.number} of {record.name} has no weights here: a study keeps those of "
            f"its best trials. Train them anew with `frem-search train --study {record.name} --trial {trial.number} "
            "--out FILE.pt`, or say with --artifacts where the study keeps its files."
        )
        raise ArtifactError(message)
    return load_weights(content, where=stored.url(name))


def stored_study_file(record: StudyRecord, trial: TrialRecord, *, dataset: str) -> StudyFile:
    """Return a study as it was begun, whatever its file says today, with the precision and seed of one of its trials.

    Args:
        record: The study.
        trial: Its seed is another than the study's where a fork copied it from a study with another one.
        dataset: Name or folder of the images.
    """
    contract = record.contract
    seed = trial.user_attrs.get("provenance", {}).get("seed", contract["seed"])
    return StudyFile(
        name=record.name,
        path=Path(record.name),
        text="",
        title=record.title,
        dataset=dataset,
        network=contract["network"],
        n_trials=record.n_trials,
        n_epochs=contract["n_epochs"],
        space=space_from_json(contract["space"]),
        loss=contract["loss"],
        score=contract["score"],
        fold=contract["fold"],
        n_folds=contract.get("n_folds"),
        precision=contract["precision"],
        sampler=Sampler(contract["sampler"], seed, contract["n_startup_trials"]),
    )


def matching_dataset(record: StudyRecord, settled: StudyFile) -> Dataset:
    """Load the images of a stored study.

    Raises:
        ContractError: Their content is another than when the study was begun.
    """
    dataset = load_images(settled)
    if dataset.fingerprint != record.contract["dataset_fingerprint"]:
        message = (
            f"{dataset.folder}: expected the images that {record.name} was trained on (fingerprint "
            f"{record.contract['dataset_fingerprint'][:12]}), but got others ({dataset.fingerprint[:12]}). "
            "Give their folder with --dataset as the study was started with."
        )
        raise ContractError(message)
    return dataset
