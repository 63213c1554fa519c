from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from frem_search.errors import ParameterError
from frem_search.segmentation.batch import Batch
from frem_search.segmentation.layers.gating import ConfidenceMask, PixelGate
from frem_search.segmentation.layers.residual_block import ResidualBlock
from frem_search.segmentation.layers.squeeze_excite import SqueezeExcite
from frem_search.segmentation.layers.transposed_conv import TransposedConv
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.networks import NETWORKS, build_network
from frem_search.training.side_by_side.stacked_kernels import SideBySide

SMALL = {"base_channels": 4, "depth": 3}
NO_GATES = {"channel_gating": False, "pixel_gating": "none", "gating_mask": False}
AUTHORS = {"structure": "bridged", "base_channels": 12, "depth": 5}
# The rows of the paper's Table 1.
ROWS = {
    "CLmser-w": NO_GATES,
    "CG": NO_GATES | {"channel_gating": True},
    "CG + PG": {"gating_mask": False},
    "CG + FullPG": {"pixel_gating": "all", "gating_mask": False},
    "CG + PG + GM": {},
}
# Each switch by itself, and all of them.
OTHERS = {
    "PG": NO_GATES | {"pixel_gating": "high_level"},
    "FullPG": NO_GATES | {"pixel_gating": "all"},
    "GM": NO_GATES | {"gating_mask": True},
    "CG + FullPG + GM": {"pixel_gating": "all"},
}


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def build(*, seed=0, **params):
    return build_network("clmser", in_channels=1, n_classes=2, seed=seed, params=SMALL | params)


def trained(network, *, n_steps=3):
    """Let running statistics, normalizations and gates differ from what they begin with."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(n_steps):
        optimizer.zero_grad()
        x = images(4, 1, 16, 24, seed=step, dtype=next(network.parameters()).dtype)
        (network(x).logits[:, 1] - x[:, 0]).square().mean().backward()
        optimizer.step()
    return network


def n_parameters(**params):
    with torch.device("meta"):
        return sum(each.numel() for each in NETWORKS["clmser"](1, 2, **params).parameters())


def test_full_network_has_the_8_3_million_parameters_of_table_3():
    assert n_parameters() == 8_334_243


def test_authors_structure_has_the_parameters_that_their_program_uses():
    # Their program, asked for its parameters, prints 8,346,246. It counts gates of a fourth level (384 maps, a hidden
    # layer of 48) whose skip connection it leaves out.
    never_used = 2 * 384 * 48 + 48 + 384 + 9
    assert n_parameters(**AUTHORS) == 8_308_941 == 8_346_246 - never_used


def test_each_row_of_table_1_adds_the_same_to_the_authors_structure():
    by_channel = sum(2 * w * (w // 8) + w // 8 + w for w in (48, 96, 192))
    added = {
        "CLmser-w": 0,
        "CG": by_channel,
        "CG + PG": by_channel + 9 * 3,
        "CG + FullPG": by_channel + 9 * 5,
        "CG + PG + GM": by_channel + 9 * 3 + 9 * (24 + 24) + 4 * 24 * 24,  # an up-convolution of its own
    }
    plain = n_parameters(**AUTHORS, **NO_GATES)
    assert {name: n_parameters(**AUTHORS, **params) - plain for name, params in ROWS.items()} == added


def test_each_row_of_table_1_adds_the_parameters_of_its_gates_and_nothing_else():
    widths = [16, 32, 64, 128, 256]
    by_channel = sum(2 * w * (w // 8) + w // 8 + w for w in widths[2:])
    added = {
        "CLmser-w": 0,
        "CG": by_channel,
        "CG + PG": by_channel + 9 * 3,
        "CG + FullPG": by_channel + 9 * 5,
        "CG + PG + GM": by_channel + 9 * 3 + 9 * (16 + 32),
    }
    assert {name: n_parameters(**params) - 8_311_776 for name, params in ROWS.items()} == added


@pytest.mark.parametrize(
    ("name", "channel_gates", "pixel_gates", "masks"),
    [
        ("CLmser-w", 0, 0, 0),
        ("CG", 3, 0, 0),
        ("CG + PG", 3, 3, 0),
        ("CG + FullPG", 3, 5, 0),
        ("CG + PG + GM", 3, 3, 1),
        ("PG", 0, 3, 0),
        ("FullPG", 0, 5, 0),
        ("GM", 0, 0, 1),
        ("CG + FullPG + GM", 3, 5, 1),
    ],
)
@pytest.mark.parametrize("of_structure", [{}, AUTHORS], ids=["mirrored", "bridged"])
def test_each_row_has_its_gates_and_no_others(name, channel_gates, pixel_gates, masks, of_structure):
    with torch.device("meta"):
        network = NETWORKS["clmser"](1, 2, **of_structure, **(ROWS | OTHERS)[name])
    kinds = Counter(type(each) for each in network.modules())
    assert (kinds[SqueezeExcite], kinds[PixelGate], kinds[ConfidenceMask]) == (channel_gates, pixel_gates, masks)


def normalized(state, name, x):
    mean, var, weight, bias = (
        state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def convolved(state, name, x):
    """Convolution, normalization, ReLU."""
    return normalized(state, f"{name}.1", nn.functional.conv2d(x, state[f"{name}.0.weight"], padding=1)).relu()


def residual(state, name, x):
    y = nn.functional.conv2d(x, state[f"{name}.conv1.weight"], padding=1)
    y = normalized(state, f"{name}.norm1", y).relu()
    y = nn.functional.conv2d(y, state[f"{name}.conv2.weight"], padding=1)
    return (x + normalized(state, f"{name}.norm2", y)).relu()


def kernel_of(weight):
    """The weight that PyTorch's transposed convolution has for the same result."""
    return weight.unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1)


