"""Parameters of a trial become network, loss and data, then epoch reports, then a score."""

import hashlib
import io
import json
import platform
import resource
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from frem_search import __version__
from frem_search.artifacts import Artifacts
from frem_search.data.augment import Augmentation
from frem_search.data.dataset import Dataset, load_dataset
from frem_search.data.orientations import N_ORIENTATIONS
from frem_search.errors import DeviceMemoryError
from frem_search.losses import LOSSES
from frem_search.metrics import METRICS, Score
from frem_search.networks import build_network
from frem_search.parameters import TrainingParams, check_dataset, first_image_size, searches_shapes, split_params
from frem_search.preview import MOST_IMAGES, curve_csv, predictions_png
from frem_search.study_file import StudyFile
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.device import describe_device, is_out_of_memory, make_repeatable
from frem_search.training.evaluate import predict
from frem_search.training.folds import MOST_IMAGE_SCORES, Folds, grouped, mean
from frem_search.training.layouts import ALONE, LAYOUTS, use_cores
from frem_search.training.member import EpochReport, Member
from frem_search.training.resident import Part, ResidentData, load_resident
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
        layout: How trials, and folds of a trial, share the device, a name of `LAYOUTS`.
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
        layout: str = ALONE,
    ) -> None:
        self._file, self._dataset, self._device, self._precision = study_file, dataset, device, precision
        self._artifacts, self._study_uid = artifacts, study_uid
        self._datasets = {first_image_size(study_file): dataset}
        self._data: dict[Any, Mapping[int, ResidentData]] = {}
        self._cohort = Cohort(loss=study_file.loss, metric=study_file.score, precision=precision, seed=self.seed)
        self._trials: dict[int, Folds] = {}
        self._layout = layout
        self._params: dict[int, dict[str, Any]] = {}
        self._beside: dict[int, int] = {}  # how many trials at most, a trial itself counted, trained with it
        check_dataset(study_file, dataset)
        make_repeatable(device)
        use_cores(layout)

    @property
    def seed(self) -> int:
        """From which weights, batches, turns and enhanced maps follow."""
        return self._file.sampler.seed

    def admit(self, number: int, params: Mapping[str, Any]) -> Folds:
        """Build a trial's networks and bring them to its last checkpoint, if there is one that can be used."""
        stored = self._artifacts.read(f"{number}/{CHECKPOINT}")
        if self._device.type == "cuda" and not self._trials:
            # Else the peak of one trial would be that of the largest before it.
            torch.cuda.reset_peak_memory_stats(self._device)
        with self._memory_errors():
            members = [self.build_member(number, params, fold=fold) for fold in self._file.folds]
            trial = Folds(number, members, in_sequence=self._file.is_pruned_by_fold)
            is_usable = stored is None or load_checkpoint(trial, stored, identity=self._identity(number, params))
        self._params[number] = dict(params)
        if not is_usable:
            self._artifacts.set_aside(f"{number}/{CHECKPOINT}")
        self._trials[number] = trial
        self._beside |= {each: max(self._beside.get(each, 0), len(self._trials)) for each in self._trials}
        for member in trial.training():
            self._cohort.admit(member)
        return trial

    def build_member(self, number: int, params: Mapping[str, Any], *, fold: int) -> Member:
        """Return a fold of a trial as it begins: images on the device, untrained network, optimizer."""
        split = split_params(self._file, params)
        training = split.training
        data = self._load(training)[fold]
        network = build_network(
            self._file.network,
            in_channels=data.in_channels,
            n_classes=data.n_classes,
            seed=self.seed,
            params=split.network,
        ).to(self._device)
        return Member(
            key=(number, fold),
            network=network,
            data=data,
            coefficients=split.coefficients,
            learning_rate=training.learning_rate,
            batch_size=training.batch_size,
            n_epochs=self._file.n_epochs,
            fold=fold,
            augmentation=_augmentation(training),
            weight_decay=training.weight_decay,
            schedule=training.schedule,
            patience=training.patience,
            steps_per_epoch=training.steps_per_epoch,
            tiles=training.tiles,
        )

    def epochs(self) -> Generator[EpochReport, None, None]:
        """Train what was admitted; the caller may admit and release between two reports, and close it to end.

        Raises:
            DeviceMemoryError: The device has no memory left.
        """
        with self._memory_errors():
            for report in LAYOUTS[self._layout].function(self._cohort):
                number, fold = report.key
                trial = self._trials[number]
                member = trial.members[self._file.folds.index(fold)]
                if trial.in_sequence and report.is_done and report.is_finite:
                    report = self._end_fold(trial, member) or report
                told = trial.report(report, member)
                if told is not None:
                    yield told

    def _end_fold(self, trial: Folds, member: Member) -> EpochReport | None:
        """Score a fold's validation images one by one and let the next fold begin; return the report of an error."""
        try:
            scores = self._image_scores(trial, member)
        except Exception as error:  # noqa: BLE001 whatever the code of a metric raises
            return self._cohort.ended(member, error)
        trial.image_scores += grouped(scores, most=max(1, MOST_IMAGE_SCORES // len(trial.members)))
        self._cohort.release(member.key)
        for following in trial.training():
            self._cohort.admit(following)
        return None

    def _image_scores(self, trial: Folds, member: Member) -> list[float]:
        """Return the score of each validation image, with the weights of the best epoch; of none as worst as can be.

        The orientations of an image are one image: they are no evidence of their own.
        """
        member.network.load_state_dict(member.best_weights)
        part, metric = member.data.val, METRICS[self._file.score]
        pred, labels = self._predict(member, part, metric.takes), part.labels
        n_classes = member.data.n_classes
        scores = [
            metric.function(pred[i : i + 1], labels[i : i + 1], n_classes=n_classes).value.item()
            for i in range(len(part))
        ]
        n_orientations = N_ORIENTATIONS if self._is_eightfold(trial.number) else 1
        n_images = len(scores) // n_orientations
        worst_for_nan = [0.0 if score != score else score for score in scores]
        return [sum(worst_for_nan[i::n_images]) / n_orientations for i in range(n_images)]

    def trial(self, number: int) -> Folds:
        """Return a trial in training."""
        return self._trials[number]

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is."""
        content = dump_checkpoint(self.trial(number), identity=self._identity(number, self._params[number]))
        self._artifacts.write(f"{number}/{CHECKPOINT}", content)

    def finish(self, number: int) -> Outcome:
        """Score the test images once, with the weights of the best epoch, and store what the trial leaves behind.

        With several folds the scores are means over them, and the result has each fold's own as well.
        """
        trial = self.trial(number)
        results: list[dict[str, Any]] = []
        shown: dict[str, str] = {}
        for member in trial.members:
            result, pred = self._finish_fold(number, member)
            results.append(result)
            shown = shown or self._write_shown(number, trial.curve, member, pred)
        return Outcome(trial.best_score, results[0] if self._file.n_folds is None else _mean_result(results), shown)

    def _finish_fold(self, number: int, member: Member) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Score a fold's test images and store predictions and weights; return the scores and the prediction."""
        member.network.load_state_dict(member.best_weights)
        result: dict[str, Any] = {
            "best_epoch": member.best_epoch,
            "val": self._named(member.best_score, member.best_per_class),
        }
        data, pred, place = member.data, None, self._place(number, member.fold)
        if len(data.test):
            pred, score = self._score(member, data.test, self._file.score)
            result["test"] = self._named(score.value.item(), score.per_class.tolist())
            self._artifacts.write(f"{place}/{PREDICTIONS}", _pack_predictions(data.test.cases, pred))
        parts = {"val": data.val} | ({"test": data.test} if len(data.test) else {})
        if self._file.extra_scores:
            result["extra"] = {
                name: {part: self._score(member, images, name)[1].value.item() for part, images in parts.items()}
                for name in self._file.extra_scores
            }
        self._artifacts.write(f"{place}/{WEIGHTS}", self._pack_weights(number, member, data))
        return result, pred

    def _score(self, member: Member, part: Part, name: str) -> tuple[torch.Tensor, Score]:
        """Return the prediction of some images, and a score of it."""
        metric = METRICS[name]
        with self._memory_errors():
            pred = self._predict(member, part, metric.takes)
            return pred, metric.function(pred, part.labels, n_classes=member.data.n_classes)

    def _predict(self, member: Member, part: Part, takes: str) -> torch.Tensor:
        return predict(member.network, part.images, precision=self._precision, takes=takes, tiles=member.tiles)

    def _is_eightfold(self, number: int) -> bool:
        return split_params(self._file, self._params[number]).training.eightfold

    def _place(self, number: int, fold: int) -> str:
        return place(number, None if self._file.n_folds is None else fold)

    def release(self, number: int) -> None:
        """Let a trial go, finished or not, if it was admitted."""
        if self._params.pop(number, None) is not None:
            del self._beside[number]
            for member in self._trials.pop(number).members:
                if self._cohort.holds(member):
                    self._cohort.release(member.key)

    def provenance(self, number: int) -> dict[str, Any]:
        """Return under what conditions a trial was trained."""
        trial = self.trial(number)
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
            "cohort": self._beside[number],
            "layout": self._layout,
            "seconds": round(sum(trial.curve["seconds"]), 3),
            "images": sum(member.epoch * member.images_per_epoch for member in trial.members),
            "peak_memory_mb": peak_mb,
            "peak_memory_mb_per_member": round(peak_mb / (self._beside[number] * trial.n_beside)),
        }

    def discard(self, number: int, *, weights: bool) -> None:
        """Remove a finished trial's checkpoint, and its weights too if they are not wanted."""
        self._artifacts.remove(f"{number}/{CHECKPOINT}")
        if weights:
            for fold in self._file.folds:
                self._artifacts.remove(f"{self._place(number, fold)}/{WEIGHTS}")

    def train_in_turn(self) -> bool:
        """Let the folds of a trial train one after another from now on, for want of memory; tell if that changes it."""
        is_other = self._layout != ALONE and len(self._file.folds) > 1
        self._layout = ALONE
        return is_other

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

    def _write_shown(
        self, number: int, curve: Mapping[str, Sequence[Any]], member: Member, pred: torch.Tensor | None
    ) -> dict[str, str]:
        """Store curve and pictures: of test images, or without any of validation images; return how to find them."""
        part = member.data.val if pred is None else member.data.test
        images, labels = part.images[:MOST_IMAGES], part.labels[:MOST_IMAGES]
        if pred is None:
            with self._memory_errors():
                pred = predict(member.network, images, precision=self._precision, tiles=member.tiles)
        classes = pred[:MOST_IMAGES].argmax(dim=1) if pred.ndim > labels.ndim else pred[:MOST_IMAGES]
        picture = predictions_png(*(each.cpu().numpy() for each in (images, labels, classes)))
        self._artifacts.write(f"{number}/{CURVE}", curve_csv(curve, self._dataset.class_names))
        self._artifacts.write(f"{number}/{PICTURE}", picture)
        return artifact_attrs(self._study_uid, number)

    def _load(self, training: TrainingParams) -> Mapping[int, ResidentData]:
        """Return the images as a trial wants them on the device, by fold; all that want them so share them."""
        size = training.image_size
        key = size, training.tiles, training.eightfold
        if key not in self._data:
            # Before the next images are loaded: the device may not have room for two sizes.
            used = [trial.members[0].data for trial in self._trials.values()]
            self._data = {
                each: folds for each, folds in self._data.items() if any(folds[self._file.folds[0]] is u for u in used)
            }
            if size not in self._datasets:
                self._datasets[size] = load_dataset(self._file.dataset, image_size=size, n_folds=self._file.n_folds)
            training.check_size(*self._datasets[size].labels.shape[1:])
            self._data[key] = load_resident(
                self._datasets[size],
                folds=self._file.folds,
                device=self._device,
                tiles=training.tiles,
                is_eightfold=training.eightfold,
                needs_border=LOSSES[self._file.loss].needs_border,
            )
        return self._data[key]

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
                fold=member.fold,
                n_folds=self._file.n_folds,
                score=self._file.score,
                precision=self._precision,
                study=self._file.name,
                trial=number,
                params=self._params[number],
                state=member.best_weights,
            )
        )


