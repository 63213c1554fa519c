"""The recurrent convolutional layer: a convolution whose output is convolved and added to it again."""

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError


class RecurrentConv(nn.Module):
    """Convolve the input and the state before, add both, normalize, ReLU; the result is the next state.

    Source: Liang and Hu, "Recurrent Convolutional Neural Network for Object Recognition", CVPR 2015, eq. 1 and 2; as
        part of a U-Net: Alom et al., "Recurrent Residual Convolutional Neural Network based on U-Net (R2U-Net) for
        Medical Image Segmentation", arXiv:1802.06955, eq. 1 and 2 and Fig. 3.
    Differs: batch normalization of the sum instead of local response normalization after ReLU, and so no bias. Each
        time has a normalization of its own, because features grow with time: shared running statistics would fit
        none of them (Cooijmans et al., "Recurrent Batch Normalization", arXiv:1603.09025, section 3).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the state, which is the output.
        time_steps: How often the state is convolved after the first convolution of the input, at time 0.

    >>> RecurrentConv(3, 8, time_steps=2)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, time_steps: int = 2) -> None:
        super().__init__()
        if time_steps < 1:
            raise ParameterError(name="time_steps", expected="at least 1", got=time_steps)
        self.feed = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.recur = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(time_steps + 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return the state after all time steps, the input being the same at each."""
        fed = self.feed(x)
        state = torch.relu(self.norms[0](fed))
        for norm in islice(self.norms, 1, None):
            state = torch.relu(norm(fed + self.recur(state)))
        return state

    def step(
        self, x: Float[Tensor, "b c h w"], state: Float[Tensor, "b k h w"] | None, *, time: int
    ) -> Float[Tensor, "b k h w"]:
        """Return the state after one time step, for inputs that differ between times.

        Args:
            x: The input at this time.
            state: What the step before returned; None at the first, before which it is zero.
            time: 0 to `time_steps`.
        """
        z = self.feed(x) if state is None else self.feed(x) + self.recur(state)
        return torch.relu(self.norms[time](z))
