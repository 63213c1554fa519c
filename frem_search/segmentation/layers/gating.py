"""What is let through a skip connection: gates on pixels, and the mask of a doubtful answer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.errors import ParameterError


class PixelGate(nn.Module):
    """Rescale each pixel by a gate computed from the mean of its and its neighbours' channels.

    Source: "Regularize Network Skip Connections by Gating Mechanisms for Electron Microscopy Image Segmentation",
        section 3.2, eq. 1.
    Differs: the gate is computed in single precision under autocast too. The convolution is 3x3, as all of the paper's
        are, and has no bias, as in its authors' program.

    >>> PixelGate()(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` with every pixel scaled into (0, 1) of itself."""
        # As in SqueezeExcite: a gate near 1 would be rounded to 1.
        with torch.autocast(x.device.type, enabled=False):
            gate = torch.sigmoid(self.conv(x.mean(dim=1, keepdim=True, dtype=self.conv.weight.dtype)))
        return x * gate.to(x.dtype)


class ConfidenceMask(nn.Module):
    """1 where an answer in [-1, 1] is undecided, 0 where it is certain.

    The exponent is a buffer, so that trials that differ in it have the same shapes and the same code.

    Source: "Regularize Network Skip Connections by Gating Mechanisms for Electron Microscopy Image Segmentation",
        section 3.3, eq. 2.
    Differs: exponents below 1, whose gradient is infinite where the answer is certain, are refused.

    Args:
        gamma: The exponent; the larger it is, the less doubt is let through.

    >>> ConfidenceMask(gamma=3.0)(torch.tensor([-1.0, 0.0, 0.5]))  # (3/4) ** 3
    tensor([0.0000, 1.0000, 0.4219])
    """

    gamma: Tensor

    def __init__(self, gamma: float) -> None:
        super().__init__()
        # Kept in single precision, where a larger exponent would be infinite; a NaN fails the comparison too.
        if not 1 <= gamma <= torch.finfo(torch.float32).max:
            raise ParameterError(name="gamma", expected="a finite exponent of at least 1", got=gamma)
        self.register_buffer("gamma", torch.tensor(gamma, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the mask of answers `x`, in single precision at least."""
        # bfloat16 has 8 bits: near 1, where the mask ends, every answer would be one of a few.
        x = x if x.element_size() >= 4 else x.float()
        # Clamped as a kernel's tanh may be rounded past 1, and no root of a negative number is real.
        return (1 - x.square()).clamp(min=0) ** self.gamma
