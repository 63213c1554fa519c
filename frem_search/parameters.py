"""The parameters of a trial, given to those whom they concern; and a whole study checked for what they take."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from frem_search.errors import ParameterError, StudyFileError, UsageError
from frem_search.losses import LOSSES
from frem_search.metrics import METRICS
from frem_search.networks import build_network, network_params
from frem_search.space import corners
from frem_search.study_file import StudyFile


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """What a study may set about training; the paper gives none of it, see docs/decisions.md."""

    learning_rate: float = 1e-3
    batch_size: int = 8
    image_size: int | tuple[int, int] | None = None
    augmentation: bool = True

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ParameterError(name="learning_rate", expected="a finite number above 0", got=rate)
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ParameterError(name="batch_size", expected="an integer of at least 1", got=self.batch_size)
        if not isinstance(self.augmentation, bool):
            raise ParameterError(name="augmentation", expected="true or false", got=self.augmentation)
        sides = self.image_size if isinstance(self.image_size, list | tuple) else (self.image_size,) * 2
        if self.image_size is not None and (
            len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides)
        ):
            raise ParameterError(name="image_size", expected="pixels, or [rows, columns]", got=self.image_size)


TRAINING_PARAMS = tuple(inspect.signature(TrainingParams).parameters)


@dataclass(frozen=True)
class SplitParams:
    """The parameters of one trial, by whom they concern."""

    training: TrainingParams
    network: dict[str, Any]
    coefficients: dict[str, float]


def split_params(study_file: StudyFile, params: Mapping[str, Any]) -> SplitParams:
    """Give training, network and loss their parameters.

    Raises:
        ParameterError: Nobody takes a parameter, or it has a wrong value.
    """
    loss = LOSSES[study_file.loss]
    known = network_params(study_file.network)
    training = {name: value for name, value in params.items() if name in TRAINING_PARAMS}
    if isinstance(training.get("image_size"), list):
        training["image_size"] = tuple(training["image_size"])
    coefficients = {name: params.get(name, default) for name, default in loss.coefficients.items()}
    for name, value in coefficients.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ParameterError(name, "a weight from 0 to 1", value)
    network = {name: value for name, value in params.items() if name in known}
    for name in params:
        if name not in (*TRAINING_PARAMS, *known, *loss.coefficients):
            names = ", ".join(sorted((*TRAINING_PARAMS, *known, *loss.coefficients)))
            raise ParameterError(
                name, f"one of the parameters of {study_file.network}, its loss and training: {names}", name
            )
    return SplitParams(TrainingParams(**training), network, coefficients)


def first_image_size(study_file: StudyFile) -> int | tuple[int, int] | None:
    """Return the size at which a study's images are read first."""
    return split_params(study_file, next(corners(study_file.space))).training.image_size


def check(study_file: StudyFile) -> None:
    """Check a study's names and widths by building the network, without memory, at the corners of the space.

    Raises:
        StudyFileError: The message names file, key, what was expected and what was got.
    """
    for key, name, known in (("loss", study_file.loss, LOSSES), ("score", study_file.score, METRICS)):
        if name not in known:
            message = f"{study_file.path}: {key}: expected one of {', '.join(known)}, but got {name!r}."
            raise StudyFileError(message)
    try:
        for params in corners(study_file.space):
            _check_corner(study_file, params)
        _check_coefficients(study_file)
    except StudyFileError:
        raise
    except ParameterError as error:
        message = f"{study_file.path}: params.{error}"
        raise StudyFileError(message) from None
    except UsageError as error:
        message = f"{study_file.path}: network: {error}"
        raise StudyFileError(message) from None


def _check_corner(study_file: StudyFile, params: Mapping[str, Any]) -> None:
    split = split_params(study_file, params)
    try:
        build_network(study_file.network, in_channels=1, n_classes=2, seed=0, params=split.network, device="meta")
    except (RuntimeError, OverflowError) as error:
        message = f"{study_file.path}: params: expected sizes that a tensor can have, but got {split.network}: {error}."
        raise StudyFileError(message) from None


def _check_coefficients(study_file: StudyFile) -> None:
    """A weight of an auxiliary loss needs a network that has an auxiliary output."""
    given = sorted(set(study_file.space) & set(LOSSES[study_file.loss].coefficients))
    if not given:
        return
    tried = []
    for params in corners(study_file.space):
        kind = {name: value for name, value in params.items() if isinstance(value, bool | str)}
        if kind in tried:  # numbers do not decide which outputs a network has
            continue
        tried.append(kind)
        split = split_params(study_file, params)
        network = build_network(study_file.network, in_channels=1, n_classes=2, seed=0, params=split.network)
        if network(torch.zeros(2, 1, 32, 32)).auxiliary is None:
            raise ParameterError(given[0], "a network with an auxiliary output (supervision = true)", kind)


def searches_shapes(study_file: StudyFile) -> bool:
    """Whether trials of a study differ in the shape of a tensor, so that one may need more memory than another."""
    shapes = set()
    for params in corners(study_file.space):
        split = split_params(study_file, params)
        network = build_network(
            study_file.network, in_channels=1, n_classes=2, seed=0, params=split.network, device="meta"
        )
        weights = tuple(tuple(value.shape) for value in network.state_dict().values())
        shapes.add((split.training.image_size, split.training.batch_size, weights))
    return len(shapes) > 1
