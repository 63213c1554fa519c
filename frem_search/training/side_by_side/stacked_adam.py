"""Adam for stacked members: PyTorch's own kernel on each member's part of the parameters."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from frem_search.training.member import Member

STATE = ("exp_avg", "exp_avg_sq", "step")


class StackedAdam:
    """The optimizers of members that may differ in learning rate, weight decay and steps done.

    Adam is element-wise, so that each number is the one the member's own optimizer would have come to. Members of one
    learning rate and weight decay are one call.

    Args:
        members: Whose optimizers are continued; only `write_back` changes them.
        params: In the order of `Module.parameters`, the members along the first dimension; changed in place.
    """

    def __init__(self, members: Sequence[Member], params: Sequence[Tensor]) -> None:
        self._members, self._params = members, params
        self._own = [[_state(member.optimizer, each) for each in member.network.parameters()] for member in members]
        self._states = {
            part: [stack([state[part] for state in states]) for states in zip(*self._own, strict=True)]
            for part in STATE
        }
        slots: defaultdict[tuple[float, float], list[int]] = defaultdict(list)
        for slot, member in enumerate(members):
            slots[member.rate, member.weight_decay].append(slot)
        self._slots = list(slots.values())
        self._lists = [_by_slots(values, self._slots) for values in (params, *self._states.values())]

    @torch.no_grad()
    def step(self) -> None:
        """Let all parameters follow their gradients, and forget these."""
        # No parameter is without a gradient: tests/segmentation/networks/test_networks.py holds every network to that.
        grads = _by_slots([each.grad for each in self._params], self._slots)  # type: ignore[misc]
        for slots, of_grads, params, exp_avgs, exp_avg_sqs, steps in zip(self._slots, grads, *self._lists, strict=True):
            group = self._members[slots[0]].optimizer.param_groups[0]
            beta1, beta2 = group["betas"]
            adam(
                params, of_grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
        for each in self._params:
            each.grad = None

    def write_back(self) -> None:
        """Let the members' own optimizers be where this one is."""
        for part, stacked in self._states.items():
            unstack(stacked, [[state[part] for state in states] for states in zip(*self._own, strict=True)])
        for member, states in zip(self._members, self._own, strict=True):
            for parameter, state in zip(member.network.parameters(), states, strict=True):
                member.optimizer.state[parameter] = state


def stack(each: Sequence[Tensor]) -> Tensor:
    """Return a copy of tensors of one shape along a new first dimension, kernels of convolutions channels last."""
    if each[0].ndim == 4:
        # Not torch.stack, whose result of five dimensions would be contiguous.
        return torch.cat([value.detach() for value in each]).unflatten(0, (len(each), -1)).detach()
    return torch.stack([value.detach() for value in each])


@torch.no_grad()
def unstack(stacked: Iterable[Tensor], own: Iterable[Sequence[Tensor]]) -> None:
    """Copy what `stack` made of tensors back into them."""
    # One call, not one for each tensor: an epoch may have a few steps only.
    torch._foreach_copy_(
        [value for each in own for value in each], [part for each in stacked for part in each.unbind()]
    )


def _state(optimizer: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer knows of a parameter, or what it would begin with."""
    if known := optimizer.state.get(parameter):
        return known
    step, like = torch.zeros((), device=parameter.device), parameter.detach()
    return {"step": step, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def _by_slots(stacked: Sequence[Tensor], slots: list[list[int]]) -> list[list[Tensor]]:
    """Return for each group of slots the members' parts of all tensors."""
    parts = [each.detach().unbind() for each in stacked]
    return [[part[slot] for slot in group for part in parts] for group in slots]