def place(number: int, fold: int | None) -> str:
    """Return the folder of a trial's artifacts, or of one of its folds.

    >>> place(3, None), place(3, 1)
    ('3', '3/fold1')
    """
    return str(number) if fold is None else f"{number}/fold{fold}"


def _mean_result(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over folds of their scores, and each fold's own."""
    whole: dict[str, Any] = {}
    for part in (part for part in ("val", "test") if all(part in result for result in results)):
        scores = [result[part] for result in results]
        classes = {name: mean([each["per_class"][name] for each in scores]) for name in scores[0]["per_class"]}
        values = {name: mean([each[name] for each in scores]) for name in scores[0] if name != "per_class"}
        whole[part] = values | {"per_class": classes}
    if "extra" in results[0]:
        whole["extra"] = {
            name: {part: mean([result["extra"][name][part] for result in results]) for part in parts if part in whole}
            for name, parts in results[0]["extra"].items()
        }
    return whole | {"folds": [dict(result) for result in results]}


def _augmentation(training: TrainingParams) -> Augmentation:
    return Augmentation(
        turns=training.augmentation,
        rotation=training.rotation,
        alpha=training.alpha,
        sigma_elastic=training.sigma_elastic,
        elastic_from=training.elastic_from,
        mirror_quarters=training.mirror_quarters,
        crop_size=training.crop,
    )


def _pack_predictions(cases: tuple[str, ...], pred: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, cases=np.array(cases), pred=pred.cpu().numpy())
    return buffer.getvalue()
