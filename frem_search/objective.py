"""Parameters of a trial become network, loss and data, then epoch reports, then a score."""

import hashlib
import io
import json
import platform
import resource
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from frem_search.preview import MOST_IMAGES, curve_csv, predictions_png
from frem_search.study_file import StudyFile
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.device import describe_device, is_out_of_memory, make_repeatable
from frem_search.training.evaluate import predict
from frem_search.training.layouts import ALONE, LAYOUTS, use_cores
from frem_search.training.member import EpochReport, Member
from frem_search.training.resident import ResidentData, load_resident
from frem_search.training.weights import Weights, dump_weights
from frem_search.trial_page import CURVE, PICTURE, artifact_attrs

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
PREDICTIONS = "predictions.npz"


@dataclass(frozen=True)
class Outcome:
    """What a finished trial came to.

    Args:
        score: The best on the validation images.
        result: The scores in full, for the trial's attribute `result`.
        shown: Attributes that announce its files to Optuna's dashboard.
    """

    score: float
    result: dict[str, Any]
    shown: dict[str, str] = field(default_factory=dict, compare=False)


class Objective:
    """Trains trials of one study on one device.

    Args:
        study_file: Which network, loss and score.
        dataset: Its images, at the size of the first trials; other sizes are loaded when a trial asks for them.
        device: Where to train.
        precision: `fp32` or `bf16`.
        artifacts: Where checkpoints, weights and predictions go.
        study_uid: Which stored study the checkpoints belong to.
        cohort: How many trials train side by side.
        layout: How they share the device, a name of `LAYOUTS`.
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
        cohort: int = 1,
        layout: str = ALONE,
    ) -> None:
        self._file, self._dataset, self._device, self._precision = study_file, dataset, device, precision
        self._artifacts, self._study_uid = artifacts, study_uid
        self._datasets = {first_image_size(study_file): dataset}
        self._data: dict[Any, ResidentData] = {}
        self._cohort = Cohort(
            loss=study_file.loss, metric=study_file.score, precision=precision, seed=self.seed, fold=study_file.fold
        )
        self._n_members, self._layout = cohort, layout
        self._params: dict[int, dict[str, Any]] = {}
        make_repeatable(device)
        use_cores(layout)

    @property
    def seed(self) -> int:
        """From which weights, batches, turns and enhanced maps follow."""
        return self._file.sampler.seed

    def admit(self, number: int, params: Mapping[str, Any]) -> Member:
        """Build a trial's network and bring it to its last checkpoint, if there is one that can be used."""
        stored = self._artifacts.read(f"{number}/{CHECKPOINT}")
        if self._device.type == "cuda" and not self._cohort.members:
            # Else the peak of one trial would be that of the largest before it.
            torch.cuda.reset_peak_memory_stats(self._device)
        with self._memory_errors():
            member = self.build_member(number, params)
            identity = self._identity(number, params)
            is_usable = stored is None or load_checkpoint(member, stored, identity=identity)
        self._params[number] = dict(params)
        if not is_usable:
            self._artifacts.set_aside(f"{number}/{CHECKPOINT}")
        self._cohort.admit(member)
        return member

    def build_member(self, number: int, params: Mapping[str, Any]) -> Member:
        """Return a trial as it begins: images on the device, untrained network, optimizer."""
        split = split_params(self._file, params)
        data = self._load(split.training.image_size)
        network = build_network(
            self._file.network,
            in_channels=data.in_channels,
            n_classes=data.n_classes,
            seed=self.seed,
            params=split.network,
        ).to(self._device)
        return Member(
            key=number,
            network=network,
            data=data,
            coefficients=split.coefficients,
            learning_rate=split.training.learning_rate,
            batch_size=split.training.batch_size,
            n_epochs=self._file.n_epochs,
            has_augmentation=split.training.augmentation,
        )

    def epochs(self) -> Generator[EpochReport, None, None]:
        """Train what was admitted; the caller may admit and release between two reports, and close it to end.

        Raises:
            DeviceMemoryError: The device has no memory left.
        """
        with self._memory_errors():
            yield from LAYOUTS[self._layout].function(self._cohort)

    def member(self, number: int) -> Member:
        """Return a trial in training."""
        return self._cohort.members[number]

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is."""
        content = dump_checkpoint(self.member(number), identity=self._identity(number, self._params[number]))
        self._artifacts.write(f"{number}/{CHECKPOINT}", content)

    def finish(self, number: int) -> Outcome:
        """Score the test images once, with the weights of the best epoch, and store what the trial leaves behind."""
        member = self.member(number)
        member.network.load_state_dict(member.best_weights)
        result: dict[str, Any] = {
            "best_epoch": member.best_epoch,
            "val": self._named(member.best_score, member.best_per_class),
        }
        data, pred = member.data, None
        if len(data.test):
            metric = METRICS[self._file.score]
            with self._memory_errors():
                pred = predict(member.network, data.test.images, precision=self._precision, takes=metric.takes)
                score = metric.function(pred, data.test.labels, n_classes=data.n_classes)
            result["test"] = self._named(score.value.item(), score.per_class.tolist())
            self._artifacts.write(f"{number}/{PREDICTIONS}", _pack_predictions(data.test.cases, pred))
        self._artifacts.write(f"{number}/{WEIGHTS}", self._pack_weights(number, member, data))
        return Outcome(member.best_score, result, self._write_shown(number, member, pred))

    def release(self, number: int) -> None:
        """Let a trial go, finished or not, if it was admitted."""
        if self._params.pop(number, None) is not None:
            self._cohort.release(number)

    def provenance(self, number: int) -> dict[str, Any]:
        """Return under what conditions a trial was trained."""
        member = self.member(number)
        peak_mb = round(self._peak_memory() / 2**20)
        return {
            "frem_search": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": describe_device(self._device),
            "threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "host": platform.node(),
            "precision": self._precision,
            "seed": self.seed,
            "cohort": self._n_members,
            "layout": self._layout,
            "seconds": round(sum(member.curve["seconds"]), 3),
            "images": member.epoch * len(member.data.train),
            "peak_memory_mb": peak_mb,
            "peak_memory_mb_per_member": round(peak_mb / self._n_members),
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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            message = (
                f"{self._device}: out of memory: {reason} Free the device, or set a smaller "
                "batch_size, image_size or base_channels in a fork of the study; the trial waits and loses nothing."
            )
            raise DeviceMemoryError(message) from None

    def _write_shown(self, number: int, member: Member, pred: torch.Tensor | None) -> dict[str, str]:
        """Store curve and pictures: of test images, or without any of validation images; return how to find them."""
        part = member.data.val if pred is None else member.data.test
        images, labels = part.images[:MOST_IMAGES], part.labels[:MOST_IMAGES]
        if pred is None:
            with self._memory_errors():
                pred = predict(member.network, images, precision=self._precision)
        classes = pred[:MOST_IMAGES].argmax(dim=1) if pred.ndim > labels.ndim else pred[:MOST_IMAGES]
        picture = predictions_png(*(each.cpu().numpy() for each in (images, labels, classes)))
        self._artifacts.write(f"{number}/{CURVE}", curve_csv(member.curve, self._dataset.class_names))
        self._artifacts.write(f"{number}/{PICTURE}", picture)
        return artifact_attrs(self._study_uid, number)

    def _load(self, image_size: Any) -> ResidentData:
        """Return the images of a size on the device, where all members of that size share them."""
        if image_size not in self._data:
            # Before the next images are loaded: the device may not have room for two sizes.
            used = [member.data for member in self._cohort.members.values()]
            self._data = {size: data for size, data in self._data.items() if any(data is each for each in used)}
            if image_size not in self._datasets:
                self._datasets[image_size] = load_dataset(self._file.dataset, image_size=image_size)
            self._data[image_size] = load_resident(
                self._datasets[image_size], fold=self._file.fold, device=self._device
            )
        return self._data[image_size]

    def _peak_memory(self) -> int:
        """Return the most bytes that this process has used: of the device, or on the CPU of all."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10

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
