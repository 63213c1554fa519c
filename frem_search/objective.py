"""Parameters of a trial become network, loss and data, then epoch reports, then a score."""

import hashlib
import inspect
import io
import json
import math
import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frem_search import __version__
from frem_search.artifacts import Artifacts
from frem_search.data.dataset import Dataset, load_dataset
from frem_search.errors import DeviceMemoryError, ParameterError, StudyFileError, UsageError
from frem_search.losses import LOSSES
from frem_search.metrics import METRICS
from frem_search.networks import build_network, network_params
from frem_search.space import corners
from frem_search.study_file import StudyFile
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.device import describe_device
from frem_search.training.evaluate import predict
from frem_search.training.fit import fit
from frem_search.training.member import EpochReport, Member
from frem_search.training.resident import ResidentData, load_resident
from frem_search.training.weights import Weights, dump_weights

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
PREDICTIONS = "predictions.npz"


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
    params = next(corners(study_file.space))
    split = split_params(study_file, params)
    network = build_network(study_file.network, in_channels=1, n_classes=2, seed=0, params=split.network)
    if network(torch.zeros(2, 1, 32, 32)).auxiliary is None:
        raise ParameterError(given[0], "a network with an auxiliary output (supervision = true)", params[given[0]])


@dataclass(frozen=True)
class Outcome:
    """What a finished trial came to.

    Args:
        score: The best on the validation images.
        result: The scores in full, for the trial's attribute `result`.
    """

    score: float
    result: dict[str, Any]


