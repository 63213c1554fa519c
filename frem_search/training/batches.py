"""All batches of an epoch, gathered and augmented on the device before the first step, which then only reads them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from frem_search.data.augmentation.order import epoch_batches
from frem_search.data.augmentation.turns import Augmentation, turn_and_flip
from frem_search.data.augmentation.warp import Warps, sample
from frem_search.segmentation.batch import Batch
from frem_search.training.resident import Part, ResidentData

CHUNK = 64  # images augmented at a time: bounds the memory that takes


class EpochPlan(NamedTuple):
    """What an epoch is prepared from; members of equal plans train on the same batches.

    Args:
        data: The images.
        seed: With fold and epoch it decides all that is random.
        fold: Which one they are of.
        epoch: Which one, from 1 on.
        batch_size: Images in a step.
        n_steps: Steps of the epoch; None is one pass over all images.
        augmentation: As it is in this epoch.
    """

    data: ResidentData
    seed: int
    fold: int
    epoch: int
    batch_size: int
    n_steps: int | None
    augmentation: Augmentation


def prepare_epoch(plan: EpochPlan) -> Batch:
    """Return the batches of an epoch, (steps, b, ...), images channels last in memory; nothing waits for the device."""
    data, part = plan.data, plan.data.train
    indices, flags = epoch_batches(
        len(part), plan.batch_size, seed=plan.seed, fold=plan.fold, epoch=plan.epoch, n_steps=plan.n_steps
    )
    rows, turns = (
        torch.from_numpy(each.reshape(indices.size, *each.shape[2:])).to(data.device) for each in (indices, flags)
    )
    warps = Warps(plan.augmentation, seed=plan.seed, fold=plan.fold, epoch=plan.epoch, device=data.device)
    chunks = [
        _augmented(part, row, turn, warps) for row, turn in zip(rows.split(CHUNK), turns.split(CHUNK), strict=True)
    ]
    image, label, *border = (torch.cat(each) for each in zip(*(chunk.tensors() for chunk in chunks), strict=True))
    image = image.contiguous(memory_format=torch.channels_last)
    whole = Batch(image, label, border[0] if border else None, data.class_weights)
    return whole.map(lambda each: each.unflatten(0, indices.shape))


def prepare_stacked(plans: Sequence[EpochPlan]) -> Batch:
    """Return the batches of several members: (steps, b, ...) if all have the same, else (steps, members, b, ...).

    Args:
        plans: Each member's; their epochs have one shape.
    """
    stacked: Batch | None = None
    for plan in dict.fromkeys(plans):
        own = prepare_epoch(plan)
        if len(set(plans)) == 1:
            return own
        stacked = stacked or _room_for(own, n=len(plans))
        for slot in (slot for slot, each in enumerate(plans) if each == plan):
            for held, new in zip(stacked.tensors(), own.tensors(), strict=True):
                held[:, slot] = new
    assert stacked is not None, "a stack has members"
    return stacked._replace(class_weights=torch.stack([plan.data.class_weights for plan in plans]))


def _augmented(part: Part, rows: Tensor, flags: Tensor, warps: Warps) -> Batch:
    """Return images (n, c, h, w), labels (n, h, w) and, where a part has them, distances (n, h, w)."""
    drawn = part.take(rows)
    augmentation = warps.augmentation
    if augmentation.has_warp:
        height, width = drawn.label.shape[1:]
        return _sampled(drawn, warps.positions(flags, (height, width)))
    return drawn.map(lambda each: turn_and_flip(each, flags)) if augmentation.turns else drawn


def _sampled(drawn: Batch, positions: Tensor) -> Batch:
    label = sample(drawn.label[:, None].float(), positions, mode="nearest")[:, 0].to(drawn.label.dtype)
    border = None if drawn.border is None else sample(drawn.border[:, None], positions, mode="bilinear")[:, 0]
    return Batch(sample(drawn.image, positions, mode="bilinear"), label, border)


def _room_for(epoch: Batch, *, n: int) -> Batch:
    """Return tensors for as many members, without content; images as grouped convolutions read them."""
    steps, b, c, h, w = epoch.image.shape
    room = epoch.map(lambda each: each.new_empty((steps, n, b, h, w)))
    return room._replace(image=epoch.image.new_empty((steps, b, h, w, n, c)).permute(0, 4, 1, 5, 2, 3))
