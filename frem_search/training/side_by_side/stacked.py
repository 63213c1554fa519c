"""Several members trained side by side as one computation, for as long as one epoch."""

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from frem_search.segmentation.batch import Batch
from frem_search.segmentation.inference import precision_context
from frem_search.segmentation.losses import Loss
from frem_search.segmentation.output import Features
from frem_search.system.device import is_of_device
from frem_search.training.batches import prepare_stacked
from frem_search.training.cohort import Cohort
from frem_search.training.epoch import Trained, count, end_epoch
from frem_search.training.member import EpochReport, Member
from frem_search.training.side_by_side.stacked_adam import StackedAdam, stack, unstack
from frem_search.training.side_by_side.stacked_kernels import SideBySide


def stack_key(member: Member) -> Hashable:
    """Return what members must have in common to be stacked: every shape, and the loss's coefficients."""
    shapes = tuple((name, tuple(value.shape)) for name, value in member.network.state_dict().items())
    images = len(member.data.train), member.data.train.image_shape
    epoch = *images, member.batch_size, member.steps_per_epoch, member.augmentation.crop_size
    return type(member.network), shapes, epoch, tuple(sorted(member.coefficients))


def train_epoch_stacked(cohort: Cohort, members: Sequence[Member]) -> list[EpochReport]:
    """Train members of one `stack_key` as one computation for one epoch, and validate them."""
    started = time.perf_counter()
    try:
        epoch = begin_epoch_stacked(cohort, members)
        results = train_stacked(members, epoch, loss=cohort.loss, precision=cohort.precision)
    except Exception as error:
        if is_of_device(error):
            raise
        # They are as they were before. Whose fault it is shows when each is by itself.
        return [cohort.train_epoch(member) for member in members]
    reports = []
    for member, trained in zip(members, results, strict=True):
        try:
            reports.append(end_epoch(member, trained=trained, score=cohort.validate(member), started=started))
        except Exception as error:  # noqa: BLE001
            reports.append(cohort.ended(member, error))
    return reports


def begin_epoch_stacked(cohort: Cohort, members: Sequence[Member]) -> Batch:
    """Draw what is random in an epoch; return batches (steps, b, ...) where all have the same, else with members."""
    return prepare_stacked([cohort.plan_epoch(member) for member in members])


def train_stacked(
    members: Sequence[Member],
    epoch: Batch,
    *,
    loss: Loss,
    precision: str,
) -> list[Trained]:
    """Run the steps of one epoch of all members without waiting for the device; return what each one's showed.

    The members are stacked at the beginning and written back at the end: until then they are as they were, whatever
    goes wrong. No number of one member reaches another.

    Args:
        members: Of one `stack_key`, as `begin_epoch_stacked` left them; they may differ in everything else.
        epoch: Their batches: (steps, b, ...) if they are the same for all, else (steps, members, b, ...).
        loss: A value of `LOSSES`.
        precision: `fp32` or `bf16`.
    """
    params, buffers = _stacked_state(members)
    optimizer = StackedAdam(members, list(params.values()))
    step_all = _step_all(members, loss=loss, device=members[0].data.device, precision=precision)
    seen = []
    for i in range(epoch.n_steps):
        losses, *others = step_all(params, buffers, epoch.step(i))
        # The sum, so that a member's gradient is its own loss's; that of a sum is 1 even if another loss is no number.
        losses.sum().backward()
        optimizer.step()
        seen.append((losses.detach(), *others))
    optimizer.write_back()
    own = [dict(member.network.named_parameters()) | dict(member.network.named_buffers()) for member in members]
    stacked = params | buffers
    unstack(stacked.values(), [[state[name] for state in own] for name in stacked])
    return [Trained.over([_of_slot(step, slot) for step in seen]) for slot in range(len(members))]


def _of_slot(step: Sequence[Tensor], slot: int) -> Trained:
    loss, counts, *features = (each[slot] for each in step)
    return Trained(loss, counts, Features(*features) if features else None)


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
) -> Callable[[dict[str, Tensor], dict[str, Tensor], Batch], tuple[Tensor, ...]]:
    """Return a function of stacked parameters and buffers and a batch: all losses, counts and feature magnitudes."""
    network = members[0].network.train()
    coefficients = {
        name: torch.tensor([member.coefficients[name] for member in members], device=device)
        for name in members[0].coefficients
    }

    def step_one(state: tuple[dict[str, Tensor], ...], weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, ...]:
        output = functional_call(network, state, (batch.image,))
        return loss.function(output, batch, weights), count(output, batch), *(output.features or ())

    def step_all(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch) -> tuple[Tensor, ...]:
        # Images of four dimensions are the same for all.
        own = 0 if batch.image.ndim == 5 else None
        of_batch = Batch(*(None if each is None else own for each in batch))  # type: ignore[arg-type]
        with precision_context(device, precision), SideBySide():
            return vmap(step_one, in_dims=(0, 0, of_batch))((params, buffers), coefficients, batch)

    return step_all
