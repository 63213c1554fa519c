"""The parameters of a trial, given to those whom they concern; and a whole study checked for what they take."""

import inspect
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

import torch

from frem_search.data.dataset import Dataset, load_dataset
from frem_search.errors import ParameterError, StudyFileError, UsageError
from frem_search.losses import LOSSES
from frem_search.metrics import METRICS, check_score
from frem_search.networks import build_network, network_params
from frem_search.space import corners
from frem_search.study_file import StudyFile


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: object) -> bool:
    sides = value if isinstance(value, list | tuple) else (value, value)
    return len(sides) == 2 and all(_is_count(side) for side in sides)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_schedule(value: object) -> bool:
    """Whether it is a list of epochs, each later than the one before, with a factor above 0 each."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, list | tuple) for each in value):
        return False
    are_pairs = all(len(each) == 2 and _is_count(each[0]) and _is_number(each[1]) and each[1] > 0 for each in value)
    return are_pairs and all(one[0] < other[0] for one, other in pairwise(value))


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


# What a study may say, in words and as a test.
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": ("a finite number above 0", lambda value: _is_number(value) and value > 0),
    "batch_size": ("an integer of at least 1", _is_count),
    "augmentation": ("true or false", _is_flag),
    "image_size": ("pixels, or [rows, columns]", lambda value: value is None or _is_size(value)),
    "rotation": ("true or false", _is_flag),
    "alpha": ("a finite number of at least 0", lambda value: _is_number(value) and value >= 0),
    "sigma_elastic": ("pixels from 0.1 to 1000", lambda value: _is_number(value) and 0.1 <= value <= 1000),
    "elastic_from": ("a score from 0 to 1", _is_share),
    "mirror_quarters": ("a share from 0 to 1", _is_share),
    "crop_size": ("pixels, or [rows, columns]", lambda value: value is None or _is_size(value)),
    "weight_decay": ("a finite number of at least 0", lambda value: _is_number(value) and value >= 0),
    "schedule": ("{ value = [[epoch, factor], ...] } with rising epochs from 1 on and factors above 0", _is_schedule),
    "patience": ("an integer of at least 1", lambda value: value is None or _is_count(value)),
    "steps_per_epoch": ("an integer of at least 1", lambda value: value is None or _is_count(value)),
    "tiles": ("an integer of at least 1", _is_count),
    "eightfold": ("true or false", _is_flag),
}


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """What a study may set about training; the meaning of each is in docs/studies.md, the reasons in docs/decisions.md.

    Raises:
        ParameterError: One has a wrong value.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    image_size: int | tuple[int, int] | None = None
    augmentation: bool = True
    rotation: bool = False
    alpha: float = 0.0
    sigma_elastic: float = 4.0
    elastic_from: float = 0.0
    mirror_quarters: float = 0.0
    crop_size: int | tuple[int, int] | None = None
    weight_decay: float = 0.0
    schedule: tuple[tuple[int, float], ...] = ()
    patience: int | None = None
    steps_per_epoch: int | None = None
    tiles: int = 1
    eightfold: bool = False

    def __post_init__(self) -> None:
        for name, (expected, is_allowed) in ALLOWED.items():
            if not is_allowed(getattr(self, name)):
                raise ParameterError(name, expected, getattr(self, name))

    @property
    def crop(self) -> tuple[int, int] | None:
        """Rows and columns of a crop."""
        return (self.crop_size, self.crop_size) if isinstance(self.crop_size, int) else self.crop_size

    def check_size(self, height: int, width: int) -> None:
        """Raise if images of a size cannot be turned, cut and cropped as they should.

        Raises:
            ParameterError: It says at which size they could.
        """
        size = f"images of {height} x {width} pixels"
        if self.eightfold and height != width:
            raise ParameterError(
                name="eightfold", expected=f"false, or a square image_size, for {size}", got=self.eightfold
            )
        if height % self.tiles or width % self.tiles:
            raise ParameterError(name="tiles", expected=f"a divisor of height and width of {size}", got=self.tiles)
        if self.crop is not None and (self.crop[0] * self.tiles > height or self.crop[1] * self.tiles > width):
            of_tiles = f" cut into {self.tiles} x {self.tiles}" if self.tiles > 1 else ""
            raise ParameterError(name="crop_size", expected=f"at most the size of {size}{of_tiles}", got=self.crop_size)


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
    training = {name: _as_tuple(value) for name, value in params.items() if name in TRAINING_PARAMS}
    coefficients = {name: params.get(name, default) for name, default in loss.defaults.items()}
    for name, value in coefficients.items():
        if not loss.coefficients[name].allows(value):
            raise ParameterError(name, loss.coefficients[name].expected, value)
    network = {name: value for name, value in params.items() if name in known}
    for name in params:
        if name not in (*TRAINING_PARAMS, *known, *loss.coefficients):
            names = ", ".join(sorted((*TRAINING_PARAMS, *known, *loss.coefficients)))
            raise ParameterError(
                name, f"one of the parameters of {study_file.network}, its loss and training: {names}", name
            )
    return SplitParams(TrainingParams(**training), network, coefficients)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list) else value


