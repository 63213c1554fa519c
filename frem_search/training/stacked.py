"""Several members trained side by side as one computation, for as long as one epoch."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from frem_search.data.augment import turn_and_flip
from frem_search.data.batches import EpochBatches
from frem_search.losses import Loss
from frem_search.output import Features
from frem_search.training.evaluate import precision_context
from frem_search.training.member import Member
from frem_search.training.resident import Part
from frem_search.training.stacked_adam import StackedAdam, stack, unstack
from frem_search.training.stacked_kernels import SideBySide


def stack_key(member: Member) -> Hashable:
    """Return what members must have in common to be stacked: images, every shape, and the loss's coefficients."""
    shapes = tuple((name, tuple(value.shape)) for name, value in member.network.state_dict().items())
    return type(member.network), id(member.data), shapes, member.batch_size, tuple(sorted(member.coefficients))


def train_stacked(
    members: Sequence[Member],
    batches: Sequence[EpochBatches],
    *,
    loss: Loss,
    precision: str,
) -> tuple[Tensor, Features | None]:
    """Run the steps of one epoch of all members without waiting for the device.

    The members are stacked at the beginning and written back at the end: until then they are as they were, whatever
    goes wrong. No number of one member reaches another.

    Args:
        members: Of one `stack_key`, their enhanced maps redrawn; they may differ in everything else.
        batches: Of each member's epoch.
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.

    Returns:
        Mean loss and mean feature magnitudes, the members along the first dimension.
    """
    params, buffers = _stacked_state(members)
    optimizer = StackedAdam(members, list(params.values()))
    data = members[0].data
    step_all = _step_all(members, loss=loss, device=data.device, precision=precision)
    seen = []
    for image, target in _batches(members, batches, data.train):
        losses, *features = step_all(params, buffers, image, target)
        # The sum, so that a member's gradient is its own loss's; that of a sum is 1 even if another loss is no number.
        losses.sum().backward()
        optimizer.step()
        seen.append((losses.detach(), *features))
    optimizer.write_back()
    own = [member.network.state_dict() for member in members]
    stacked = params | buffers
    unstack(stacked.values(), [[state[name] for state in own] for name in stacked])
    mean_loss, *magnitudes = (torch.stack(steps).mean(dim=0) for steps in zip(*seen, strict=True))
    return mean_loss, Features(*magnitudes) if magnitudes else None


def _stacked_state(members: Sequence[Member]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of the members' parameters, as leaves of autograd, and of their buffers."""
    params, buffers = (
        {name: stack([each[name] for each in values]) for name in values[0]}
        for values in (
            [dict(member.network.named_parameters()) for member in members],
            [dict(member.network.named_buffers()) for member in members],
        )
    )
    for value in params.values():
        value.requires_grad_()
    return params, buffers


def _step_all(
    members: Sequence[Member],
    *,
    loss: Loss,
    device: torch.device,
    precision: str,
) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor], tuple[Tensor, ...]]:
    """Return a function of stacked parameters and buffers and a batch: all losses and feature magnitudes."""
    network = members[0].network.train()
    coefficients = {
        name: torch.tensor([member.coefficients[name] for member in members], device=device)
        for name in members[0].coefficients
    }

    def step_one(
        state: tuple[dict[str, Tensor], ...], weights: dict[str, Tensor], image: Tensor, target: Tensor
    ) -> tuple[Tensor, ...]:
        output = functional_call(network, state, (image,))
        return loss.function(output, target, weights), *(output.features or ())

    def step_all(
        params: dict[str, Tensor], buffers: dict[str, Tensor], image: Tensor, target: Tensor
    ) -> tuple[Tensor, ...]:
        # Images of four dimensions are the same for all.
        of_images = 0 if image.ndim == 5 else None
        with precision_context(device, precision), SideBySide():
            return vmap(step_one, in_dims=(0, 0, of_images, of_images))((params, buffers), coefficients, image, target)

    return step_all


def _batches(members: Sequence[Member], batches: Sequence[EpochBatches], data: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of each step: (b, ...) where all members have the same, else (members, b, ...)."""
    indices = np.stack([each.indices for each in batches], axis=1)  # [steps members batch]
    has_augmentation = np.array([member.has_augmentation for member in members])
    flags = np.stack([each.flags for each in batches], axis=1) & has_augmentation[:, None, None]
    is_shared = (indices == indices[:, :1]).all() and (flags == flags[:, :1]).all()
    n = 1 if is_shared else len(members)
    shape = (n, indices.shape[2])
    device = data.images.device
    rows = torch.from_numpy(indices[:, :n].reshape(len(indices), -1)).to(device)
    turns = torch.from_numpy(flags[:, :n].reshape(len(indices), -1, 3)).to(device)
    for row, turn in zip(rows, turns, strict=True):
        image, target = data.images[row], data.labels[row]
        if has_augmentation.any():
            image, target = turn_and_flip(image, target, turn)
        yield (image, target) if is_shared else (image.unflatten(0, shape), target.unflatten(0, shape))
