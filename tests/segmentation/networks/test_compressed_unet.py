import numpy as np
import pytest
import torch
from torch import nn

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.up_conv import UpConv
from frem_search.segmentation.networks import NETWORKS, build_network

SMALL = {"base_channels": 4, "depth": 2}


def images(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def build(*, n_classes=3, **params):
    return build_network("compressed_unet", in_channels=1, n_classes=n_classes, seed=0, params=SMALL | params)


def trained(network, *, n_steps=3):
    """Let running statistics and normalizations differ from what they begin with."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(n_steps):
        optimizer.zero_grad()
        x = images(4, 1, 16, 24, seed=step, dtype=next(network.parameters()).dtype)
        (network(x).logits - x).square().mean().backward()
        optimizer.step()
    return network


def test_default_network_has_32_64_and_128_maps():
    with torch.device("meta"):
        network = NETWORKS["compressed_unet"](1, 3)
    assert [block.conv2.out_channels for block in network.encoder] == [32, 64, 128]
    convolutions = 9 * (32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    convolutions += 4 * (128 * 64 + 64 * 32) + 9 * (128 * 64 + 64 * 64 + 64 * 32 + 32 * 32)
    normalizations = 2 * (2 * 32 + 2 * 64 + 2 * 128 + 3 * 64 + 3 * 32)
    linear = 9 * 32 * 2 + 2 + 2 * 3 + 3
    assert sum(each.numel() for each in network.parameters()) == convolutions + normalizations + linear == 467_243


def test_every_convolution_is_normalized_but_the_last_two():
    kinds = (nn.Conv2d, UpConv, nn.BatchNorm2d)
    layers = [each for each in build().modules() if isinstance(each, kinds)]
    assert [isinstance(each, nn.BatchNorm2d) for each in layers] == [False, True] * 12 + [False, False]
    assert all(each.bias is None for each in layers[:-2:2] if isinstance(each, nn.Conv2d))
    assert all(each.bias is not None for each in layers[-2:])


def test_last_two_convolutions_are_linear():
    head = build().head
    x, y = images(2, 4, 5, 6), images(2, 4, 5, 6, seed=1)
    zero = head(torch.zeros_like(x))
    torch.testing.assert_close(head(2 * x - 3 * y) - zero, 2 * (head(x) - zero) - 3 * (head(y) - zero))
    assert head(x).min() < 0 < head(x).max()


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_map_that_classes_save_costs_no_distribution(n_classes):
    """Any probabilities can be reached: differences of logits are as free as their number."""
    first, last = build(n_classes=n_classes).head
    assert (first.out_channels, last.out_channels) == (n_classes - 1, n_classes)
    differences = last.weight[1:, :, 0, 0] - last.weight[:1, :, 0, 0]
    assert torch.linalg.matrix_rank(differences) == n_classes - 1


def normalized(state, name, x):
    mean, var, weight, bias = (
        state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).relu()


def double_conv(state, name, x):
    for i in (1, 2):
        x = normalized(state, f"{name}.norm{i}", nn.functional.conv2d(x, state[f"{name}.conv{i}.weight"], padding=1))
    return x


def by_hand(state, x, *, depth=2):
    """The network in test, written out; images of a size that needs no padding."""
    skips = [double_conv(state, "encoder.0", x)]
    for level in range(1, depth + 1):
        skips.append(double_conv(state, f"encoder.{level}", nn.functional.max_pool2d(skips[-1], 2)))
    x = skips.pop()
    for level in range(depth):
        kernel = state[f"up_convs.{level}.0.expand.weight"].unflatten(0, (2, 2, -1)).permute(3, 2, 0, 1)
        x = normalized(state, f"up_convs.{level}.1", nn.functional.conv_transpose2d(x, kernel, stride=2))
        x = double_conv(state, f"decoder.{level}", torch.cat([skips.pop(), x], dim=1))
    x = nn.functional.conv2d(x, state["head.0.weight"], state["head.0.bias"], padding=1)
    return nn.functional.conv2d(x, state["head.1.weight"], state["head.1.bias"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_network_equals_the_paper_written_out(depth):
    network = trained(build(depth=depth).double()).eval()
    x = images(2, 1, 16, 24, seed=9, dtype=torch.float64)
    expected = by_hand(network.state_dict(), x, depth=depth)
    assert expected.std() > 1e-2
    torch.testing.assert_close(network(x).logits, expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_classes": 1}, "n_classes: expected at least 2, but got 1"),
        ({"base_channels": 0}, "base_channels: expected at least 1, but got 0"),
        ({"depth": 0}, "depth: expected at least 1, but got 0"),
    ],
)
def test_wrong_size_says_what_was_expected(params, message):
    with pytest.raises(ParameterError, match=message):
        build(**params)
