"""A study's images on the device, in every form in which trials in training want them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from frem_search.data.dataset import Dataset, load_dataset
from frem_search.segmentation.losses import LOSSES
from frem_search.study.file import StudyFile
from frem_search.study.parameters import TrainingParams
from frem_search.training.recipe import first_image_size
from frem_search.training.resident import ResidentData, load_resident


class ImageCache:
    """One copy on the device for all trials that want the same.

    Args:
        study_file: Which dataset, folds and loss.
        dataset: The images at the size of the first trials; other sizes are loaded when a trial asks for them.
        device: Where they are wanted.
    """

    def __init__(self, study_file: StudyFile, dataset: Dataset, device: torch.device) -> None:
        self._file, self._device = study_file, device
        self._datasets = {first_image_size(study_file): dataset}
        self._held: dict[Any, Mapping[int, ResidentData]] = {}

    def load(self, training: TrainingParams, *, used: Collection[ResidentData]) -> Mapping[int, ResidentData]:
        """Return the images as a trial wants them, by fold.

        Args:
            training: The trial's.
            used: What other trials train on; the rest leaves the device, which may not have room for two sizes.
        """
        size = training.image_size
        key = size, training.tiles, training.eightfold
        if key not in self._held:
            in_use = {id(data) for data in used}
            self._held = {
                each: folds for each, folds in self._held.items() if not in_use.isdisjoint(map(id, folds.values()))
            }
            if size not in self._datasets:
                self._datasets[size] = load_dataset(self._file.dataset, image_size=size, n_folds=self._file.n_folds)
            training.check_size(*self._datasets[size].labels.shape[1:])
            self._held[key] = load_resident(
                self._datasets[size],
                folds=self._file.folds,
                device=self._device,
                tiles=training.tiles,
                is_eightfold=training.eightfold,
                needs_border=LOSSES[self._file.loss].needs_border,
            )
        return self._held[key]
