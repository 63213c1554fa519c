"""One trial in training: its network, optimizer, images, progress and best weights so far."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from frem_search.data.augmentation.turns import Augmentation
from frem_search.segmentation.networks import follow_length
from frem_search.training.recalibration import copy_statistics, recalibrate, restore_statistics
from frem_search.training.resident import ResidentData
from frem_search.training.schedule import Schedule, factor_at

MAGNITUDES = ("bottleneck", "skip", "enhanced_sum", "other_sum")
CURVE_COLUMNS = (
    "epoch", "train_loss", "train_iou", "val_loss", "score", "best_score", "per_class", *MAGNITUDES, "seconds",
)  # fmt: skip


@dataclass(eq=False)
class Member:
    """What trains in a cohort: a trial, or one fold of it.

    Args:
        key: By which the caller knows it.
        network: On the training device.
        data: The fold's images, on the same device.
        coefficients: What the loss weighs its terms with.
        learning_rate: Of Adam, before the schedule's factor.
        batch_size: Images in a step.
        n_epochs: When it is done.
        fold: Which one the images are of.
        seed: From which batches, turns and enhanced maps follow.
        augmentation: What happens to images before they are trained on.
        weight_decay: Of Adam: this times the weight is added to its gradient.
        schedule: By what the learning rate is multiplied, from which epoch on.
        patience: After how many epochs without a better score it is done; None is never.
        steps_per_epoch: None is one pass over all images.
        tiles: Into how many bands of regions, and regions of a band, an image is cut to be predicted.
        recalibrate: Whether statistics of normalization are estimated again before a score.
    """

    key: Hashable
    network: nn.Module
    data: ResidentData
    coefficients: Mapping[str, float]
    learning_rate: float
    batch_size: int
    n_epochs: int
    fold: int = 0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    weight_decay: float = 0.0
    schedule: Schedule = ()
    patience: int | None = None
    steps_per_epoch: int | None = None
    tiles: int = 1
    recalibrate: bool = False
    epoch: int = 0  # epochs done
    is_waiting: bool = False  # for other folds of its trial
    has_ended: bool = False  # before its time: its loss was no number, or its code raised
    best_score: float = -math.inf
    best_epoch: int = 0
    best_per_class: list[float] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    curve: dict[str, list[Any]] = field(default_factory=lambda: {column: [] for column in CURVE_COLUMNS})

    def __post_init__(self) -> None:
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        follow_length(self.network, self.n_epochs * self.n_steps)
        is_cuda = self.data.device.type == "cuda"
        # On CUDA a tensor: a CUDA graph of the optimizer's step would replay a number as it was when it was captured.
        self._rate = torch.tensor(self.learning_rate, device=self.data.device) if is_cuda else None
        self._statistics: dict[str, Tensor] = {}  # of training, while recalibrated ones are in their place
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=self.learning_rate if self._rate is None else self._rate,
            weight_decay=self.weight_decay,
            fused=True,
            capturable=is_cuda,  # so that a CUDA graph may hold its step
        )

    @cached_property
    def loss_weights(self) -> dict[str, Tensor]:
        """The loss's coefficients on the device."""
        return {name: torch.tensor(value, device=self.data.device) for name, value in self.coefficients.items()}

    @property
    def rate(self) -> float:
        """The learning rate of the epoch that comes."""
        return self.learning_rate * factor_at(self.schedule, self.epoch + 1)

    def set_learning_rate(self) -> None:
        """Give the optimizer the learning rate of the epoch that comes."""
        (group,) = self.optimizer.param_groups
        if self._rate is None:
            group["lr"] = self.rate
        else:  # also after a checkpoint, which brings a number or a tensor of its own
            group["lr"] = self._rate.fill_(self.rate)

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or so many brought no better score that it has come to its end."""
        is_stuck = self.patience is not None and self.epoch - self.best_epoch >= self.patience
        return self.epoch >= self.n_epochs or is_stuck

    @property
    def n_steps(self) -> int:
        """How many steps an epoch has."""
        return self.steps_per_epoch or -(-len(self.data.train) // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """How many training images an epoch has, those not counted that only fill its last batch."""
        n_images = len(self.data.train)
        return n_images if self.steps_per_epoch is None else self.steps_per_epoch * min(self.batch_size, n_images)

    @property
    def is_active(self) -> bool:
        """Whether there is anything left to train now."""
        return not (self.is_done or self.has_ended or self.is_waiting)

    def prepare_score(self, *, precision: str) -> None:
        """Bring the network to the state in which it is scored and kept; `resume` brings it back.

        Args:
            precision: `fp32` or `bf16`.
        """
        if self.recalibrate:
            copies = copy_statistics(self.network)
            # Into the same tensors each time: those that a CUDA graph writes to are those that `resume` reads.
            for name, value in copies.items():
                self._statistics.setdefault(name, value).copy_(value)
            images = self.data.train.images
            recalibrate(self.network, images, batch_size=self.batch_size, precision=precision)

    def resume(self) -> None:
        """Bring the network back to the state in which it trains on."""
        restore_statistics(self.network, self._statistics)

    def keep_weights(self) -> None:
        """Remember the weights as they are now."""
        self.best_weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to: of a member, or of a trial whose folds are members.

    Args:
        key: The member's, or the trial's number; then scores and loss are means over folds.
        epoch: How many epochs are done.
        train_loss: Mean over the epoch's steps.
        score: On the validation images.
        best_score: The highest score so far.
        is_finite: Whether the training loss is a number; if not, the member cannot go on.
        is_done: Whether this was its last epoch.
        seconds: What the epoch took, validation included; members that train side by side share them.
        error: What the member's network, loss or metric raised; it cannot go on, and the numbers say nothing.
    """

    key: Any
    epoch: int
    train_loss: float
    score: float
    best_score: float
    is_finite: bool
    is_done: bool
    seconds: float
    error: Exception | None = None