def lifted(state, name, x):
    kernel = kernel_of(state[f"{name}.0.expand.weight"])
    y = nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1, output_padding=1)
    return normalized(state, f"{name}.1", y).relu()


def gated(state, name, x):
    """Eq. 1, with those of the two gates that there are."""
    if f"{name}.0.shrink.weight" in state:
        z = x.mean(dim=(2, 3))
        for key, activation in (("shrink", torch.relu), ("grow", torch.sigmoid)):
            z = activation(z @ state[f"{name}.0.{key}.weight"].T + state[f"{name}.0.{key}.bias"])
        x = x * z[:, :, None, None]
    for key in (f"{name}.0.conv.weight", f"{name}.1.conv.weight"):
        if key in state:
            x = x * torch.sigmoid(nn.functional.conv2d(x.mean(dim=1, keepdim=True), state[key], padding=1))
    return x


def masked(state, index, skip, x):
    """Eq. 2, of the temporary answer."""
    if "mask.gamma" not in state:
        return skip
    answer = torch.tanh(nn.functional.conv2d(x, state[f"temporary.{index}.weight"], padding=1))
    return skip * (1 - answer**2) ** state["mask.gamma"]


def by_hand_bridged(state, x, *, depth=3):
    """The authors' program in test, written out; images of a size that needs no padding."""

    def leaky_lifted(name, x):
        weight = state[f"{name}.0.expand.weight"]
        kernel = weight.unflatten(0, (2, 2, -1)).permute(3, 2, 0, 1)
        return nn.functional.leaky_relu(nn.functional.conv_transpose2d(x, kernel, stride=2), 0.01)

    def doubt(name, x):
        if "mask.gamma" not in state:
            return 1.0
        return (1 - torch.tanh(nn.functional.conv2d(x, state[name], padding=1)) ** 2) ** state["mask.gamma"]

    first = convolved(state, "stem", x)
    second = convolved(state, "encoder.0", first)
    x, levels = second, []
    for level in range(1, depth):
        x = convolved(state, f"encoder.{level}.0", nn.functional.max_pool2d(x, 2))
        x = residual(state, f"encoder.{level}.1", x)
        levels.append(x)
    x = nn.functional.max_pool2d(x, 2)
    x = nn.functional.conv2d(x, state[f"encoder.{depth}.0.weight"], padding=1).relu()
    x = leaky_lifted("ups.0", x)  # the bridge: nothing of the level beside it is added
    for step in range(1, depth - 1):
        x = residual(state, f"blocks.{step - 1}.1", convolved(state, f"blocks.{step - 1}.0", x))
        level = depth - 1 - step
        x = leaky_lifted(f"ups.{step}", x) + gated(state, f"gates.{level + 1}", levels[level - 1])
    x = residual(state, f"blocks.{depth - 2}.1", convolved(state, f"blocks.{depth - 2}.0", x))
    read = leaky_lifted("temporary.0.0", x) if "mask.gamma" in state else None
    x = leaky_lifted("low_level.0", x) + doubt("temporary.0.1.weight", read) * gated(state, "gates.1", second)
    detail = doubt("temporary.1.weight", x) * gated(state, "gates.0", first)
    x = convolved(state, "low_level.1", x) + detail
    return nn.functional.conv2d(x, state["head.weight"], padding=1)


