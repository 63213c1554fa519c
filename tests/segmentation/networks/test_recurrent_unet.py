import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import nn

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.recurrent_conv import RecurrentConv
from frem_search.segmentation.networks import build_network, network_params

SMALL = {"base_channels": 4, "depth": 2}


def images(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def convolved(x, weight):
    """A convolution of 3x3 with zeros around the image, by SciPy."""
    weight = weight.detach().numpy()
    maps = [
        [sum(correlate(c, w, mode="constant") for c, w in zip(each, of, strict=True)) for of in weight] for each in x
    ]
    return np.array(maps)


def normalized(x):
    mean, variance = x.mean(axis=(0, 2, 3), keepdims=True), x.var(axis=(0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5)


def build(**params):
    return build_network("recurrent_unet", in_channels=1, n_classes=3, seed=0, params={**SMALL, **params})


@pytest.mark.parametrize("time_steps", [1, 3])
def test_recurrent_convolution_equals_its_equations(time_steps):
    layer = RecurrentConv(2, 3, time_steps=time_steps).double()
    x = images(2, 2, 5, 6)
    fed = convolved(x.numpy(), layer.feed.weight)
    expected = np.maximum(normalized(fed), 0)
    for _ in range(time_steps):
        expected = np.maximum(normalized(fed + convolved(expected, layer.recur.weight)), 0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-9)


def test_single_steps_with_the_same_input_are_the_layer():
    whole, single = (RecurrentConv(2, 3, time_steps=2).double() for _ in range(2))
    single.load_state_dict(whole.state_dict())
    x, state = images(2, 2, 5, 6), None
    for time in range(3):
        state = single.step(x, state, time=time)
    torch.testing.assert_close(state, whole(x))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], value)


def test_single_steps_take_another_input_at_each_time():
    layer = RecurrentConv(2, 3, time_steps=1).double()
    first, second = images(2, 2, 5, 6), images(2, 2, 5, 6, seed=1)
    state = np.maximum(normalized(convolved(first.numpy(), layer.feed.weight)), 0)
    expected = convolved(second.numpy(), layer.feed.weight) + convolved(state, layer.recur.weight)
    states = layer.step(second, layer.step(first, None, time=0), time=1)
    np.testing.assert_allclose(states.detach().numpy(), np.maximum(normalized(expected), 0), rtol=0, atol=1e-9)


def test_each_time_has_statistics_of_its_own():
    layer = RecurrentConv(2, 3, time_steps=2).double()
    sums = []
    for norm in layer.norms:
        norm.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0].detach()))
    layer(images(2, 2, 5, 6))
    assert len(sums) == 3
    for norm, seen in zip(layer.norms, sums, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean(dim=(0, 2, 3)))
        assert norm.num_batches_tracked == 1


def test_no_recurrence_is_an_error():
    with pytest.raises(ParameterError, match="time_steps: expected at least 1, but got 0"):
        build(time_steps=0)


def test_every_convolution_of_the_unet_is_recurrent():
    network = build(time_steps=3)
    layers = [each for each in network.modules() if isinstance(each, RecurrentConv)]
    assert [len(layer.norms) for layer in layers] == [4] * 2 * 5  # levels: two and the bottleneck down, two up
    within = {id(conv) for layer in layers for conv in layer.modules() if isinstance(conv, nn.Conv2d)}
    assert [conv for conv in network.modules() if isinstance(conv, nn.Conv2d) and id(conv) not in within] == [
        network.head
    ]


def test_sizes_and_time_steps_are_those_of_the_feedback_paper_by_default():
    assert {name: each.default for name, each in network_params("recurrent_unet").items()} == {
        "base_channels": 8,
        "depth": 4,
        "time_steps": 2,
    }
    with torch.device("meta"):
        network = build_network("recurrent_unet", in_channels=1, n_classes=3, seed=0, params={}, device="meta")
    assert [block[1].recur.out_channels for block in network.encoder] == [8, 16, 32, 64, 128]
    assert sum(each.numel() for each in network.parameters()) == 980_003


def test_there_is_no_auxiliary_output():
    assert build()(torch.zeros(2, 1, 8, 8)).auxiliary is None


@pytest.mark.parametrize(("key", "value"), [("base_channels", 0), ("depth", 0)])
def test_sizes_that_are_too_small_are_errors(key, value):
    with pytest.raises(ParameterError, match=f"{key}: expected at least 1, but got {value}"):
        build(**{key: value})


def test_one_tiny_image_cannot_be_trained_on():
    network = build()
    with pytest.raises(ParameterError, match="batch_size: expected at least 2 for training on images of 4x4 pixels"):
        network(torch.zeros(1, 1, 4, 4))
    assert network.eval()(torch.zeros(1, 1, 4, 4)).logits.shape == (1, 3, 4, 4)
