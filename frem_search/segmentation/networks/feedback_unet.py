"""Feedback U-Net: its own class probabilities, fed back to the input, and layers that remember the first round."""

from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.layers.conv_lstm import ConvLSTM
from frem_search.segmentation.layers.recurrent_conv import RecurrentConv
from frem_search.segmentation.layers.up_conv import UpConv
from frem_search.segmentation.networks.levels import decode, encode
from frem_search.segmentation.networks.shapes import check_images, check_sizes, pad
from frem_search.segmentation.output import Output

N_ROUNDS = 2
Memory = dict[nn.Module, Any]  # what each layer remembers of the round before; empty in the first


class FeedbackUNet(nn.Module):
    """U-Net that is run twice with the same weights, its answer of the first round being an input of the second.

    A round's input has the image's channels and a probability map for each class. In the first round the maps are zero;
    in the second they are the first one's answer, beside the image or, if asked for, alone. Gradients of the second
    round flow through the probabilities and through what was remembered. Logits are those of the second round; in
    training the auxiliary logits are those of the first.

    Source: Shibuya and Hotta, "Feedback U-Net for Cell Image Segmentation", CVPR Workshops 2020, sections 3.1, 4.2 and
        4.5.
    Differs: section 3.1 feeds the result of the first round "back to input layer" and calls it the input of the second.
        Here that is the image and the result, since the same convolutions take the image in the first round, with zeros
        in the result's place. ``image_in_second_round=False`` reads the sentence by its letter: the result alone, with
        zeros in the image's place, so that what else the second round knows of the image is what was remembered. The
        text does not say which convolutions stand at Fig. 4's locations. Sections 3.1 and 4.4 call a, b, d and
        e those of the highest resolution and a the first one, so a and b are the encoder's two convolutions there, d
        and e the decoder's. Table 3 sets "a, b, d, e" against c and the full model, which has six; so c is both
        convolutions of the bottleneck, alone as in the full model. A convolutional LSTM keeps its tanh; normalization
        of the round and ReLU follow it as they follow a convolution (section 4.4). Section 2.2 says that RU-Net's
        layers, fed back, would treat the rounds independently; "recurrent_conv" carries the state from the first to the
        second instead, one time step a round, so that it is the LSTM without gates.

    Args:
        in_channels: Channels of the images.
        n_classes: Classes of the labels, background included.
        base_channels: Feature maps of the first level; every level below has twice as many.
        depth: How often height and width are halved.
        memory: What remembers the first round; with "none" only the probabilities do.
        image_in_second_round: Whether the second round is shown the image again, beside the probabilities.
        lstm_at: Which convolutions `memory` replaces, by the letters of Fig. 4; "full" are all five.

    >>> FeedbackUNet(1, 3).eval()(torch.zeros(2, 1, 50, 70)).logits.shape
    torch.Size([2, 3, 50, 70])
    """

    image_share: Tensor
    N_CLASSES: ClassVar[int | None] = None  # any number

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        *,
        base_channels: int = 8,
        depth: int = 4,
        memory: Literal["conv_lstm", "recurrent_conv", "none"] = "conv_lstm",
        image_in_second_round: bool = True,
        lstm_at: Literal["a", "b", "c", "d", "e", "abde", "full"] = "full",
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=(in_channels, 1), n_classes=(n_classes, 2), base_channels=(base_channels, 1), depth=(depth, 1)
        )
        block = partial(_Block, memory=LAYERS[memory], locations="abcde" if lstm_at == "full" else lstm_at)
        widths = [base_channels * 2**level for level in range(depth + 1)]
        levels = list(pairwise(reversed(widths)))
        between = ["--"] * (depth - 1)
        self.in_channels = in_channels
        self.n_classes = n_classes
        self.depth = depth
        # A tensor, so that members of a stack may differ in it; the constructor's arguments bring it back, not a file.
        self.register_buffer("image_share", torch.tensor(float(image_in_second_round)), persistent=False)
        self.encoder = nn.ModuleList(
            block(narrow, wide, letters=letters)
            for (narrow, wide), letters in zip(
                pairwise([in_channels + n_classes, *widths]), ["ab", *between, "cc"], strict=True
            )
        )
        self.up_convs = nn.ModuleList(UpConv(wide, narrow) for wide, narrow in levels)
        self.decoder = nn.ModuleList(
            block(2 * narrow, narrow, letters=letters)
            for (_, narrow), letters in zip(levels, [*between, "de"], strict=True)
        )
        self.head = nn.Conv2d(base_channels, n_classes, kernel_size=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Output:
        """Return logits of the second round at the size of `x`; in training also those of the first."""
        check_images(x, in_channels=self.in_channels, scale=2**self.depth, is_training=self.training)
        height, width = x.shape[2:]
        x = pad(x, multiple=2**self.depth)
        memory: Memory = {}
        nothing = x.new_zeros(x.shape[0], self.n_classes, *x.shape[2:])
        first = self._run(torch.cat([x, nothing], dim=1), memory, round_=0)
        shown = (x * self.image_share).to(x.dtype)
        second = self._run(torch.cat([shown, first.softmax(dim=1)], dim=1), memory, round_=1)
        auxiliary = first[:, :, :height, :width] if self.training else None
        return Output(second[:, :, :height, :width], auxiliary)

    @torch.inference_mode()
    def inspect(self, x: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b h w"]]:
        """Return what is worth to be seen beside a prediction: the sum of the first layer's maps in the second round.

        Source: "Feedback U-net for Cell Image Segmentation", Fig. 8.
        """
        seen: list[Tensor] = []
        first_layer = next(self.encoder[0].children())
        watch = first_layer.register_forward_hook(lambda _layer, _inputs, maps: seen.append(maps))
        try:
            self(x)
        finally:
            watch.remove()
        height, width = x.shape[2:]
        return {"second_round_sums": seen[-1].sum(dim=1)[:, :height, :width]}

    def _run(self, x: Float[Tensor, "b c h w"], memory: Memory, *, round_: int) -> Float[Tensor, "b k h w"]:
        """Return the logits of a round and replace what is remembered."""
        encoder, decoder = (
            [partial(block, memory=memory, round_=round_) for block in blocks]
            for blocks in (self.encoder, self.decoder)
        )
        *skips, bottleneck = encode(x, encoder)
        logits: Tensor = self.head(decode(bottleneck, skips, self.up_convs, decoder))
        return logits


class _Block(nn.ModuleList):
    """A level's two layers; those whose letter is among `locations` remember."""

    def __init__(
        self, in_channels: int, out_channels: int, *, letters: str, memory: type[nn.Module], locations: str
    ) -> None:
        layers = [memory if letter in locations else _Forgetful for letter in letters]
        super().__init__(
            layer(channels, out_channels) for layer, channels in zip(layers, (in_channels, out_channels), strict=True)
        )

    def forward(self, x: Float[Tensor, "b c h w"], memory: Memory, round_: int) -> Float[Tensor, "b k h w"]:
        for layer in self:
            x = layer(x, memory, round_)
        return x


class _Forgetful(nn.Module):
    """A convolution, the normalization of the round, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norms = _norms(out_channels)

    def forward(self, x: Float[Tensor, "b c h w"], memory: Memory, round_: int) -> Float[Tensor, "b k h w"]:  # noqa: ARG002
        return torch.relu(self.norms[round_](self.conv(x)))


class _LongShortTerm(nn.Module):
    """A convolutional LSTM in a convolution's place."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLSTM(in_channels, out_channels)
        self.norms = _norms(out_channels)

    def forward(self, x: Float[Tensor, "b c h w"], memory: Memory, round_: int) -> Float[Tensor, "b k h w"]:
        hidden, memory[self] = self.conv(x, memory.get(self))
        return torch.relu(self.norms[round_](hidden))


class _Recurrent(nn.Module):
    """A recurrent convolutional layer in a convolution's place; its state is normalized and rectified."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = RecurrentConv(in_channels, out_channels, time_steps=N_ROUNDS - 1)

    def forward(self, x: Float[Tensor, "b c h w"], memory: Memory, round_: int) -> Float[Tensor, "b k h w"]:
        state = self.conv.step(x, memory.get(self), time=round_)
        memory[self] = state
        return state


LAYERS: dict[str, type[nn.Module]] = {"conv_lstm": _LongShortTerm, "recurrent_conv": _Recurrent, "none": _Forgetful}


def _norms(channels: int) -> nn.ModuleList:
    """Return a normalization for each round."""
    return nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(N_ROUNDS))
