"""The members that train on one device, one epoch each in turn."""

import math
import time

import torch
from torch import Tensor

from frem_search.data.augment import turn_and_flip
from frem_search.data.batches import epoch_batches
from frem_search.losses import LOSSES
from frem_search.networks import enhancement, redraw
from frem_search.output import Features
from frem_search.training.evaluate import precision_context, score_images
from frem_search.training.member import EpochReport, Member
from frem_search.training.resident import ResidentData


class Cohort:
    """Members that share images, loss, metric and the seed from which batches and turns follow.

    A member's batches depend on seed, fold and its own epoch, so that it trains the same alone and among others.

    Args:
        data: The fold's images on the device.
        loss: A name of `LOSSES`.
        metric: A name of `METRICS`.
        precision: `fp32` or `bf16`.
        seed: The study's.
        fold: Which fold `data` holds.
    """

    def __init__(self, data: ResidentData, *, loss: str, metric: str, precision: str, seed: int, fold: int) -> None:
        self.data = data
        self.loss, self.metric, self.precision = LOSSES[loss], metric, precision
        self.seed, self.fold = seed, fold
        self.members: dict[int, Member] = {}

    def admit(self, member: Member) -> None:
        """Take in a member, which trains from its next epoch on."""
        self.members[member.key] = member

    def release(self, key: int) -> None:
        """Let a member go, finished or not."""
        del self.members[key]

    def train_epoch(self, member: Member) -> EpochReport:
        """Train one member for one epoch and validate it."""
        started = time.perf_counter()
        epoch = member.epoch + 1
        redraw(member.network, seed=self.seed, fold=self.fold, epoch=epoch)
        losses, features = self._train(member, epoch)
        score = score_images(
            member.network,
            self.data.val.images,
            self.data.val.labels,
            metric=self.metric,
            n_classes=self.data.n_classes,
            precision=self.precision,
        )
        # The first host synchronisation of the epoch.
        value, per_class = score.value.item(), score.per_class.tolist()
        train_loss = losses.item()
        member.epoch = epoch
        is_finite = math.isfinite(train_loss)
        if is_finite and value > member.best_score:
            member.best_score, member.best_epoch, member.best_per_class = value, epoch, per_class
            member.keep_weights()
        seconds = time.perf_counter() - started
        _note(member, train_loss=train_loss, score=value, per_class=per_class, features=features, seconds=seconds)
        return EpochReport(member.key, epoch, train_loss, value, member.best_score, is_finite, member.is_done, seconds)

    def _train(self, member: Member, epoch: int) -> tuple[Tensor, Features | None]:
        """Run the steps of one epoch without waiting for the device; return mean loss and mean feature magnitudes."""
        network, device, images, labels = (
            member.network,
            self.data.device,
            self.data.train.images,
            self.data.train.labels,
        )
        batches = epoch_batches(len(self.data.train), member.batch_size, seed=self.seed, fold=self.fold, epoch=epoch)
        indices, flags = torch.from_numpy(batches.indices).to(device), torch.from_numpy(batches.flags).to(device)
        coefficients = {name: torch.tensor(value, device=device) for name, value in member.coefficients.items()}
        total, features = torch.zeros((), device=device), []
        network.train()
        for index, flag in zip(indices, flags, strict=True):
            image, target = images[index], labels[index]
            if member.has_augmentation:
                image, target = turn_and_flip(image, target, flag)
            with precision_context(device, self.precision):
                output = network(image)
                loss = self.loss.function(output, target, coefficients)
            member.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            member.optimizer.step()
            total += loss.detach()
            features.append(output.features)
        return total / len(indices), _mean_features(features)


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
