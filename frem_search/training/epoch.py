"""One epoch of one member by itself: steps without waiting for the device, then validation."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import precision_context
from frem_search.segmentation.losses import Loss
from frem_search.segmentation.metrics import Score
from frem_search.segmentation.metrics.iou import iou_counts, mean_of_counts
from frem_search.segmentation.networks import enhancement
from frem_search.segmentation.output import Features, Output
from frem_search.training.member import EpochReport, Member


class Trained(NamedTuple):
    """What training showed: of one step, or of all steps of an epoch.

    Args:
        loss: The step's, or the mean over steps.
        iou_counts: As `iou_counts` counts them, summed over steps.
        features: Feature magnitudes, or their mean over steps; None of a network that has none.
    """

    loss: Float[Tensor, ""]
    iou_counts: Int[Tensor, "2 k"]
    features: Features | None

    @classmethod
    def over(cls, steps: "Sequence[Trained]") -> "Trained":
        """Return what some steps showed together."""
        losses, counts, features = zip(*steps, strict=True)
        known = [each for each in features if each is not None]
        means = Features(*(torch.stack(values).mean(dim=0) for values in zip(*known, strict=True))) if known else None
        return cls(sum(losses) / len(steps), torch.stack(counts).sum(dim=0), means)


def train_alone(member: Member, epoch: Batch, *, loss: Loss, precision: str) -> Trained:
    """Run the steps of one epoch without waiting for the device.

    Args:
        member: As `Cohort.begin_epoch` left it.
        epoch: Its batches.
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.
    """
    member.network.train()
    return Trained.over([step(member, epoch.step(i), loss=loss, precision=precision) for i in range(epoch.n_steps)])


def step(member: Member, batch: Batch, *, loss: Loss, precision: str) -> Trained:
    """Train on one batch.

    Args:
        member: Its network in training mode.
        batch: What to train on.
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.
    """
    with precision_context(member.data.device, precision):
        output = member.network(batch.image)
        value = loss.function(output, batch, member.loss_weights)
    member.optimizer.zero_grad(set_to_none=True)
    value.backward()
    member.optimizer.step()
    return Trained(value.detach(), count(output, batch), output.features)


def count(output: Output, batch: Batch) -> Int[Tensor, "2 k"]:
    """Count what the pixels of a batch were taken for in training."""
    logits = output.logits.detach()
    return iou_counts(logits.argmax(dim=1), batch.label, n_classes=logits.shape[1])


def end_epoch(member: Member, *, trained: Trained, score: Score, started: float) -> EpochReport:
    """Count the epoch, keep the weights if they are the best so far, and append a row to the curve.

    Args:
        member: What was trained.
        trained: What the epoch showed; read here, so that the host waits for the device.
        score: On the validation images, with their loss.
        started: When the epoch began, by `time.perf_counter`.
    """
    train_loss, value, per_class = trained.loss.item(), score.value.item(), score.per_class.tolist()
    member.epoch += 1
    is_finite = math.isfinite(train_loss)
    member.has_ended = not is_finite
    if is_finite and value > member.best_score:
        member.best_score, member.best_epoch, member.best_per_class = value, member.epoch, per_class
        member.keep_weights()
    member.resume()
    seconds = time.perf_counter() - started
    row: dict[str, int | float | None] = {
        "epoch": member.epoch,
        "train_loss": train_loss,
        "train_iou": mean_of_counts(trained.iou_counts).item(),
        "val_loss": None if score.loss is None else score.loss.item(),
        "score": value,
        "best_score": member.best_score,
        "seconds": round(seconds, 4),
    }
    for column, number in (row | _magnitudes(member, trained.features)).items():
        member.curve[column].append(_finite(number))
    member.curve["per_class"].append([_finite(number) for number in per_class])  # JSON has no NaN
    return EpochReport(
        member.key, member.epoch, train_loss, value, member.best_score, is_finite, member.is_done, seconds
    )


def _magnitudes(member: Member, features: Features | None) -> dict[str, float | None]:
    bottleneck = skip = enhanced_sum = other_sum = None
    if features is not None:
        maps = features.bottleneck.double().cpu().numpy()
        layer = enhancement(member.network)
        bottleneck, skip = float(maps.mean()), features.skip.item()
        if layer is not None:
            enhanced_sum, other_sum = float(maps[layer.enhanced].sum()), float(maps[~layer.enhanced].sum())
    return {"bottleneck": bottleneck, "skip": skip, "enhanced_sum": enhanced_sum, "other_sum": other_sum}


def _finite(value: int | float | None) -> int | float | None:  # an epoch is an int, and beartype wants it said
    return value if value is not None and math.isfinite(value) else None
