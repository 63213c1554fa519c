"""What every network promises; a new one is found through NETWORKS and needs no test of its own here."""

import copy
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from frem_search.errors import ParameterError
from frem_search.layers.feature_enhancement import FeatureEnhancement
from frem_search.losses import softmax_cross_entropy
from frem_search.networks import NETWORKS, build_network, enhancement, network_params, redraw

SMALL = {"base_channels": 4, "depth": 2}
GOLDEN = Path(__file__).with_name("golden_losses.json")
LAMBDA = 0.3


def cases():
    """Every network with every normalization it offers."""
    for name in NETWORKS:
        params = network_params(name)
        offered = get_args(params["normalization"].annotation) if "normalization" in params else (None,)
        for normalization in offered:
            yield pytest.param((name, normalization), id=f"{name}-{normalization}" if normalization else name)


@pytest.fixture(params=cases())
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def small(case, *, in_channels=1, n_classes=3, seed=0, **params):
    name, normalization = case
    wanted = {**SMALL, "normalization": normalization, **params}
    offered = {key: value for key, value in wanted.items() if key in network_params(name)}
    return build_network(name, in_channels=in_channels, n_classes=n_classes, seed=seed, params=offered)


def batch(b=4, *, channels=1, k=3, size=(18, 21), seed=0):
    """Noise, and labels that can be learned from it: how bright the first channel is."""
    x = np.random.default_rng(seed).standard_normal((b, channels, *size))
    target = np.digitize(x[:, 0], np.linspace(-0.5, 0.5, k - 1))
    return torch.from_numpy(x).float(), torch.from_numpy(target)


def loss_of(network, x, target, *, weight=LAMBDA):
    return softmax_cross_entropy(network(x), target, {"lambda": torch.tensor(weight)})


