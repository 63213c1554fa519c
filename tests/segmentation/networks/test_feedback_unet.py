import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.special import expit, softmax
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frem_search.errors import ParameterError
from frem_search.segmentation.batch import Batch
from frem_search.segmentation.layers.conv_lstm import ConvLSTM
from frem_search.segmentation.layers.recurrent_conv import RecurrentConv
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.networks import build_network, network_params

SMALL = {"base_channels": 4, "depth": 2}
MEMORIES = {"conv_lstm": ConvLSTM, "recurrent_conv": RecurrentConv}
# Which convolution of which level stands at a letter: the encoder's levels are 0 to 2, the decoder's deepest is 0.
PLACES = {
    "a": ["encoder.0.0"],
    "b": ["encoder.0.1"],
    "c": ["encoder.2.0", "encoder.2.1"],
    "d": ["decoder.1.0"],
    "e": ["decoder.1.1"],
}
LETTERS = {**{letter: letter for letter in PLACES}, "abde": "abde", "full": "abcde"}


def images(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def convolved(x, weight):
    """A convolution of 3x3 with zeros around the image, by SciPy."""
    maps = [
        [sum(correlate(c, w, mode="constant") for c, w in zip(each, of, strict=True)) for of in weight] for each in x
    ]
    return np.array(maps)


def build(**params):
    return build_network("feedback_unet", in_channels=1, n_classes=3, seed=0, params={**SMALL, **params})


def inputs_of(module):
    """What a module is called with from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    return seen


class ByHand:
    """Shi et al., eq. 3 without peepholes, one product for each letter of its subscripts."""

    def __init__(self, layer):
        k, c = layer.out_channels, layer.in_channels
        weight, bias = layer.gates.weight.detach().numpy(), layer.bias.detach().numpy()
        self.x, self.h, self.b = {}, {}, {}
        for row, gate in enumerate("fioc"):
            rows = slice(row * k, (row + 1) * k)
            self.x[gate], self.h[gate] = weight[rows, :c], weight[rows, c:]
            self.b[gate] = bias[rows][:, None, None]

    def step(self, x, hidden, cell):
        z = {g: convolved(x, self.x[g]) + convolved(hidden, self.h[g]) + self.b[g] for g in "fioc"}
        cell = expit(z["f"]) * cell + expit(z["i"]) * np.tanh(z["c"])
        return expit(z["o"]) * np.tanh(cell), cell


@pytest.fixture
def lstm():
    layer = ConvLSTM(2, 3).double()
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    return layer


def test_conv_lstm_equals_its_equations_from_zeros_on(lstm):
    by_hand, state = ByHand(lstm), None
    expected = (np.zeros((2, 3, 5, 6)), np.zeros((2, 3, 5, 6)))
    for step in range(3):
        x = images(2, 2, 5, 6, seed=step)
        output, state = lstm(x, state)
        expected = by_hand.step(x.numpy(), *expected)
        assert output is state[0]
        for ours, theirs in zip(state, expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)


def test_no_state_is_a_state_of_zeros_and_so_is_its_gradient(lstm):
    x = images(2, 2, 5, 6).requires_grad_()
    gradients = []
    for state in (None, (torch.zeros(2, 3, 5, 6).double(), torch.zeros(2, 3, 5, 6).double())):
        hidden, (_, cell) = lstm(x, state)
        gradients.append(torch.autograd.grad((hidden + cell**2).sum(), [x, *lstm.parameters()]))
    for of_none, of_zeros in zip(*gradients, strict=True):
        torch.testing.assert_close(of_none, of_zeros, rtol=0, atol=1e-12)


def test_first_step_computes_neither_forget_gate_nor_hidden_columns(lstm):
    with FlopCounterMode(display=False) as first:
        _, state = lstm(images(1, 2, 5, 6))
    with FlopCounterMode(display=False) as later:
        lstm(images(1, 2, 5, 6), state)
    assert first.get_total_flops() == 2 * 9 * (2 * 9) * 30  # outputs, inputs times taps, pixels
    assert later.get_total_flops() == 2 * 12 * (5 * 9) * 30


def test_conv_lstm_keeps_its_cell_at_first():
    layer = ConvLSTM(2, 3)
    assert layer.bias.tolist() == [1.0] * 3 + [0.0] * 9


def test_conv_lstm_stays_in_half_precision_under_autocast():
    layer = ConvLSTM(2, 3)
    x = images(2, 2, 5, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = layer(x)
        hidden, (_, cell) = layer(x, state)
    expected, _ = layer(x, layer(x)[1])
    assert (hidden.dtype, cell.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(hidden.float(), expected, rtol=0, atol=1e-2)


def test_rounds_are_the_image_with_zeros_and_the_image_with_the_first_rounds_probabilities():
    network = build()
    seen = inputs_of(network.encoder[0][0])
    x = images(2, 1, 8, 12).float()
    output = network(x)
    (first, _, first_time), (second, _, second_time) = seen
    assert (first_time, second_time) == (0, 1)
    assert torch.equal(first, torch.cat([x, torch.zeros(2, 3, 8, 12)], dim=1))
    assert torch.equal(second[:, :1], x)
    probs = softmax(output.auxiliary.detach().double().numpy(), axis=1)
    np.testing.assert_allclose(second[:, 1:].detach().numpy(), probs, rtol=0, atol=1e-6)


def test_probabilities_alone_take_the_image_from_the_second_round_and_nothing_else():
    network, usual = build(image_in_second_round=False), build()
    seen = inputs_of(network.encoder[0][0])
    x = images(2, 1, 8, 12).float()
    output, of_usual = network(x), usual(x)
    first, second = (inputs[0] for inputs in seen)
    assert torch.equal(first, torch.cat([x, torch.zeros(2, 3, 8, 12)], dim=1))
    assert torch.equal(second[:, :1], torch.zeros_like(x))
    probs = softmax(output.auxiliary.detach().double().numpy(), axis=1)
    np.testing.assert_allclose(second[:, 1:].detach().numpy(), probs, rtol=0, atol=1e-6)
    assert torch.equal(output.auxiliary, of_usual.auxiliary)
    assert (output.logits - of_usual.logits).abs().max() > 1e-2


def test_probabilities_alone_are_all_that_a_network_without_memory_gets():
    network = build(memory="none", image_in_second_round=False).eval()
    x = images(2, 1, 8, 12).float()
    # With a head that answers the same everywhere, the first round tells nothing of the image.
    nn.init.zeros_(network.head.weight)
    seen = inputs_of(network.head)
    for each in (x, x.flip(0) + 1):
        network(each)
    (one_first,), (one_second,), (other_first,), (other_second,) = seen
    assert not torch.equal(one_first, other_first)
    assert torch.equal(one_second, other_second)


@pytest.mark.parametrize("memory", ["conv_lstm", "recurrent_conv", "none"])
def test_auxiliary_logits_are_the_first_rounds_and_logits_the_seconds(memory):
    network = build(memory=memory)
    logits = []
    network.head.register_forward_hook(lambda _, __, output: logits.append(output))
    output = network(torch.zeros(2, 1, 7, 9))
    assert torch.equal(output.auxiliary, logits[0][:, :, :7, :9])
    assert torch.equal(output.logits, logits[1][:, :, :7, :9])
    assert network.eval()(torch.zeros(2, 1, 7, 9)).auxiliary is None


@pytest.mark.parametrize("memory", ["conv_lstm", "recurrent_conv", "none"])
def test_fed_back_probabilities_change_the_second_round(memory):
    network = build(memory=memory)
    x, bias = images(2, 1, 8, 8).float(), torch.tensor([2.0, 0.0, -2.0])
    before = network(x)
    with torch.no_grad():
        network.head.bias += bias  # other probabilities, and nothing else of the first round
    after = network(x)
    torch.testing.assert_close(after.auxiliary, before.auxiliary + bias[:, None, None])
    assert (after.logits - before.logits - bias[:, None, None]).abs().max() > 1e-2


def test_gradients_of_the_second_round_flow_through_the_probabilities():
    network = build(memory="none").double()
    seen, answers = inputs_of(network.encoder[0][0]), []
    network.head.register_forward_hook(lambda _, __, output: answers.append(output))
    loss = network(images(2, 1, 8, 8)).logits.square().sum()
    through, of_input = torch.autograd.grad(loss, [answers[0], seen[1][0]])
    p, g = seen[1][0][:, 1:].detach(), of_input[:, 1:]
    assert through.abs().max() > 1e-6
    torch.testing.assert_close(through, p * (g - (p * g).sum(dim=1, keepdim=True)))  # the softmax's own gradient


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_was_remembered_changes_the_second_round_and_has_a_gradient(memory):
    network = build(memory=memory, lstm_at="a").double()
    layer, remembered = network.encoder[0][0], []
    x = images(2, 1, 8, 8)
    watch = layer.register_forward_pre_hook(lambda _, inputs: remembered.append(inputs[1].get(layer)))
    logits = network(x).logits
    watch.remove()
    assert remembered[0] is None
    state = remembered[1] if isinstance(remembered[1], tuple) else (remembered[1],)
    for gradient in torch.autograd.grad(logits.square().sum(), state):
        assert gradient.abs().max() > 1e-6
    layer.register_forward_pre_hook(lambda _, inputs: inputs[1].clear())
    assert (network(x).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("memory", ["conv_lstm", "recurrent_conv", "none"])
def test_both_rounds_use_the_same_convolutions_and_each_its_own_normalization(memory):
    network = build(memory=memory)
    calls = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    network(images(2, 1, 8, 8).float())
    convolutions = [name for name, each in network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    norms = [name for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)]
    # Of a convolutional LSTM the weights are taken, and the layer is called; of a recurrent one, `recur` in round two.
    expected = {name: 0 if name.endswith("gates") else 1 if name.endswith("recur") else 2 for name in convolutions}
    assert {name: calls.get(name, 0) for name in convolutions} == expected
    assert [calls.get(name) for name in norms] == [1] * (2 * 10)
    assert {name: calls[name] for name, each in network.named_modules() if isinstance(each, ConvLSTM)} == dict.fromkeys(
        [f"{place}.conv" for places in PLACES.values() for place in places] if memory == "conv_lstm" else [], 2
    )


@pytest.mark.parametrize("memory", ["conv_lstm", "recurrent_conv", "none"])
def test_statistics_of_the_rounds_are_separate(memory):
    network = build(memory=memory)
    layer, seen = network.encoder[0][0], []
    norms = layer.conv.norms if memory == "recurrent_conv" else layer.norms
    for index, norm in enumerate(norms):
        norm.register_forward_pre_hook(lambda _, inputs, index=index: seen.append((index, inputs[0].detach())))
    network(images(2, 1, 8, 8).float())
    assert [index for index, _ in seen] == [0, 1]
    for norm, (_, x) in zip(norms, seen, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
        assert norm.num_batches_tracked == 1
    assert (norms[0].running_mean - norms[1].running_mean).abs().max() > 1e-3


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("lstm_at", LETTERS)
def test_memory_stands_where_the_letters_say_and_nowhere_else(memory, lstm_at):
    network = build(memory=memory, lstm_at=lstm_at)
    found = {name for name, each in network.named_modules() if isinstance(each, MEMORIES[memory])}
    assert found == {f"{place}.conv" for letter in LETTERS[lstm_at] for place in PLACES[letter]}


def test_every_location_is_offered():
    assert set(network_params("feedback_unet")["lstm_at"].annotation.__args__) == set(LETTERS)


def test_the_full_model_has_six_conv_lstms_at_the_highest_and_lowest_resolution():
    network = build()
    sizes = []
    for each in network.modules():
        if isinstance(each, ConvLSTM):
            each.register_forward_hook(lambda _, __, output: sizes.append(tuple(output[0].shape[2:])))
    network.eval()(torch.zeros(1, 1, 16, 24))
    assert sizes == [(16, 24), (16, 24), (4, 6), (4, 6), (16, 24), (16, 24)] * 2


@pytest.mark.parametrize("lstm_at", LETTERS)
def test_without_memory_the_location_is_without_effect(lstm_at):
    plain, same = build(memory="none"), build(memory="none", lstm_at=lstm_at)
    x = images(2, 1, 8, 8).float()
    assert torch.equal(plain(x).logits, same(x).logits)


def test_the_loss_reaches_the_first_round_by_its_weight():
    network = build(memory="none").double()
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 8, 8)).astype(np.uint8))
    of_first = network.encoder[0][0].norms[0].weight

    def gradients(weight, *, is_cut):
        output = network(images(2, 1, 8, 8))
        # Cut from the second round, only the auxiliary loss can reach what the first round alone has.
        output = output._replace(logits=output.logits.detach()) if is_cut else output
        batch = Batch(images(2, 1, 8, 8), label)
        loss = LOSSES["softmax_cross_entropy"].function(output, batch, {"lambda": torch.tensor(weight)})
        return torch.autograd.grad(loss, of_first)[0]

    assert gradients(0.3, is_cut=True).abs().max() > 1e-6
    torch.testing.assert_close(gradients(0.6, is_cut=True), 2 * gradients(0.3, is_cut=True))
    assert not torch.allclose(gradients(0.3, is_cut=False), gradients(0.3, is_cut=True))


def test_default_sizes_are_the_papers():
    assert {name: each.default for name, each in network_params("feedback_unet").items()} == {
        "base_channels": 8,
        "depth": 4,
        "memory": "conv_lstm",
        "image_in_second_round": True,
        "lstm_at": "full",
    }
    network = build_network("feedback_unet", in_channels=1, n_classes=4, seed=0, params={}, device="meta")
    assert [block[1].norms[0].num_features for block in network.encoder] == [8, 16, 32, 64, 128]
    assert sum(each.numel() for each in network.parameters()) == 2_349_636


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("memory", "gru", "'conv_lstm' or 'recurrent_conv' or 'none'"),
        ("lstm_at", "ab", "'a' or 'b' or 'c' or 'd' or 'e' or 'abde' or 'full'"),
        ("base_channels", 0, "at least 1"),
        ("depth", 0, "at least 1"),
    ],
)
def test_wrong_value_says_what_was_expected(key, value, expected):
    with pytest.raises(ParameterError, match=f"{key}: expected {expected}, but got {value!r}"):
        build(**{key: value})


def test_padding_repeats_the_last_row_and_column():
    network = build().eval()
    x = images(1, 1, 6, 7).float()
    padded = nn.functional.pad(x, (0, 1, 0, 2), mode="replicate")
    assert torch.equal(network(x).logits, network(padded).logits[:, :, :6, :7])


def test_one_tiny_image_cannot_be_trained_on():
    network = build()
    with pytest.raises(ParameterError, match="batch_size: expected at least 2 for training on images of 4x4 pixels"):
        network(torch.zeros(1, 1, 4, 4))
    assert network.eval()(torch.zeros(1, 1, 4, 4)).logits.shape == (1, 3, 4, 4)
