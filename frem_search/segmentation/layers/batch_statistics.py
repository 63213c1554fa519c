"""Normalization by what is in the batch, in training and in test."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class BatchStatistics(nn.Module):
    """Normalize each channel by its batch in training, and by each image alone in test.

    A network that is left in training mode does so where images are predicted one by one.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, Algorithm 1, without running statistics.
    Differs: in test a batch is one image, so that a prediction does not depend on what is predicted beside it.

    Args:
        channels: Channels of the input and of the output.

    >>> layer = BatchStatistics(1).eval()
    >>> [round(value, 3) for value in layer(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist()]
    [-1.0, 1.0]
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` with mean 0 and variance 1 in each channel, then scaled and shifted."""
        if self.training:
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return nn.functional.instance_norm(x, None, None, self.weight, self.bias, eps=self.eps)