def by_hand(state, x, *, depth=3):
    """The network of sections 3.1 to 3.3 in test, written out; images of a size that needs no padding."""
    skips = [convolved(state, "stem", x)]
    skips.append(convolved(state, "encoder.0", skips[0]))
    for level in range(1, depth + 1):
        x = convolved(state, f"encoder.{level}.0", nn.functional.max_pool2d(skips[-1], 2))
        skips.append(residual(state, f"encoder.{level}.1", x))
    x = skips.pop()
    skips = [gated(state, f"gates.{level}", skip) for level, skip in enumerate(skips)]
    for level in range(depth - 1):
        x = residual(state, f"blocks.{level}", lifted(state, f"ups.{level}", x) + skips.pop())
    x = lifted(state, "low_level.0", x)
    x = x + masked(state, 0, skips[1], x)
    x = convolved(state, "low_level.1", x)
    x = x + masked(state, 1, skips[0], x)
    return nn.functional.conv2d(x, state["head.weight"], padding=1)


@pytest.mark.parametrize("name", ROWS | OTHERS)
def test_every_row_equals_the_paper_written_out(name):
    network = trained(build(**(ROWS | OTHERS)[name]).double()).eval()
    x = images(2, 1, 16, 24, seed=9, dtype=torch.float64)
    z = by_hand(network.state_dict(), x)
    assert z.std() > 1e-2
    torch.testing.assert_close(network(x).logits, torch.cat([-z, z], dim=1))


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("name", ROWS | OTHERS)
def test_every_row_equals_the_authors_program_written_out(name, depth):
    params = {"structure": "bridged", "depth": depth}
    network = trained(build(**params, **(ROWS | OTHERS)[name]).double()).eval()
    x = images(2, 1, 16, 32, seed=9, dtype=torch.float64)
    z = by_hand_bridged(network.state_dict(), x, depth=depth)
    assert z.std() > 1e-2
    torch.testing.assert_close(network(x).logits, torch.cat([-z, z], dim=1))


def test_a_bridge_can_be_trained_on_one_image_of_a_single_window():
    x = images(1, 1, 8, 8)
    with pytest.raises(ParameterError, match="batch_size: expected at least 2"):
        build()(x)
    assert build(structure="bridged")(x).logits.isfinite().all()


@pytest.mark.parametrize("structure", ["mirrored", "bridged"])
def test_each_gate_changes_the_answer(structure):
    x = images(2, 1, 16, 24)
    answers = [build(structure=structure, **params).eval()(x).logits for params in (ROWS | OTHERS).values()]
    answers += [build(structure=structure, gamma=1.0).eval()(x).logits]
    assert all(not torch.allclose(a, b, atol=1e-6) for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize("structure", ["mirrored", "bridged"])
def test_gates_leave_the_weights_of_the_rest_as_they_are(structure):
    plain = build(structure=structure, **NO_GATES).state_dict()
    for params in (ROWS | OTHERS).values():
        state = build(structure=structure, **params).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items())


def test_difference_of_the_probabilities_is_the_answer():
    network = trained(build())
    output = network.eval()(images(2, 1, 17, 21))
    z = output.logits[:, 1]
    probs = output.logits.softmax(dim=1)
    assert torch.equal(output.logits[:, 0], -z)
    torch.testing.assert_close(probs[:, 1] - probs[:, 0], torch.tanh(z))
    assert torch.equal(output.logits.argmax(dim=1), (z > 0).long())
    assert 0 < (z > 0).float().mean() < 1


def test_its_loss_pulls_the_answer_to_minus_one_and_plus_one():
    network = build(seed=1)
    x = images(4, 1, 16, 16)
    batch = Batch(x, (x[:, 0] > 0).to(torch.uint8))
    loss = LOSSES["smooth_l1"].function
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(network(x), batch, {}).backward()
        optimizer.step()
    output = network(x)
    assert loss(output, batch, {}) < 0.1  # 0.5 where every answer is 0
    assert (output.logits.argmax(dim=1) == batch.label).float().mean() > 0.9


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_gradient_is_finite_where_the_temporary_answers_are_undecided_or_certain(gamma, scale, precision):
    network = build(gamma=gamma)
    answers = []
    network.mask.register_forward_pre_hook(lambda _, inputs: answers.append(inputs[0]))
    with torch.no_grad():
        for reader in network.temporary:
            reader.weight *= scale
    with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
        logits = network(images(2, 1, 16, 16)).logits
    logits.float().square().mean().backward()
    assert [each.dtype for each in answers] == [torch.float32] * 2
    assert all((each.abs() == (1 if scale else 0)).float().mean() > 0.9 for each in answers)
    assert all(each.grad.isfinite().all() for each in network.parameters())