def train(network, *, n_steps, weight=LAMBDA, precision=torch.float32):
    """Return the loss of every step of Adam; the enhanced maps are redrawn every five steps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for step in range(n_steps):
        redraw(network, seed=0, fold=0, epoch=step // 5)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            loss = loss_of(network, *batch(seed=step), weight=weight)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (3, 5)])
@pytest.mark.parametrize(("in_channels", "n_classes"), [(1, 2), (3, 4)])
def test_logits_have_the_size_of_the_images(case, size, in_channels, n_classes):
    network = small(case, in_channels=in_channels, n_classes=n_classes, supervision=True)
    x, _ = batch(2, channels=in_channels, size=size)
    output = network(x)
    assert output.logits.shape == (2, n_classes, *size)
    assert output.auxiliary is None or output.auxiliary.shape == output.logits.shape
    assert network.eval()(x).logits.shape == (2, n_classes, *size)


def test_every_parameter_gets_a_finite_gradient(case):
    moved = {}
    for seed in range(4):  # one seed's rectifiers may all be closed
        network = small(case, seed=seed, supervision=True)
        loss_of(network, *batch(seed=seed)).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            moved[name] = moved.get(name, False) or bool(parameter.grad.any())
    assert [name for name, has_moved in moved.items() if not has_moved] == []


def test_eval_is_bitwise_repeatable(case):
    network = small(case, B=2, X=10.0)
    train(network, n_steps=2)
    x, _ = batch()
    network.eval()
    state = copy.deepcopy(network.state_dict())
    assert torch.equal(network(x).logits, network(x).logits)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_batch_equals_its_rows_in_eval(case):
    network = small(case)
    train(network, n_steps=2)
    x, _ = batch()
    rows = torch.cat([network.eval()(row[None]).logits for row in x])
    # Kernels add in another order for another batch size: some units in the last place of single precision.
    torch.testing.assert_close(network(x).logits, rows, rtol=1e-5, atol=1e-5)


def test_auxiliary_and_features_are_for_training_only(case):
    network = small(case, supervision=True)
    x, _ = batch()
    features = network(x).features
    if features is not None:
        assert not features.bottleneck.requires_grad
        assert not features.skip.requires_grad
        assert (features.bottleneck >= 0).all()
        assert features.skip > 0
    output = network.eval()(x)
    assert output.auxiliary is None
    assert output.features is None


@pytest.mark.parametrize("shape", [(18, 21), (1, 18, 21), (2, 1, 4, 18, 21)])
def test_wrong_rank_raises(case, shape):
    with pytest.raises((ParameterError, TypeCheckError)):
        small(case)(torch.zeros(shape))


def test_wrong_number_of_channels_says_what_was_expected(case):
    with pytest.raises(
        ParameterError, match=re.escape("images: expected shape (n, 1, height, width), but got (2, 3, 8, 8)")
    ):
        small(case)(torch.zeros(2, 3, 8, 8))


def test_same_seed_gives_the_same_weights_and_another_seed_others(case):
    first, second, other = (small(case, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_generator_alone(case):
    before = torch.get_rng_state()
    small(case)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_do_not_depend_on_what_is_searched(case):
    plain = small(case).state_dict()
    searched = small(case, B=3, X=100.0, supervision=True).state_dict()
    assert all(torch.equal(searched[name], value) for name, value in plain.items())


def test_no_tensor_stands_twice_in_the_state(case):
    addresses = [value.data_ptr() for value in small(case, supervision=True).state_dict().values()]
    assert len(addresses) == len(set(addresses))


def test_no_convolution_has_a_bias_before_a_normalization(case):
    modules = [each for each in small(case).modules() if isinstance(each, nn.Conv2d) or hasattr(each, "running_mean")]
    before = [layer for layer, following in pairwise(modules) if hasattr(following, "running_mean")]
    assert [layer for layer in before if layer.bias is not None] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_docstring_names_its_source_and_what_differs(name):
    assert "Source:" in NETWORKS[name].__doc__
    assert "Differs:" in NETWORKS[name].__doc__


@pytest.mark.parametrize("name", NETWORKS)
def test_class_file_and_key_have_one_name(name):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name)
    assert NETWORKS[name].__name__.lower() == name.replace("_", "")
    assert NETWORKS[name].__module__ == f"frem_search.networks.{name}"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_a_study_has_a_default_and_a_documented_meaning(name):
    for key, parameter in network_params(name).items():
        assert parameter.default is not inspect.Parameter.empty
        assert re.search(rf"^ +{key}: ", NETWORKS[name].__doc__, flags=re.MULTILINE), key


def stacked_training(members, weights, *, n_steps):
    """Train members side by side, as `train` does each alone; return losses [step, member], params and buffers."""
    params, buffers = stack_module_state(members)
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)  # element by element, so members do not meet in it
    base = copy.deepcopy(members[0]).to("meta")

    def member_loss(params, buffers, weight, x, target):
        output = functional_call(base, (params, buffers), (x,))
        return softmax_cross_entropy(output, target, {"lambda": weight})

    step_all = vmap(grad_and_value(member_loss), in_dims=(0, 0, 0, None, None))
    losses = []
    for step in range(n_steps):
        for index, member in enumerate(members):
            redraw(member, seed=0, fold=0, epoch=step // 5)
            for name, buffer in member.named_buffers():
                if name.endswith("gain"):
                    buffers[name][index].copy_(buffer)
        grads, values = step_all(params, buffers, torch.tensor(weights), *batch(seed=step))
        for name, value in params.items():
            value.grad = grads[name]
        optimizer.step()
        losses.append(values.tolist())
    return np.array(losses), params, buffers


def test_stacked_members_equal_each_alone(case):
    differing = [{"B": 3, "X": 10.0}, {"B": 7, "X": 100.0}]
    weights = [0.2, 0.6]

    def members():
        return [small(case, supervision=True, **each) for each in differing]

    alone = members()
    expected = np.transpose([train(each, n_steps=20, weight=w) for each, w in zip(alone, weights, strict=True)])
    losses, params, buffers = stacked_training(members(), weights, n_steps=20)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-2
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)  # 2.4e-7 measured after 20 steps

    base = copy.deepcopy(alone[0]).eval()
    x, _ = batch(seed=99)
    stacked = vmap(lambda p, b: functional_call(base, (p, b), (x,)).logits)(params, buffers)
    for index, member in enumerate(alone):
        torch.testing.assert_close(stacked[index], member.eval()(x).logits, rtol=1e-3, atol=1e-3)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][index], buffer, rtol=1e-3, atol=1e-3)


def test_golden_losses(case):
    """A refactor may not change them; a fix changes them in a commit of its own, from the message below.

    The tolerance is for other machines, whose kernels add in another order: ten steps without oneDNN's kernels gave
    losses that differed by a millionth.
    """
    name, normalization = case
    key = f"{name}-{normalization}" if normalization else name
    network = small(case, B=3, X=10.0, supervision=True)
    losses = train(network, n_steps=10)
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden.get(key, []), rel=1e-4), f"now: {json.dumps({key: losses})}"


@pytest.fixture
def enhanced_case(case):
    if enhancement(small(case)) is None:
        pytest.skip("has no feature enhancement")
    return case


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neutral", [{"B": 0, "X": 632.0}, {"B": 5, "X": 1.0}])
def test_no_maps_or_factor_one_is_the_baseline_bit_for_bit(enhanced_case, neutral, precision):
    network, baseline = small(enhanced_case, **neutral), small(enhanced_case)
    for name, layer in list(baseline.named_modules()):
        if isinstance(layer, FeatureEnhancement):
            baseline.set_submodule(name, nn.Identity())
    assert train(network, n_steps=6, precision=precision) == train(baseline, n_steps=6, precision=precision)
    weights = dict(network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in baseline.named_parameters())


def test_enhancement_acts_in_training_only(enhanced_case):
    network, baseline = small(enhanced_case, B=5, X=632.0), small(enhanced_case)
    redraw(network, seed=0, fold=0, epoch=0)
    x, _ = batch()
    assert torch.equal(network.eval()(x).logits, baseline.eval()(x).logits)
    assert not torch.equal(network.train()(x).logits, baseline.train()(x).logits)


def test_features_are_measured_before_enhancement(enhanced_case):
    network, baseline = small(enhanced_case, B=5, X=632.0), small(enhanced_case)
    redraw(network, seed=0, fold=0, epoch=0)
    x, _ = batch()
    assert torch.equal(network(x).features.bottleneck, baseline(x).features.bottleneck)
    assert network(x).features.bottleneck.shape == (enhancement(network).channels,)


def test_auxiliary_logits_are_computed_before_enhancement(enhanced_case):
    network, baseline = (small(enhanced_case, supervision=True, **each) for each in ({"B": 5, "X": 632.0}, {}))
    redraw(network, seed=0, fold=0, epoch=0)
    x, _ = batch()
    auxiliary = network(x).auxiliary
    assert auxiliary is None or torch.equal(auxiliary, baseline(x).auxiliary)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ten_thousandfold_enhancement_stays_finite(enhanced_case, precision):
    network = small(enhanced_case, B=10, X=10_000.0, fixed_maps=True)
    assert np.isfinite(train(network, n_steps=10, precision=precision)).all()
    assert all(each.isfinite().all() for each in network.state_dict().values())


def test_redraw_reaches_every_enhancement(enhanced_case):
    network = small(enhanced_case, B=3, X=10.0)
    redraw(network, seed=0, fold=0, epoch=4)
    layers = [each for each in network.modules() if isinstance(each, FeatureEnhancement)]
    assert layers[0] is enhancement(network)
    assert [each.enhanced.sum() for each in layers] == [3] * len(layers)


def test_network_without_enhancement_has_none():
    network = nn.Conv2d(1, 2, 1)
    redraw(network, seed=0, fold=0, epoch=0)
    assert enhancement(network) is None