def first_image_size(study_file: StudyFile) -> int | tuple[int, int] | None:
    """Return the size at which a study's images are read first."""
    return split_params(study_file, next(corners(study_file.space))).training.image_size


def load_images(study_file: StudyFile) -> Dataset:
    """Return a study's images at the size of its first trials, its folds checked.

    Raises:
        DatasetError: They cannot be read, or there is no such fold.
    """
    dataset = load_dataset(study_file.dataset, image_size=first_image_size(study_file), n_folds=study_file.n_folds)
    for fold in study_file.folds:
        dataset.indices("train", fold=fold)
    return dataset


def check(study_file: StudyFile) -> None:
    """Check a study's names and widths by building the network, without memory, at the corners of the space.

    Raises:
        StudyFileError: The message names file, key, what was expected and what was got.
    """
    named: list[tuple[str, str, Collection[str]]] = [
        ("loss", study_file.loss, LOSSES),
        ("score", study_file.score, METRICS),
    ]
    named += [("extra_scores", name, METRICS) for name in study_file.extra_scores]
    for key, name, known in named:
        if name not in known:
            message = f"{study_file.path}: {key}: expected one of {', '.join(known)}, but got {name!r}."
            raise StudyFileError(message)
    try:
        for of_network in _networks(study_file):
            _build(study_file, of_network)
        _check_coefficients(study_file)
    except StudyFileError:
        raise
    except ParameterError as error:
        message = f"{study_file.path}: params.{error}"
        raise StudyFileError(message) from None
    except UsageError as error:
        message = f"{study_file.path}: network: {error}"
        raise StudyFileError(message) from None


def _networks(study_file: StudyFile) -> Iterator[dict[str, Any]]:
    """Yield the parameters of the network at the corners of the space, each combination once."""
    known = set()
    for params in corners(study_file.space):
        of_network = split_params(study_file, params).network
        spelled = json.dumps(of_network, sort_keys=True, default=str)
        if spelled not in known:  # most corners differ in what concerns training and loss
            known.add(spelled)
            yield of_network


def _build(study_file: StudyFile, of_network: Mapping[str, Any]) -> None:
    try:
        build_network(study_file.network, in_channels=1, n_classes=2, seed=0, params=of_network, device="meta")
    except (RuntimeError, OverflowError) as error:
        message = f"{study_file.path}: params: expected sizes that a tensor can have, but got {of_network}: {error}."
        raise StudyFileError(message) from None


def _check_coefficients(study_file: StudyFile) -> None:
    """A weight of an auxiliary loss needs a network that has an auxiliary output."""
    loss = LOSSES[study_file.loss]
    given = sorted(set(study_file.space) & set(loss.coefficients))
    if not loss.auxiliary or not (given or loss.needs_auxiliary):
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
            name = (given or list(loss.coefficients))[0]
            raise ParameterError(name, f"a network with an auxiliary output ({loss.auxiliary})", kind)


def check_dataset(study_file: StudyFile, dataset: Dataset) -> None:
    """Check that a study's loss and score take the classes of a dataset, and that its images can be cut as it says.

    Args:
        study_file: The study, checked by itself.
        dataset: At the size of `first_image_size`.

    Raises:
        UsageError: Loss or score take another number of classes.
        StudyFileError: Images cannot be cut or turned so.
    """
    n_classes, wanted = len(dataset.class_names), LOSSES[study_file.loss].n_classes
    if wanted not in (None, n_classes):
        message = (
            f"{study_file.name}: expected images of {wanted} classes, as {study_file.loss} needs them, but "
            f"{dataset.name} has {n_classes} ({', '.join(dataset.class_names)}). Choose another loss or dataset."
        )
        raise UsageError(message)
    for score in (study_file.score, *study_file.extra_scores):
        check_score(score, n_classes=n_classes)
    for params in corners(study_file.space):
        training = split_params(study_file, params).training
        size = training.image_size or dataset.labels.shape[1:]
        try:
            training.check_size(*((size, size) if isinstance(size, int) else size))
        except ParameterError as error:
            message = f"{study_file.path}: params.{error}"
            raise StudyFileError(message) from None


def searches_shapes(study_file: StudyFile) -> bool:
    """Whether trials of a study differ in the shape of a tensor, so that one may need more memory than another."""
    of_training = {
        (training.image_size, training.crop_size, training.tiles, training.batch_size)
        for training in (split_params(study_file, params).training for params in corners(study_file.space))
    }
    networks = (
        build_network(study_file.network, in_channels=1, n_classes=2, seed=0, params=of_network, device="meta")
        for of_network in _networks(study_file)
    )
    of_weights = {tuple(tuple(value.shape) for value in network.state_dict().values()) for network in networks}
    return len(of_training) > 1 or len(of_weights) > 1
