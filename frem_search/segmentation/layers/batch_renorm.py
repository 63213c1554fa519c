"""Batch renormalization: batch normalization that is drawn from batch statistics to running statistics."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Of a training, if the layer follows its length: how much of it the limits take to open, and how much of it the running
# statistics remember. Keras's layer has a momentum of 0.99, a memory of 100 steps.
OPENING, MOST_OPENING = 0.05, 100
MEMORY, LEAST_MEMORY, MOST_MEMORY = 0.01, 10, 100


class BatchRenorm(nn.Module):
    """Normalize each channel by its batch, corrected towards the running statistics within growing limits.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv:1702.03275, Algorithm 1; the limits and their ramps are those of its section 4.
    Differs: running statistics follow with momentum 0.1 instead of 0.01, as short trainings of a search have a few
        hundred steps. With `follows_length` ramps and momentum are shares of the training.

    Args:
        channels: Channels of the input and of the output.
        r_limit: The scale correction is at last clipped to [1 / r_limit, r_limit].
        d_limit: The shift correction is at last clipped to [-d_limit, d_limit].
        warmup_steps: Until then there is no correction: batch normalization.
        r_ramp_steps: How many steps the limit of the scale takes from 1 to `r_limit`.
        d_ramp_steps: How many steps the limit of the shift takes from 0 to `d_limit`.
        follows_length: Whether `follow` replaces the ramps and the momentum.

    >>> BatchRenorm(3)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor
    limits: Tensor
    momentum: Tensor
    eps = 1e-5

    def __init__(
        self,
        channels: int,
        *,
        r_limit: float = 3.0,
        d_limit: float = 5.0,
        warmup_steps: int | float = 5_000,
        r_ramp_steps: int | float = 35_000,
        d_ramp_steps: int | float = 20_000,
        follows_length: bool = False,
    ) -> None:
        super().__init__()
        self.follows_length = follows_length
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # Tensors, so that the members of a stack may differ in them; they belong to a training, not to its weights.
        limits = torch.tensor([r_limit, d_limit, warmup_steps, r_ramp_steps, d_ramp_steps])
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("momentum", torch.tensor(0.1), persistent=False)

    @classmethod
    def unlimited(cls, channels: int) -> "BatchRenorm":
        """Return a layer whose corrections are never clipped: running statistics normalize, in training as in test."""
        boundless = 1e30  # an infinite limit times an opening of zero would be no number
        return cls(
            channels, r_limit=boundless, d_limit=boundless, warmup_steps=-1, r_ramp_steps=1e-9, d_ramp_steps=1e-9
        )

    def follow(self, n_steps: int) -> None:
        """Let limits open and statistics follow by the length of a training, so that a short one leaves the warm-up.

        Args:
            n_steps: Of the whole training.
        """
        if self.follows_length:
            opening = min(MOST_OPENING, max(1, round(OPENING * n_steps)))
            self.limits[2:] = torch.tensor([0.0, opening, opening])
            self.momentum.fill_(1 / min(MOST_MEMORY, max(LEAST_MEMORY, MEMORY * n_steps)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` normalized, by its batch in training and by the running statistics in test."""
        if not self.training:
            variance = self.running_std.square()
            return nn.functional.batch_norm(
                x, self.running_mean, variance, self.weight, self.bias, training=False, eps=0.0
            )
        r, d = self.correct(x.detach())
        # y = weight * (x_hat * r + d) + bias is batch normalization with another weight and bias; r and d are constants
        # to the gradient, so that its backward pass is the algorithm's.
        return nn.functional.batch_norm(
            x, None, None, self.weight * r, self.weight * d + self.bias, training=True, momentum=0.0, eps=self.eps
        )

    @torch.no_grad()
    def correct(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Return the corrections r and d of a batch and let the running statistics follow it."""
        r_limit, d_limit, warmup, r_ramp, d_ramp = self.limits.unbind()
        steps = self.num_batches_tracked - warmup
        r_max = 1 + (r_limit - 1) * (steps / r_ramp).clamp(0, 1)
        d_max = d_limit * (steps / d_ramp).clamp(0, 1)
        variance, mean = torch.var_mean(x.to(self.running_mean.dtype), dim=(0, 2, 3), correction=0)
        std = (variance + self.eps).sqrt()
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        # Not lerp_: torch.vmap has no rule for it (torch 2.13) and would go through the members one by one.
        self.running_mean.add_(self.momentum * (mean - self.running_mean))
        self.running_std.add_(self.momentum * (std - self.running_std))
        self.num_batches_tracked.add_(1)
        return r, d
