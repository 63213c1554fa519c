"""A trained network's score on labelled images."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from frem_search.data.augmentation.orientations import eight_orientations
from frem_search.data.dataset import Dataset, load_dataset
from frem_search.errors import ContractError, DatasetError, UsageError
from frem_search.segmentation.inference import score_images
from frem_search.segmentation.networks import has_effect, in_phase
from frem_search.segmentation.weights import Weights
from frem_search.system.device import find_device

PartName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Evaluation:
    """A score and what it is the score of.

    Args:
        dataset: The images' dataset.
        part: Which part of the fold.
        fold: Which fold.
        n_images: How many images that is.
        score: The metric.
        value: Over all of these images.
        per_class: The same for each class by name, None where a class has none.
    """

    dataset: str
    part: str
    fold: int
    n_images: int
    score: str
    value: float
    per_class: dict[str, float | None]


def evaluate(
    weights: Weights,
    *,
    dataset: str | None = None,
    part: str = "test",
    fold: int | None = None,
    device: str = "auto",
    enhanced: bool | None = None,
) -> Evaluation:
    """Score the images of one part of a dataset, in the precision and at the size of the training.

    Args:
        weights: Of the network.
        dataset: Name or folder; None is the one that the network was trained on.
        part: `train`, `val` or `test`.
        fold: None is the one that the network was trained on.
        device: As `find_device` takes it.
        enhanced: Whether the maps of the best epoch are enhanced; None is as the network tests by itself.

    Raises:
        UsageError: There is no such part, or the network enhances nothing.
        DatasetError: The dataset is missing, the part is empty, or channels or classes are others than the network's.
        ContractError: The dataset has the name of the one trained on, but other content.
    """
    if part not in get_args(PartName):
        message = f"--part: expected one of {', '.join(get_args(PartName))}, but got {part!r}."
        raise UsageError(message)
    chosen = find_device(device)
    try:
        loaded = load_dataset(dataset or weights.dataset, image_size=weights.image_size, n_folds=weights.n_folds)
    except DatasetError as error:
        if dataset:
            raise
        message = f"The weights were trained on {weights.dataset}: {error} Give its folder with --dataset."
        raise DatasetError(message) from None
    check_fit(weights, loaded)
    check_content(weights, loaded)
    network = weights.build(chosen)
    if enhanced is not None and not has_effect(network):
        message = (
            f"--{'enhanced' if enhanced else 'plain'}: expected weights of a training with FREM, but "
            f"{weights.network} was trained without: it has one test phase. Leave the option out."
        )
        raise UsageError(message)
    fold = weights.fold if fold is None else fold
    indices = loaded.indices(cast(PartName, part), fold=fold)
    if not len(indices):
        message = f"{loaded.folder}: fold {fold} has no {part} image to score. Choose another with --part or --fold."
        raise DatasetError(message)
    images, labels = loaded.images[indices], loaded.labels[indices]
    if weights.is_eightfold:
        images, labels = eight_orientations(images), eight_orientations(labels)
    with nullcontext() if enhanced is None else in_phase(network, is_enhanced=enhanced):
        score = score_images(
            network,
            torch.from_numpy(images).to(chosen).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(labels).to(chosen),
            metric=weights.score,
            n_classes=len(weights.class_names),
            precision=weights.precision,
            tiles=weights.tiles,
        )
    values = [value if math.isfinite(value) else None for value in score.per_class.tolist()]
    per_class = dict(zip(weights.class_names, values, strict=True))
    return Evaluation(loaded.name, part, fold, len(labels), weights.score, score.value.item(), per_class)


def check_fit(weights: Weights, dataset: Dataset) -> None:
    """Raise unless a dataset has the channels and classes that a network was trained for.

    Raises:
        DatasetError: It has others.
    """
    n_channels = len(dataset.channel_names)
    if n_channels != weights.in_channels:
        message = (
            f"{dataset.folder}: expected images of {weights.in_channels} channel(s), as the network was trained on "
            f"{weights.dataset}, but got {n_channels}. Choose another dataset, or other weights."
        )
        raise DatasetError(message)
    if dataset.class_names != weights.class_names:
        message = (
            f"{dataset.folder}: expected the classes {', '.join(weights.class_names)}, as the network was trained on "
            f"{weights.dataset}, but got {', '.join(dataset.class_names)}. Choose another dataset; if they mean the "
            "same, rename them in its dataset.json."
        )
        raise DatasetError(message)


def check_content(weights: Weights, dataset: Dataset) -> None:
    """Raise if a dataset passes for the one that a network was trained on; one of another name may be scored.

    Raises:
        ContractError: It has that one's name, but other images, labels or folds.
    """
    if dataset.name == weights.dataset and dataset.fingerprint != weights.dataset_fingerprint:
        message = (
            f"{dataset.folder}: expected {weights.dataset} as the network was trained on it (fingerprint "
            f"{weights.dataset_fingerprint[:12]}), but its images, labels or folds are others now "
            f"({dataset.fingerprint[:12]}). Give the folder of the former with --dataset; to score the others, rename "
            "their folder."
        )
        raise ContractError(message)
