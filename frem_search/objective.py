"""Parameters of a trial become network, loss and data, then epoch reports, then a score."""

import hashlib
import io
import json
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
from frem_search.errors import DeviceMemoryError
from frem_search.metrics import METRICS
from frem_search.networks import build_network
from frem_search.parameters import first_image_size, searches_shapes, split_params
from frem_search.study_file import StudyFile
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.device import describe_device, make_repeatable
from frem_search.training.evaluate import predict
from frem_search.training.fit import fit
from frem_search.training.member import EpochReport, Member
from frem_search.training.resident import ResidentData, load_resident
from frem_search.training.weights import Weights, dump_weights

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
PREDICTIONS = "predictions.npz"


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
        make_repeatable(device)

    @property
    def seed(self) -> int:
        """From which weights, batches, turns and enhanced maps follow."""
        return self._file.sampler.seed

    def admit(self, number: int, params: Mapping[str, Any]) -> Member:
        """Build a trial's network and bring it to its last checkpoint, if there is one that can be used."""
        split = split_params(self._file, params)
        stored = self._artifacts.read(f"{number}/{CHECKPOINT}")
        if self._device.type == "cuda":
            # Else the peak of one trial would be that of the largest before it.
            torch.cuda.reset_peak_memory_stats(self._device)
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
            identity = self._identity(number, params)
            is_usable = stored is None or load_checkpoint(member, stored, identity=identity)
        self._params[number] = dict(params)
        if not is_usable:
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
        content = dump_checkpoint(self.member(number), identity=self._identity(number, self._params[number]))
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
            "seed": self.seed,
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
        self._artifacts.remove(f"{number}/{CHECKPOINT}")
        if weights:
            self._artifacts.remove(f"{number}/{WEIGHTS}")

    @property
    def searches_shapes(self) -> bool:
        """Whether one trial of this study may need more memory than another."""
        return searches_shapes(self._file)

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
            # Before the next images are loaded: the device may not have room for two sizes.
            self._cohorts = {size: cohort for size, cohort in self._cohorts.items() if cohort.members}
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

    def _identity(self, number: int, params: Mapping[str, Any]) -> dict[str, Any]:
        spelled = json.dumps(dict(params), sort_keys=True, default=list)
        return {
            "study": self._study_uid,
            "number": number,
            "params": hashlib.sha256(spelled.encode()).hexdigest(),
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
                dataset_fingerprint=self._dataset.fingerprint,
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
