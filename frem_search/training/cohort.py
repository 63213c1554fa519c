"""The members that train side by side on one device."""

import math
import time
from collections.abc import Hashable

from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import Criterion, score_images
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.metrics import Score
from frem_search.segmentation.networks import redraw
from frem_search.segmentation.output import Output
from frem_search.system.device import is_of_device
from frem_search.training.batches import EpochPlan, prepare_epoch
from frem_search.training.epoch import end_epoch, train_alone
from frem_search.training.member import EpochReport, Member


class Cohort:
    """Members that share loss, metric and precision.

    A member's batches depend on its own seed, fold and epoch, so that it trains the same alone, among others and in a
    slot that another one left.

    Args:
        loss: A name of `LOSSES`.
        metric: A name of `METRICS`.
        precision: `fp32` or `bf16`.
    """

    def __init__(self, *, loss: str, metric: str, precision: str) -> None:
        self.loss, self.metric, self.precision = LOSSES[loss], metric, precision
        self.members: dict[Hashable, Member] = {}

    def admit(self, member: Member) -> None:
        """Take in a member, which trains from its next epoch on."""
        self.members[member.key] = member

    def release(self, key: Hashable) -> None:
        """Let a member go, finished or not."""
        del self.members[key]

    def holds(self, member: Member) -> bool:
        """Whether a member is in, and was not let go or replaced meanwhile."""
        return self.members.get(member.key) is member

    def active(self) -> list[Member]:
        """Return the members that have epochs left."""
        return [member for member in self.members.values() if member.is_active]

    def begin_epoch(self, member: Member) -> Batch:
        """Draw what is random in a member's next epoch, enhanced maps and batches, and return these."""
        return prepare_epoch(self.plan_epoch(member))

    def plan_epoch(self, member: Member) -> EpochPlan:
        """Set network and optimizer for a member's next epoch, and return what it is to be trained on."""
        member.set_learning_rate()
        redraw(member.network, seed=member.seed, fold=member.fold, epoch=member.epoch + 1)
        return EpochPlan(
            data=member.data,
            seed=member.seed,
            fold=member.fold,
            epoch=member.epoch + 1,
            batch_size=member.batch_size,
            n_steps=member.steps_per_epoch,
            augmentation=member.augmentation.at(member.best_score),
        )

    def train_epoch(self, member: Member) -> EpochReport:
        """Train one member by itself for one epoch and validate it.

        What its code raises ends the member and is told in the report; what the device does concerns all and is raised.
        """
        started = time.perf_counter()
        try:
            epoch = self.begin_epoch(member)
            trained = train_alone(member, epoch, loss=self.loss, precision=self.precision)
            return end_epoch(member, trained=trained, score=self.validate(member), started=started)
        except Exception as error:  # noqa: BLE001 whatever the code of a network, loss or metric raises
            return self.ended(member, error)

    def validate(self, member: Member) -> Score:
        """Return a member's score and loss on the validation images, not yet waiting for the device."""
        member.prepare_score(precision=self.precision)
        whole = validation_batch(member)
        return score_images(
            member.network,
            whole.image,
            whole.label,
            metric=self.metric,
            n_classes=member.data.n_classes,
            precision=self.precision,
            tiles=member.tiles,
            criterion=self.criterion(member, whole),
        )

    def criterion(self, member: Member, whole: Batch) -> Criterion:
        """Return what gives the loss of a member's validation images; in test no output is auxiliary."""
        weights = member.loss_weights

        def loss_of(output: Output, rows: slice) -> Tensor:
            return self.loss.function(output, whole.map(lambda each: each[rows]), weights)

        return loss_of

    def ended(self, member: Member, error: Exception) -> EpochReport:
        """Let a member end with what its code raised; an error of the device concerns all and is raised again."""
        if is_of_device(error):
            raise error
        member.has_ended = True
        return EpochReport(
            member.key,
            member.epoch,
            train_loss=math.nan,
            score=math.nan,
            best_score=member.best_score,
            is_finite=False,
            is_done=False,
            seconds=0.0,
            error=error,
        )


def validation_batch(member: Member) -> Batch:
    """Return copies of all validation images of a member, with what its loss looks at."""
    val = member.data.val
    return Batch(val.images, val.labels, val.border, member.data.class_weights)
