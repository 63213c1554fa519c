"""Parameters of a trial become network, loss and data, then epoch reports, then a score."""

import hashlib
import json
import platform
import resource
from collections.abc import Collection, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from frem_search import __version__, seeds
from frem_search.data.augmentation.turns import Augmentation
from frem_search.data.dataset import Dataset
from frem_search.errors import ArtifactError
from frem_search.segmentation.networks import build_network
from frem_search.storage.artifacts import SET_ASIDE, Artifacts
from frem_search.study.file import StudyFile
from frem_search.study.parameters import TrainingParams
from frem_search.system.device import describe_device, device_errors, make_repeatable
from frem_search.system.files import is_temporary
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.image_cache import ImageCache
from frem_search.training.member import EpochReport, Member
from frem_search.training.recipe import check_dataset, searches_shapes, split_params
from frem_search.training.results import Results
from frem_search.training.side_by_side.layouts import ALONE, LAYOUTS, use_cores
from frem_search.training.trial import MOST_IMAGE_SCORES, Folds, grouped

CHECKPOINT = "checkpoint.pt"
CHECKPOINTS = (CHECKPOINT, CHECKPOINT + SET_ASIDE)


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
        self._file, self._device, self._precision = study_file, device, precision
        self._artifacts, self._study_uid = artifacts, study_uid
        self._images = ImageCache(study_file, dataset, device)
        self._results = Results(study_file, dataset, precision, artifacts, study_uid)
        self._cohort = Cohort(loss=study_file.loss, metric=study_file.score, precision=precision)
        self._trials: dict[int, Folds] = {}
        self._layout = layout
        self._params: dict[int, dict[str, Any]] = {}
        self._beside: dict[int, int] = {}  # how many trials at most, a trial itself counted, trained with it
        check_dataset(study_file, dataset)
        make_repeatable(device)
        use_cores(layout)

    def seed(self, params: Mapping[str, Any]) -> int:
        """Return from what a trial's weights, batches, turns and enhanced maps follow: the study's seed and its own."""
        own, of_study = int(params.get("seed", 0)), self._file.sampler.seed
        return seeds.derive(of_study, "training", own) if own else of_study

    def admit(self, number: int, params: Mapping[str, Any]) -> Folds:
        """Build a trial's networks and bring them to its last checkpoint; one that cannot be used is set aside.

        Raises:
            DeviceError: The device failed, or has no memory left.
            ArtifactError: The checkpoint cannot be read.
        """
        stored = self._artifacts.read(f"{number}/{CHECKPOINT}")
        with device_errors(self._device):
            if self._device.type == "cuda" and not self._trials:
                # Else the peak of one trial would be that of the largest before it.
                torch.cuda.reset_peak_memory_stats(self._device)
            members = [self.build_member(number, params, fold=fold) for fold in self._file.folds]
            trial = Folds(number, members, in_sequence=self._file.is_pruned_by_fold)
            is_usable = stored is None or load_checkpoint(trial, stored, identity=self._identity(number, params))
        if not is_usable:
            trial.set_aside = self._artifacts.set_aside(f"{number}/{CHECKPOINT}")
        self._trials[number], self._params[number] = trial, dict(params)
        self._beside |= {each: max(self._beside.get(each, 0), len(self._trials)) for each in self._trials}
        for member in trial.training():
            self._cohort.admit(member)
        return trial

    def build_member(self, number: int, params: Mapping[str, Any], *, fold: int) -> Member:
        """Return a fold of a trial as it begins: images on the device, untrained network, optimizer."""
        split = split_params(self._file, params)
        training = split.training
        data = self._images.load(training, used=[trial.members[0].data for trial in self._trials.values()])[fold]
        network = build_network(
            self._file.network,
            in_channels=data.in_channels,
            n_classes=data.n_classes,
            seed=self.seed(params),
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
            seed=self.seed(params),
            augmentation=_augmentation(training),
            weight_decay=training.weight_decay,
            schedule=training.schedule,
            patience=training.patience,
            steps_per_epoch=training.steps_per_epoch,
            tiles=training.tiles,
            recalibrate=training.recalibrate,
        )

    def epochs(self) -> Generator[EpochReport, None, None]:
        """Train what was admitted; the caller may admit and release between two reports, and close it to end.

        Raises:
            DeviceError: The device failed, or has no memory left.
        """
        with device_errors(self._device):
            for report in LAYOUTS[self._layout].function(self._cohort):
                number, fold = report.key
                trial = self._trials[number]
                member = trial.members[self._file.folds.index(fold)]
                if report.error is None:
                    self._results.keep_prediction(trial, member)
                if trial.in_sequence and report.is_done and report.is_finite:
                    report = self._end_fold(trial, member) or report
                told = trial.report(report, member)
                if told is not None:
                    yield told

    def _end_fold(self, trial: Folds, member: Member) -> EpochReport | None:
        """Score a fold's validation images one by one and let the next fold begin; return the report of an error."""
        try:
            scores = self._results.image_scores(member, self._params[trial.number])
        except Exception as error:  # noqa: BLE001 whatever the code of a metric raises
            return self._cohort.ended(member, error)
        trial.image_scores += grouped(scores, most=max(1, MOST_IMAGE_SCORES // len(trial.members)))
        self._cohort.release(member.key)
        for following in trial.training():
            self._cohort.admit(following)
        return None

    def trial(self, number: int) -> Folds:
        """Return a trial in training."""
        return self._trials[number]

    def save_checkpoint(self, number: int) -> None:
        """Store where a trial is.

        Raises:
            DeviceError: The device failed.
            ArtifactError: It cannot be written.
        """
        with device_errors(self._device):
            content = dump_checkpoint(self.trial(number), identity=self._identity(number, self._params[number]))
        self._results.store_predictions(self.trial(number))
        self._artifacts.write(f"{number}/{CHECKPOINT}", content)

    def finish(self, number: int) -> Outcome:
        """Score the test images once, with the weights of the best epoch, and store what the trial leaves behind.

        With several folds the scores are means over them, and the result has each fold's own as well.

        Raises:
            DeviceError: The device failed, or has no memory left.
            ArtifactError: A file cannot be written.
        """
        trial = self.trial(number)
        with device_errors(self._device):
            result, shown = self._results.store(trial, self._params[number])
        return Outcome(trial.best_score, result, shown)

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
            "seed": self._file.sampler.seed,
            "cohort": self._beside[number],
            "layout": self._layout,
            "seconds": round(sum(trial.curve["seconds"]), 3),
            "images": sum(member.epoch * member.images_per_epoch for member in trial.members),
            "peak_memory_mb": peak_mb,
            "peak_memory_mb_per_member": round(peak_mb / (self._beside[number] * trial.n_beside)),
        }

    def discard(self, number: int, *, weights: bool) -> None:
        """Remove a finished trial's checkpoints, and its weights too if they are not wanted."""
        for name in CHECKPOINTS:
            self._artifacts.remove(f"{number}/{name}")
        if weights:
            self._results.remove_weights(number)

    def sweep(self, finished: Collection[int]) -> None:
        """Remove what workers that were killed left behind: checkpoints of finished trials, and half-written files.

        Files of other trials stay, as somebody may be writing them; so does whatever the storage does not list or
        give up, since nothing depends on it.

        Args:
            finished: Numbers of trials that are in training no more.
        """
        numbers = {str(number) for number in finished}
        with suppress(ArtifactError):
            for path in self._artifacts.names():
                number, _, name = path.partition("/")
                if number in numbers and (name in CHECKPOINTS or is_temporary(path)):
                    self._artifacts.remove(path)

    def train_in_turn(self) -> bool:
        """Let folds train one after another from now on, for want of memory; return whether they did not before."""
        if self._layout == ALONE or len(self._file.folds) == 1:
            return False
        self._layout = ALONE
        return True

    @property
    def searches_shapes(self) -> bool:
        """Whether one trial of this study may need more memory than another."""
        return searches_shapes(self._file)

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


def _augmentation(training: TrainingParams) -> Augmentation:
    return Augmentation(
        turns=training.augmentation,
        rotation=training.rotation,
        alpha=training.alpha,
        fixed_alpha=training.fixed_alpha,
        elastic_share=training.elastic_share,
        sigma_elastic=training.sigma_elastic,
        elastic_from=training.elastic_from,
        mirror_quarters=training.mirror_quarters,
        crop_size=training.crop,
    )
