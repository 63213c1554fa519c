"""One configuration trained without a search: its parameters, and the training just as a trial has it."""

import os
import re
import tomllib
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frem_search.data.dataset import Dataset
from frem_search.errors import ArtifactError, DeviceMemoryError, FremSearchError, StudyFileError, UsageError
from frem_search.segmentation.weights import dump_weights, load_weights
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import StudyFile
from frem_search.study.space import Fixed, Param, Range, resolve, searched
from frem_search.system.device import best_precision, find_device
from frem_search.system.files import write_atomically
from frem_search.training.member import EpochReport
from frem_search.training.objective import Objective, Outcome
from frem_search.training.recipe import check
from frem_search.training.results import WEIGHTS, place


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training without a search leaves behind.

    Args:
        weights: The content of each weights file, by what is added to the file's name: "" for the only one, "-fold0"
            and so on for those of a cross-validation.
        outcome: Score and result as a trial has them.
        provenance: The conditions as a trial has them.
    """

    weights: Mapping[str, bytes]
    outcome: Outcome
    provenance: Mapping[str, Any]


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` with a value as TOML writes it; a bare word is a text, because a shell takes quotes away.

    Raises:
        UsageError: It has another form, or names a parameter twice.

    >>> parse_settings(["B=8", "X=2.5e2", "image_size=[32, 48]", "normalization=batch_norm"])
    {'B': 8, 'X': 250.0, 'image_size': [32, 48], 'normalization': 'batch_norm'}
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        try:
            table = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            table = {"value": text} if re.fullmatch(r"[A-Za-z_]\w*", text) else {}
        if not equals or not name or list(table) != ["value"] or name in parsed:
            message = f"--set: expected NAME=VALUE such as B=8 or X=250.0, each name once, but got {setting!r}."
            raise UsageError(message)
        parsed[name] = table["value"]
    return parsed


def settle(study_file: StudyFile, settings: Mapping[str, Any]) -> StudyFile:
    """Return the study with every parameter fixed: as the settings say, else as the study itself fixes it.

    Raises:
        UsageError: A searched parameter has no setting, or network, loss and training do not take a value.
    """
    check(study_file)
    space = {name: param for name, param in study_file.space.items() if name not in settings}
    if missing := searched(space):
        listed = ", ".join(f"{name} ({describe_param(space[name])})" for name in missing)
        message = (
            f"{study_file.name}: expected a value for every parameter that is searched, but got none for {listed}. "
            "Add --set NAME=VALUE for each, or take those of a trial with --trial."
        )
        raise UsageError(message)
    settled = replace(study_file, space=space | {name: Fixed(value) for name, value in settings.items()})
    try:
        check(settled)
    except StudyFileError as error:
        message = f"--set: {error}"
        raise UsageError(message) from None
    return settled


def describe_param(param: Param) -> str:
    """Return what a study searches for a parameter.

    >>> describe_param(Range(1, 512))
    '1 to 512'
    """
    if isinstance(param, Range):
        return f"{param.low} to {param.high}" + (f" in steps of {param.step}" if param.step else "")
    return " or ".join(map(str, param.bounds()))


def train(
    settled: StudyFile,
    dataset: Dataset,
    *,
    device: str,
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
) -> Trained:
    """Train one configuration just as a trial would be trained.

    Args:
        settled: A study whose parameters are all fixed.
        dataset: At the size of `first_image_size`.
        device: As `find_device` takes it.
        on_epoch: Told of every epoch.

    Raises:
        FremSearchError: The loss was no number.
        DeviceError: The device failed, or has no memory left.
    """
    chosen = find_device(device)
    precision = best_precision(chosen) if settled.precision == "auto" else settled.precision
    # In memory: an interrupted training leaves nothing behind.
    artifacts = Artifacts("memory://", uuid.uuid4().hex)
    objective = Objective(settled, dataset, device=chosen, precision=precision, artifacts=artifacts, study_uid="")
    try:
        objective.admit(0, resolve(settled.space, {}))
        for report in objective.epochs():
            if report.error is not None:
                raise report.error
            on_epoch(report)
            if not report.is_finite:
                message = f"{settled.name}: epoch {report.epoch}: the loss is no number. Lower learning_rate or X."
                raise FremSearchError(message)
        outcome = objective.finish(0)
        folds = [None] if settled.n_folds is None else settled.folds
        weights = {
            "" if fold is None else f"-fold{fold}": _without_trial(artifacts, f"{place(0, fold)}/{WEIGHTS}")
            for fold in folds
        }
        return Trained(weights, outcome, objective.provenance(0))
    except DeviceMemoryError as error:
        message = f"{error} {error.remedy}"
        raise DeviceMemoryError(message) from None
    finally:
        artifacts.remove_all()


def _without_trial(artifacts: Artifacts, name: str) -> bytes:
    stored = load_weights(artifacts.read(name) or b"", where=artifacts.url(name))
    return dump_weights(replace(stored, trial=None))


def check_target(path: Path) -> None:
    """Make sure, before anything is trained, that the weights can be written.

    Raises:
        ArtifactError: The path is a folder, or its folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = "it is a folder" if path.is_dir() else "" if os.access(path.parent, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        message = f"--out {path}: cannot be written: {reason}. Choose the path of a file in a folder of yours."
        raise ArtifactError(message)


def save_weights(weights: Mapping[str, bytes], path: Path) -> list[Path]:
    """Write weights files and return their paths: `path` with what each adds to its name.

    Raises:
        ArtifactError: The disk is full, or the folder is gone; what was there is left.
    """
    paths = {path.with_stem(path.stem + added): content for added, content in weights.items()}
    for each, content in paths.items():
        _save(content, each)
    return list(paths)


def _save(content: bytes, path: Path) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        message = (
            f"--out {path}: cannot be written ({len(content)} bytes): {reason}. Free space, or choose another path."
        )
        raise ArtifactError(message) from None
