"""One trial in training: its network, optimizer, images, progress and best weights so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frem_search.training.resident import ResidentData

CURVE_COLUMNS = (
    "epoch", "train_loss", "score", "best_score", "per_class", "bottleneck", "skip", "enhanced_sum", "other_sum",
    "seconds",
)  # fmt: skip


@dataclass(eq=False)
class Member:
    """A trial of a cohort.

    Args:
        key: By which the caller knows it: the trial's number.
        network: On the training device.
        data: The fold's images, on the same device.
        coefficients: What the loss weighs its terms with.
        learning_rate: Of Adam.
        batch_size: Images in a step.
        n_epochs: When it is done.
        has_augmentation: Whether images are turned and flipped.
    """

    key: int
    network: nn.Module
    data: ResidentData
    coefficients: Mapping[str, float]
    learning_rate: float
    batch_size: int
    n_epochs: int
    has_augmentation: bool = True
    epoch: int = 0  # epochs done
    has_ended: bool = False  # before its time: its loss was no number, or its code raised
    best_score: float = -math.inf
    best_epoch: int = 0
    best_per_class: list[float] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    curve: dict[str, list[Any]] = field(default_factory=lambda: {column: [] for column in CURVE_COLUMNS})

    def __post_init__(self) -> None:
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=self.learning_rate,
            fused=True,
            capturable=self.data.device.type == "cuda",  # so that a CUDA graph may hold its step
        )

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.n_epochs

    @property
    def is_active(self) -> bool:
        """Whether there is anything left to train."""
        return not (self.is_done or self.has_ended)

    def keep_weights(self) -> None:
        """Remember the weights as they are now."""
        self.best_weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}


@dataclass(frozen=True)
class EpochReport:
    """What one epoch of one member came to.

    Args:
        key: The member's.
        epoch: How many epochs are done.
        train_loss: Mean over the epoch's steps.
        score: On the validation images.
        best_score: The highest score so far.
        is_finite: Whether the training loss is a number; if not, the member cannot go on.
        is_done: Whether this was its last epoch.
        seconds: What the epoch took, validation included; members that train side by side share them.
        error: What the member's network, loss or metric raised; it cannot go on, and the numbers say nothing.
    """

    key: int
    epoch: int
    train_loss: float
    score: float
    best_score: float
    is_finite: bool
    is_done: bool
    seconds: float
    error: Exception | None = None
