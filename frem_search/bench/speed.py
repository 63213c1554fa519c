"""How many images a second a study trains on this machine, for each way to arrange its trials."""

import gc
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from frem_search.bench.processes import do_abreast
from frem_search.data.augmentation.orientations import N_ORIENTATIONS
from frem_search.data.dataset import Dataset
from frem_search.data.folds import Split
from frem_search.errors import DeviceMemoryError, FremSearchError
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import StudyFile
from frem_search.study.parameters import TrainingParams
from frem_search.study.space import corners
from frem_search.system.device import cpu_threads, device_errors
from frem_search.training.member import EpochReport
from frem_search.training.objective import Objective
from frem_search.training.recipe import split_params
from frem_search.training.side_by_side.layouts import ALONE


@dataclass(frozen=True)
class Arrangement:
    """How the trials of a study share a machine.

    Args:
        workers: Processes, on the CPU with one core each if there are several.
        cohort: Trials side by side in each of them.
        layout: How these share the device, a name of `LAYOUTS`.
    """

    workers: int = 1
    cohort: int = 1
    layout: str = ALONE

    def __str__(self) -> str:
        if self.workers > 1:
            return f"{self.workers} workers" + (f" x {self.cohort} {self.layout}" if self.cohort > 1 else "")
        return f"{self.cohort} {self.layout}" if self.cohort > 1 else f"1 trial, {self.layout}"


@dataclass(frozen=True)
class Speed:
    """What was measured of an arrangement.

    Args:
        arrangement: Which.
        images_per_s: Training images, validation included in the time; 0 if it could not be measured.
        peak_memory: Bytes of the device, of one worker; on the CPU 0, where memory is seldom what is short.
        error: Why it could not be measured.
    """

    arrangement: Arrangement
    images_per_s: float
    peak_memory: int = 0
    error: str = ""


@dataclass(frozen=True, eq=False)
class Trainee:
    """What is trained while it is timed.

    Args:
        study_file: The study.
        dataset: Its images.
        device: Where to train.
        precision: `fp32` or `bf16`.
    """

    study_file: StudyFile
    dataset: Dataset
    device: torch.device
    precision: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters at a corner of the space: where shapes are searched, one of the largest."""
        sized = ("base_channels", "depth", "batch_size", "crop_size", "image_size")
        return max(
            itertools.islice(corners(self.study_file.space), 64),
            key=lambda params: [np.prod(params.get(name) or 0) for name in sized],
        )

    @property
    def images_per_trial(self) -> int:
        """Training images of all epochs and folds of a trial, those not counted that only fill a last batch."""
        file, training = self.study_file, split_params(self.study_file, self.params).training
        n_copies = training.tiles**2 * (N_ORIENTATIONS if training.eightfold else 1)
        sizes = [n_copies * len(self.dataset.splits[fold].train) for fold in file.folds]
        if training.steps_per_epoch is not None:
            sizes = [training.steps_per_epoch * min(training.batch_size, n) for n in sizes]
        return file.n_epochs * sum(sizes)

    def shortened(self) -> "Trainee":
        """Return the same with no more images than two batches need, so that an epoch is short on any machine."""
        split = self.dataset.splits[self.study_file.folds[0]]
        n_train = min(len(split.train), 2 * int(self.params.get("batch_size", TrainingParams.batch_size)))
        n_val = max(1, round(n_train * len(split.val) / len(split.train)))
        short = Split(split.train[:n_train], split.val[:n_val], ())
        splits = tuple(short for _ in self.dataset.splits)
        return replace(self, dataset=replace(self.dataset, splits=splits))


def measure(trainee: Trainee, arrangement: Arrangement, *, seconds: float) -> Speed:
    """Train as a search would, the first epoch of every trial not counted; what cannot be trained has no speed.

    Args:
        trainee: What is trained.
        arrangement: How.
        seconds: For how long at least, after the first epochs.
    """
    return measured_by(_train, trainee, arrangement, seconds=seconds)


def measured_by(train: Callable[..., Speed], trainee: Trainee, arrangement: Arrangement, *, seconds: float) -> Speed:
    """Return the speed of a training in one process, or of several at the same time together.

    Args:
        train: Called with trainee, arrangement, seconds and a function to call when the first epochs are over.
        trainee: What is trained.
        arrangement: How.
        seconds: For how long at least.
    """
    n, each = arrangement.workers, replace(arrangement, workers=1)
    try:
        with cpu_threads(None):
            speeds = (
                [train(trainee, each, seconds, lambda: None)]
                if n == 1
                else do_abreast(train, trainee, each, seconds, n=n)
            )
    except DeviceMemoryError as error:
        return Speed(arrangement, 0.0, error=f"{error} {error.remedy}")
    except Exception as error:  # noqa: BLE001 what this machine's memory or libraries cannot run is not chosen
        says_all = n > 1 or isinstance(error, FremSearchError)
        return Speed(arrangement, 0.0, error=str(error) if says_all else f"{type(error).__name__}: {error}")
    finally:
        if trainee.device.type == "cuda":
            gc.collect()  # what failed may lie in a cycle, and what PyTorch keeps no other process could use
            with device_errors(trainee.device):
                torch.cuda.empty_cache()
    return Speed(arrangement, sum(speed.images_per_s for speed in speeds), max(speed.peak_memory for speed in speeds))


def _train(trainee: Trainee, arrangement: Arrangement, seconds: float, wait: Callable[[], Any]) -> Speed:
    objective = Objective(
        replace(trainee.study_file, n_epochs=10**9),
        trainee.dataset,
        device=trainee.device,
        precision=trainee.precision,
        artifacts=Artifacts("memory://", uuid.uuid4().hex),
        study_uid="",
        layout=arrangement.layout,
    )
    for number in range(arrangement.cohort):
        objective.admit(number, trainee.params | {"patience": None})  # it trains for as long as it is timed
    n_images = sum(member.images_per_epoch for member in objective.trial(0).training())
    with closing(objective.epochs()) as reports:
        _take(reports, arrangement.cohort)
        wait()
        started, n_epochs = time.perf_counter(), 0
        while n_epochs == 0 or time.perf_counter() - started < seconds:
            n_epochs += _take(reports, arrangement.cohort)
        elapsed = time.perf_counter() - started
    return Speed(arrangement, n_epochs * n_images / elapsed, peak_memory(trainee.device))


def _take(reports: Iterator[EpochReport], n: int) -> int:
    for report in itertools.islice(reports, n):
        if report.error is not None:
            raise report.error
    return n


def peak_memory(device: torch.device) -> int:
    """Return the most bytes of a GPU that were in use since its statistics were reset; of the CPU 0."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def best(speeds: Iterable[Speed], *, margin: float = 1.05) -> Speed:
    """Return the fastest; an earlier one where that is hardly faster, so that the simplest should stand first."""
    chosen = None
    for speed in speeds:
        if chosen is None or speed.images_per_s > margin * chosen.images_per_s:
            chosen = speed
    if chosen is None:
        message = "expected at least one measured speed"
        raise ValueError(message)
    return chosen
