"""Batch renormalization: batch normalization that drifts from batch statistics to running statistics."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class BatchRenorm(nn.Module):
    """Normalize each channel by its batch, corrected towards the running statistics within growing limits.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv:1702.03275, Algorithm 1; the limits and their ramps are those of its section 4.
    Differs: running statistics follow with momentum 0.1 instead of 0.01, as short trainings of a search have a few
        hundred steps.

    Args:
        channels: Channels of the input and of the output.
        r_limit: The scale correction is at last clipped to [1 / r_limit, r_limit].
        d_limit: The shift correction is at last clipped to [-d_limit, d_limit].
        warmup_steps: Until then there is no correction: batch normalization.
        r_ramp_steps: How many steps the limit of the scale takes from 1 to `r_limit`.
        d_ramp_steps: How many steps the limit of the shift takes from 0 to `d_limit`.

    >>> BatchRenorm(3)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor
    momentum = 0.1
    eps = 1e-5

    def __init__(
        self,
        channels: int,
        *,
        r_limit: float = 3.0,
        d_limit: float = 5.0,
        warmup_steps: int = 5_000,
        r_ramp_steps: int = 35_000,
        d_ramp_steps: int = 20_000,
    ) -> None:
        super().__init__()
        self.r_limit, self.d_limit = r_limit, d_limit
        self.warmup_steps, self.r_ramp_steps, self.d_ramp_steps = warmup_steps, r_ramp_steps, d_ramp_steps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

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
        steps = self.num_batches_tracked
        r_max = 1 + (self.r_limit - 1) * ((steps - self.warmup_steps) / self.r_ramp_steps).clamp(0, 1)
        d_max = self.d_limit * ((steps - self.warmup_steps) / self.d_ramp_steps).clamp(0, 1)
        variance, mean = torch.var_mean(x.to(self.running_mean.dtype), dim=(0, 2, 3), correction=0)
        std = (variance + self.eps).sqrt()
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        # Not lerp_: torch.vmap has no rule for it (torch 2.13) and would go through the members one by one.
        self.running_mean.add_(self.momentum * (mean - self.running_mean))
        self.running_std.add_(self.momentum * (std - self.running_std))
        self.num_batches_tracked.add_(1)
        return r, d
