"""The convolutional LSTM: a convolution that remembers what it made of the inputs before."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

State = tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k h w"]]


class ConvLSTM(nn.Module):
    """One step of a long short-term memory whose products with matrices are 3x3 convolutions.

    Source: Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting",
        arXiv:1506.04214, eq. 3, where input, hidden state and cell are X, H and C.
    Differs: no peepholes from the cell to the gates: their weights would fit images of one size only, and Keras, which
        "Feedback U-Net for Cell Image Segmentation" was written in, has none. As in Keras the forget gate's bias begins
        at 1, so that the cell is kept at first, and the other biases at 0.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the hidden state, which is the output, and of the cell.

    >>> layer = ConvLSTM(3, 8)
    >>> hidden, state = layer(torch.zeros(2, 3, 16, 16))
    >>> hidden, state = layer(torch.zeros(2, 3, 16, 16), state)
    >>> hidden.shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        # Rows: forget gate, input gate, output gate, candidate. Columns: input, hidden state.
        self.gates = nn.Conv2d(in_channels + out_channels, 4 * out_channels, kernel_size=3, padding=1, bias=False)
        self.bias = nn.Parameter(torch.cat([torch.ones(out_channels), torch.zeros(3 * out_channels)]))

    def forward(
        self, x: Float[Tensor, "b c h w"], state: State | None = None
    ) -> tuple[Float[Tensor, "b k h w"], State]:
        """Return the output, in (-1, 1), and the state for the next step.

        Args:
            x: This step's input.
            state: Hidden state and cell after the step before; None for the first step, before which both are zero.
        """
        weight, bias = self.gates.weight, self.bias
        if state is None:
            # Zeros add nothing to the gates, and there is nothing to forget: exact, and half of the work.
            rows, columns = slice(self.out_channels, None), slice(self.in_channels)
            i, o, g = _split(nn.functional.conv2d(x, weight[rows, columns], bias[rows], padding=1), n=3)
            cell = torch.sigmoid(i) * torch.tanh(g)
        else:
            hidden, cell = state
            x = torch.cat([x, hidden], dim=1)
            f, i, o, g = _split(nn.functional.conv2d(x, weight, bias, padding=1), n=4)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return hidden, (hidden, cell)


def _split(gates: Float[Tensor, "b nk h w"], *, n: int) -> tuple[Tensor, ...]:
    """Return the gates, copied: of a slice of few channels, the CPU's tanh would take the numbers one by one."""
    return tuple(gate.clone() for gate in gates.chunk(n, dim=1))
