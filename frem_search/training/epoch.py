"""One epoch of one member by itself: steps without waiting for the device, then validation."""

import math
import time

import torch
from torch import Tensor

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import precision_context
from frem_search.segmentation.losses import Loss
from frem_search.segmentation.metrics import Score
from frem_search.segmentation.networks import enhancement
from frem_search.segmentation.output import Features
from frem_search.training.member import EpochReport, Member


def train_alone(member: Member, epoch: Batch, *, loss: Loss, precision: str) -> tuple[Tensor, Features | None]:
    """Run the steps of one epoch without waiting for the device; return mean loss and mean feature magnitudes.

    Args:
        member: As `Cohort.begin_epoch` left it.
        epoch: Its batches.
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.
    """
    coefficients = loss_weights(member)
    total, features = torch.zeros((), device=member.data.device), []
    member.network.train()
    for i in range(epoch.n_steps):
        step_loss, magnitudes = step(member, epoch.step(i), coefficients, loss=loss, precision=precision)
        total += step_loss
        features.append(magnitudes)
    return total / epoch.n_steps, _mean_features(features)


def loss_weights(member: Member) -> dict[str, Tensor]:
    """Return a member's coefficients on its device."""
    return {name: torch.tensor(value, device=member.data.device) for name, value in member.coefficients.items()}


def step(
    member: Member, batch: Batch, coefficients: dict[str, Tensor], *, loss: Loss, precision: str
) -> tuple[Tensor, Features | None]:
    """Train on one batch; return its loss and feature magnitudes.

    Args:
        member: Its network in training mode.
        batch: What to train on.
        coefficients: The loss's.
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.
    """
    with precision_context(member.data.device, precision):
        output = member.network(batch.image)
        value = loss.function(output, batch, coefficients)
    member.optimizer.zero_grad(set_to_none=True)
    value.backward()
    member.optimizer.step()
    return value.detach(), output.features


def end_epoch(
    member: Member, *, train_loss: float, features: Features | None, score: Score, started: float
) -> EpochReport:
    """Count the epoch, keep the weights if they are the best so far, and append a row to the curve.

    Args:
        member: What was trained.
        train_loss: Mean over the steps.
        features: Mean magnitudes over the steps.
        score: On the validation images; read here, so that the host waits for the device.
        started: When the epoch began, by `time.perf_counter`.
    """
    value, per_class = score.value.item(), score.per_class.tolist()
    member.epoch += 1
    is_finite = math.isfinite(train_loss)
    member.has_ended = not is_finite
    if is_finite and value > member.best_score:
        member.best_score, member.best_epoch, member.best_per_class = value, member.epoch, per_class
        member.keep_weights()
    member.resume()
    seconds = time.perf_counter() - started
    _note(member, train_loss=train_loss, score=value, per_class=per_class, features=features, seconds=seconds)
    return EpochReport(
        member.key, member.epoch, train_loss, value, member.best_score, is_finite, member.is_done, seconds
    )


def _mean_features(steps: list[Features | None]) -> Features | None:
    known = [features for features in steps if features is not None]
    if not known:
        return None
    return Features(*(torch.stack(values).mean(dim=0) for values in zip(*known, strict=True)))


def _note(
    member: Member,
    *,
    train_loss: float,
    score: float,
    per_class: list[float],
    features: Features | None,
    seconds: float,
) -> None:
    """Append the epoch to the member's curve; JSON has no NaN, so that a class without a score is None."""
    row = {"epoch": member.epoch, "train_loss": train_loss, "score": score, "best_score": member.best_score}
    row |= {"seconds": round(seconds, 4)}
    curve = member.curve
    for column, value in row.items():
        curve[column].append(_finite(value))
    curve["per_class"].append([_finite(value) for value in per_class])
    bottleneck = skip = enhanced_sum = other_sum = None
    if features is not None:
        maps = features.bottleneck.double().cpu().numpy()
        layer = enhancement(member.network)
        bottleneck, skip = float(maps.mean()), features.skip.item()
        if layer is not None:
            enhanced_sum, other_sum = float(maps[layer.enhanced].sum()), float(maps[~layer.enhanced].sum())
    for column, magnitude in (
        ("bottleneck", bottleneck), ("skip", skip), ("enhanced_sum", enhanced_sum), ("other_sum", other_sum),
    ):  # fmt: skip
        curve[column].append(None if magnitude is None else _finite(magnitude))


def _finite(value: int | float) -> int | float | None:  # an epoch is an int, and beartype knows no int among floats
    return value if math.isfinite(value) else None