class Objective:
    """Trains trials of one study on one device.

    Args:
        study_file: Which network, loss and score.
        dataset: Its images, at the size of the first trials; other sizes are loaded when a trial asks for them.
        device: Where to train.
        precision: `fp32` or `bf16`.
        artifacts: Where checkpoints, weights and predictions go.
        study_uid: Which stored study the checkpoints belong to.
    """

    def __init__(
        self,
        study_file: StudyFile,
        dataset: Dataset,
        *,
        device: torch.device,
        precision: str,
        artifacts: Artifacts,
        study_uid: str,
    ) -> None:
        self._file, self._dataset, self._device, self._precision = study_file, dataset, device, precision
        self._artifacts, self._study_uid = artifacts, study_uid
        self._datasets = {first_image_size(study_file): dataset}
        self._cohorts: dict[Any, Cohort] = {}
        self._params: dict[int, dict[str, Any]] = {}

    @property
    def seed(self) -> int:
        """From which weights, batches, turns and enhanced maps follow."""
        return self._file.sampler.seed

    def admit(self, number: int, params: Mapping[str, Any]) -> Member:
        """Build a trial's network and bring it to its last checkpoint, if there is one that can be used."""
        split = split_params(self._file, params)
        with self._memory_errors():
            cohort = self._cohort(split.training.image_size)
            network = build_network(
                self._file.network,
                in_channels=cohort.data.in_channels,
                n_classes=cohort.data.n_classes,
                seed=self.seed,
                params=split.network,
            ).to(self._device)
            member = Member(
                key=number,
                network=network,
                coefficients=split.coefficients,
                learning_rate=split.training.learning_rate,
                batch_size=split.training.batch_size,
                n_epochs=self._file.n_epochs,
                has_augmentation=split.training.augmentation,
            )
        self._params[number] = dict(params)
        stored = self._artifacts.read(f"{number}/{CHECKPOINT}")
        if stored is not None and not load_checkpoint(member, stored, identity=self._identity(number)):
            self._artifacts.set_aside(f"{number}/{CHECKPOINT}")
        cohort.admit(member)
        return member

    def epochs(self) -> Iterator[EpochReport]:
        """Train what was admitted; the caller may admit and release between two reports.

        Raises:
            DeviceMemoryError: The device has no memory left.
        """
        with self._memory_errors():
            for cohort in list(self._cohorts.values()):
                yield from fit(cohort)

    def member(self, number: int) -> Member:
        """Return a trial in training."""
        return next(c.members[number] for c in self._cohorts.values() if number in c.members)

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is."""
        content = dump_checkpoint(self.member(number), identity=self._identity(number))
        self._artifacts.write(f"{number}/{CHECKPOINT}", content)

    def finish(self, number: int) -> Outcome:
        """Score the test images once, with the weights of the best epoch, and store weights and predictions."""
        member, cohort = self.member(number), self._cohort_of(number)
        member.network.load_state_dict(member.best_weights)
        result: dict[str, Any] = {
            "best_epoch": member.best_epoch,
            "val": self._named(member.best_score, member.best_per_class),
        }
        data = cohort.data
        if len(data.test):
            metric = METRICS[self._file.score]
            with self._memory_errors():
                pred = predict(member.network, data.test.images, precision=self._precision, takes=metric.takes)
                score = metric.function(pred, data.test.labels, n_classes=data.n_classes)
            result["test"] = self._named(score.value.item(), score.per_class.tolist())
            self._artifacts.write(f"{number}/{PREDICTIONS}", _pack_predictions(data.test.cases, pred))
        self._artifacts.write(f"{number}/{WEIGHTS}", self._pack_weights(number, member, data))
        return Outcome(member.best_score, result)

    def release(self, number: int) -> None:
        """Let a trial go, finished or not."""
        self._cohort_of(number).release(number)
        self._params.pop(number)

    def provenance(self, number: int) -> dict[str, Any]:
        """Return under what conditions a trial was trained."""
        member = self.member(number)
        n_images = len(self._cohort_of(number).data.train)
        is_cuda = self._device.type == "cuda"
        return {
            "frem_search": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": describe_device(self._device),
            "host": platform.node(),
            "precision": self._precision,
            "cohort": 1,
            "seconds": round(sum(member.curve["seconds"]), 3),
            "images": member.epoch * n_images,
            "peak_memory_mb": round(
                torch.cuda.max_memory_allocated(self._device) / 2**20
                if is_cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            ),
        }

    def discard(self, number: int, *, weights: bool) -> None:
        """Remove a finished trial's checkpoint, and its weights too if they are not wanted."""
        for name in (CHECKPOINT, WEIGHTS)[: 1 + weights]:
            self._artifacts.remove(f"{number}/{name}")

    @property
    def searches_shapes(self) -> bool:
        """Whether trials of this study differ in the shape of a tensor, so that one may need more memory."""
        shapes = set()
        for params in corners(self._file.space):
            split = split_params(self._file, params)
            network = build_network(
                self._file.network, in_channels=1, n_classes=2, seed=0, params=split.network, device="meta"
            )
            weights = tuple(tuple(value.shape) for value in network.state_dict().values())
            shapes.add((split.training.image_size, split.training.batch_size, weights))
        return len(shapes) > 1

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            message = (
                f"{self._device}: out of memory: {str(error).splitlines()[0]} Free the device, or set a smaller "
                "batch_size, image_size or base_channels in a fork of the study; the trial waits and loses nothing."
            )
            raise DeviceMemoryError(message) from None

    def _cohort(self, image_size: Any) -> Cohort:
        if image_size not in self._cohorts:
            self._cohorts[image_size] = Cohort(
                self._load(image_size),
                loss=self._file.loss,
                metric=self._file.score,
                precision=self._precision,
                seed=self.seed,
                fold=self._file.fold,
            )
        return self._cohorts[image_size]

    def _load(self, image_size: Any) -> ResidentData:
        if image_size not in self._datasets:
            self._datasets[image_size] = load_dataset(self._file.dataset, image_size=image_size)
        return load_resident(self._datasets[image_size], fold=self._file.fold, device=self._device)

    def _cohort_of(self, number: int) -> Cohort:
        return next(cohort for cohort in self._cohorts.values() if number in cohort.members)

    def _identity(self, number: int) -> dict[str, Any]:
        params = json.dumps(self._params[number], sort_keys=True, default=list)
        return {
            "study": self._study_uid,
            "number": number,
            "params": hashlib.sha256(params.encode()).hexdigest(),
            "precision": self._precision,
            "n_epochs": self._file.n_epochs,
        }

    def _named(self, value: float, per_class: list[float]) -> dict[str, Any]:
        names = self._dataset.class_names
        classes = {n: None if v != v else v for n, v in zip(names, per_class, strict=True)}
        return {self._file.score: value, "per_class": classes}

    def _pack_weights(self, number: int, member: Member, data: ResidentData) -> bytes:
        split = split_params(self._file, self._params[number])
        return dump_weights(
            Weights(
                network=self._file.network,
                network_params=split.network,
                in_channels=data.in_channels,
                class_names=self._dataset.class_names,
                image_size=split.training.image_size,
                dataset=self._dataset.name,
                fold=self._file.fold,
                score=self._file.score,
                precision=self._precision,
                study=self._file.name,
                trial=number,
                params=self._params[number],
                state=member.best_weights,
            )
        )


def _pack_predictions(cases: tuple[str, ...], pred: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, cases=np.array(cases), pred=pred.cpu().numpy())
    return buffer.getvalue()
