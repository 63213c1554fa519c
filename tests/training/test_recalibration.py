"""Statistics of normalization estimated again: which they are, and that nothing else of a training changes."""

import pytest
import torch
from torch import nn

from frem_search.segmentation.networks import build_network, enhancement, redraw
from frem_search.training.recalibration import copy_statistics, recalibrate, restore_statistics

READINGS = [
    {},
    {"concatenation": "batch_norm"},
    {"concatenation": "batch_renorm", "upsampling": "nearest"},
    {"concatenation": "batch_renorm_unlimited"},
    {"normalization": "batch_renorm"},
]


def make_network(**params):
    wanted = {"base_channels": 4, "depth": 2, "B": 8, "X": 632.0} | params
    return build_network("unet", in_channels=1, n_classes=2, seed=0, params=wanted)


def images(n=16):
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(network, *, steps=12):
    """A network whose running statistics are those of enhanced features."""
    redraw(network, seed=0, fold=0, epoch=1)
    network.train()
    for _ in range(steps):
        network(images(8))
    return network


@pytest.mark.parametrize("params", READINGS, ids=str)
def test_a_recalibrated_network_tests_as_it_trains_without_enhancement(params):
    network = trained(make_network(**params))
    recalibrate(network, images(), batch_size=16, precision="fp32")
    in_test = network.eval()(images()).logits
    for layer in network.modules():
        if hasattr(layer, "limits"):
            layer.limits[0].fill_(1.0)
            layer.limits[1].fill_(0.0)
    enhancement(network).gain.fill_(1.0)
    torch.testing.assert_close(
        in_test, network.train()(images()).logits, rtol=0.02, atol=0.02
    )  # variances are unbiased


def test_statistics_are_the_mean_over_the_batches():
    network = trained(make_network())
    first = network.encoder[0][0]
    recalibrate(network, images(), batch_size=4, precision="fp32")
    with torch.no_grad():
        batches = [first.conv1(batch) for batch in images().split(4)]
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches])
    torch.testing.assert_close(first.norm1.running_var, variances.mean(dim=0))


@pytest.mark.parametrize("params", READINGS, ids=str)
def test_what_was_replaced_comes_back_and_nothing_else_changes(params):
    network = trained(make_network(**params))
    before = {name: value.clone() for name, value in [*network.named_parameters(), *network.named_buffers()]}
    momenta = [layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    kept = copy_statistics(network)
    recalibrate(network, images(), batch_size=8, precision="fp32")
    assert network.training
    assert any(not torch.equal(value, before[name]) for name, value in network.named_buffers())
    restore_statistics(network, kept)
    after = dict([*network.named_parameters(), *network.named_buffers()])
    assert [name for name, value in after.items() if not torch.equal(value, before[name])] == []
    assert [layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)] == momenta


def test_the_module_is_off_meanwhile_even_if_it_is_on_in_test():
    network, other = trained(make_network(enhanced_in_test=True)), trained(make_network())
    for each in (network, other):
        recalibrate(each, images(), batch_size=8, precision="fp32")
    assert all(torch.equal(one, two) for one, two in zip(network.buffers(), other.buffers(), strict=True))
    assert enhancement(network).enhanced_in_test


@pytest.mark.parametrize("spoiled", [2e5, float("inf"), float("nan")])
@pytest.mark.parametrize("params", READINGS, ids=str)
def test_nothing_is_left_of_statistics_that_are_large_or_no_numbers(params, spoiled):
    network, expected = make_network(**params), make_network(**params)
    for name, value in network.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var", "running_std"):
            value.fill_(spoiled)
    for each in (network, expected):
        recalibrate(each, images(), batch_size=4, precision="fp32")
    assert all(torch.equal(one, two) for one, two in zip(network.buffers(), expected.buffers(), strict=True))


def test_each_image_weighs_the_same_and_none_is_a_batch_of_its_own():
    network = make_network()
    first = network.encoder[0][0]
    recalibrate(network, images(13), batch_size=4, precision="fp32")
    with torch.no_grad():
        batches = [first.conv1(batch) for batch in (images(13)[:4], images(13)[4:8], images(13)[8:])]
    means = torch.stack([batch.mean(dim=(0, 2, 3)) * len(batch) / 13 for batch in batches]).sum(dim=0)
    torch.testing.assert_close(first.norm1.running_mean, means, rtol=1e-4, atol=1e-6)