def test_no_detail_is_let_through_where_the_temporary_answer_is_certain():
    network = build(**NO_GATES | {"gating_mask": True}).eval()
    x = images(2, 1, 16, 16)
    doubtful = network(x).logits
    for reader in network.temporary:
        nn.init.constant_(reader.weight, 1e6)
    certain = network(x).logits
    for gate in network.gates[:2]:
        gate.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    assert torch.equal(network(x).logits, certain)
    assert not torch.allclose(certain, doubtful)


@pytest.mark.parametrize("kernels", [False, True], ids=["vmap", "our kernels"])
def test_members_that_differ_in_gamma_side_by_side_equal_each_alone(kernels):
    gammas = [1.0, 1.5, 4.0]
    members = [build(gamma=gamma).double() for gamma in gammas]
    x = images(4, 1, 16, 24, dtype=torch.float64)
    alone = [member(x).logits.square().mean() for member in members]
    sum(alone).backward()
    members_again = [build(gamma=gamma).double() for gamma in gammas]
    params, buffers = stack_module_state(members_again)
    assert buffers["mask.gamma"].tolist() == gammas

    def loss(params, buffers):
        return functional_call(members_again[0], (params, buffers), (x,)).logits.square().mean()

    if kernels:
        with SideBySide():
            losses = vmap(loss)(params, buffers)
    else:
        losses = vmap(loss)(params, buffers)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.stack(alone))
    assert losses.unique().numel() == 3
    for index, member in enumerate(members):
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(params[name].grad[index], parameter.grad)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gamma": 0.5}, "gamma: expected a finite exponent of at least 1, but got 0.5"),
        ({"gamma": 0.5, "gating_mask": False}, "gamma: expected a finite exponent of at least 1, but got 0.5"),
        ({"depth": 1}, "depth: expected at least 2, but got 1"),
        ({"structure": "authors"}, "structure: expected 'mirrored' or 'bridged', but got 'authors'"),
        ({"base_channels": 0}, "base_channels: expected at least 1, but got 0"),
        ({"pixel_gating": "low_level"}, "pixel_gating: expected 'none' or 'high_level' or 'all', but got 'low_level'"),
    ],
)
def test_wrong_value_says_what_was_expected(params, message):
    with pytest.raises(ParameterError, match=message):
        build(**params)


def test_third_class_is_an_error():
    with pytest.raises(ParameterError, match=r"n_classes: expected 2, as one answer .*, but got 3\."):
        build_network("clmser", in_channels=1, n_classes=3, seed=0, params=SMALL)


def test_whole_number_is_an_exponent():
    assert build(gamma=2).mask.gamma.item() == 2.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 4)])
def test_transposed_convolution_equals_pytorchs(size, memory_format):
    ours = TransposedConv(6, 4)
    theirs = nn.ConvTranspose2d(6, 4, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False)
    with torch.no_grad():
        theirs.weight.copy_(kernel_of(ours.expand.weight))
    x = images(2, 6, *size).contiguous(memory_format=memory_format).requires_grad_()
    upstream = images(2, 4, 2 * size[0], 2 * size[1], seed=1)
    torch.testing.assert_close(ours(x), theirs(x))
    of_ours = torch.autograd.grad(ours(x), [x, ours.expand.weight], upstream)
    of_theirs = torch.autograd.grad(theirs(x), [x, theirs.weight], upstream)
    torch.testing.assert_close(of_ours[0], of_theirs[0])
    torch.testing.assert_close(kernel_of(of_ours[1]), of_theirs[1])


def test_transposed_convolutions_side_by_side_equal_each_alone():
    members = [TransposedConv(6, 4) for _ in range(3)]
    x = images(3, 2, 6, 3, 5)
    params, buffers = stack_module_state(members)
    stacked = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(params, buffers, x)
    for member, own, of_all in zip(members, x, stacked, strict=True):
        torch.testing.assert_close(of_all, member(own))


def test_transposed_convolution_keeps_half_precision_and_memory_format():
    x = images(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = TransposedConv(6, 4)(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_residual_block_adds_its_input_before_the_last_relu():
    layer = ResidualBlock(4).eval()
    x = images(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), residual({f"block.{k}": v for k, v in layer.state_dict().items()}, "block", x))
    nn.init.zeros_(layer.norm2.weight)
    assert torch.equal(layer(x), x.relu())
