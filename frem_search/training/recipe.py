"""The parameters of a trial, given to those whom they concern; and a whole study checked for what they take."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from frem_search.data.dataset import Dataset, load_dataset
from frem_search.errors import ParameterError, StudyFileError, UsageError
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.metrics import METRICS, check_score, lacking
from frem_search.segmentation.networks import build_network, network_params
from frem_search.study.file import StudyFile
from frem_search.study.parameters import TRAINING_PARAMS, SplitParams, TrainingParams
from frem_search.study.space import corners

LARGEST_FACTOR = 1e6  # sums of squares have 7 digits in single precision, so that maps beside it would count as 0


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
            _check_factor(of_network)
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


def _check_factor(of_network: Mapping[str, Any]) -> None:
    """Refuse what no search can use; weights that were trained with it still load."""
    factor = of_network.get("X", 1.0)
    if factor > LARGEST_FACTOR:
        expected = "a finite factor above 0, at most 1e6, as sums of squares of larger features lose all precision"
        raise ParameterError(name="X", expected=expected, got=factor)


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
    check_score(study_file.score, n_classes=n_classes)
    for score in study_file.extra_scores:
        check_score(score, n_classes=n_classes, is_extra=True)
    for params in corners(study_file.space):
        training = split_params(study_file, params).training
        size = training.image_size or dataset.labels.shape[1:]
        try:
            training.check_size(*((size, size) if isinstance(size, int) else size))
        except ParameterError as error:
            message = f"{study_file.path}: params.{error}"
            raise StudyFileError(message) from None


def left_out(study_file: StudyFile) -> str | None:
    """Return a line on the extra scores that this machine has no package for; None if there are none.

    A study runs without them, and its trials have null in their place.
    """
    reasons = lacking(study_file.extra_scores)
    if not reasons:
        return None
    what_to_do = " ".join(dict.fromkeys(reasons.values()))
    return f"{study_file.name}: left out and stored as null: {', '.join(reasons)}. {what_to_do}"


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
