"""Members side by side: each becomes what it becomes alone, up to rounding, and no number of one reaches another."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from frem_search.data.augmentation.turns import Augmentation
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.networks import build_network
from frem_search.segmentation.output import Features
from frem_search.training import batches as batches_module
from frem_search.training.batches import EpochPlan, prepare_epoch
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.member import Member
from frem_search.training.resident import Images, Part, ResidentData
from frem_search.training.side_by_side.stacked import begin_epoch_stacked, stack_key, train_stacked
from frem_search.training.side_by_side.stacked_adam import StackedAdam, stack
from frem_search.training.side_by_side.stacked_kernels import SideBySide
from frem_search.training.trial import Folds

NORMALIZATIONS = ["batch_norm", "batch_renorm"]
SETTINGS = ("augmentation", "weight_decay", "schedule", "steps_per_epoch")  # of a member
BATCH, N_IMAGES = 4, 8  # two steps an epoch
DIFFERING = [
    {},
    {"B": 8, "learning_rate": 3e-3},
    {"X": 1000.0, "weight": 0.6},
    {"B": 1, "X": 3.0, "weight": 0.1, "learning_rate": 2e-2},
]
LOSS = LOSSES["softmax_cross_entropy"]


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@functools.cache
def make_data(*, device="cpu", dtype=torch.float32, n=N_IMAGES, size=16):
    """A bright square on noise: class 1 can be told by its brightness. Members share it, or could not be stacked."""
    rng = np.random.default_rng(0)
    labels = np.zeros((n, size, size), np.uint8)
    for label in labels:
        top, left = rng.integers(0, size // 2, 2)
        label[top : top + size // 2, left : left + size // 2] = 1
    images = (labels[:, None] - 0.5 + 0.5 * rng.standard_normal((n, 1, size, size))).astype(np.float32)
    images = torch.from_numpy(images).to(device, dtype).contiguous(memory_format=torch.channels_last)
    whole = Images(images, torch.from_numpy(labels).to(device))
    part = Part(tuple(map(str, range(n))), whole, torch.arange(n, device=device))
    return ResidentData(part, part, part, 2, torch.device(device))


def make_member(key=0, *, normalization="batch_norm", steps=0, data=None, **params):
    rate, weight = params.pop("learning_rate", 1e-2), params.pop("weight", 0.3)
    batch_size = params.pop("batch_size", BATCH)
    settings = {name: params.pop(name) for name in SETTINGS if name in params}
    wanted = {"base_channels": 4, "depth": 1, "B": 4, "X": 100.0, "supervision": True} | params
    wanted["normalization"] = normalization
    data = data or make_data()
    network = build_network("unet", in_channels=1, n_classes=2, seed=0, params=wanted)
    network.to(data.device, data.train.images.dtype)
    if normalization == "batch_renorm":
        for name, buffer in network.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(steps)
    return Member(key, network, data, {"lambda": weight}, rate, batch_size, 10_000, **settings)


def make_members(normalization="batch_norm", differing=DIFFERING, **of_all):
    # Renormalization begins to differ from normalization after 5 000 steps.
    return [
        make_member(key, normalization=normalization, steps=30_000 * (key % 2), **of_all, **each)
        for key, each in enumerate(differing)
    ]


def train_side_by_side(members, *, n_epochs=1, precision="fp32"):
    """Return mean losses [epoch, member] and the feature magnitudes of each epoch."""
    losses, features = [], []
    for _ in range(n_epochs):
        epoch = begin_epoch_stacked(make_cohort(), members)
        results = train_stacked(members, epoch, loss=LOSS, precision=precision)
        for member in members:
            member.epoch += 1
        losses.append(torch.stack([trained.loss for trained in results]))
        features.append(Features(*(torch.stack(each) for each in zip(*(t.features for t in results), strict=True))))
    return torch.stack(losses), features


def make_cohort(precision="fp32"):
    return Cohort(loss="softmax_cross_entropy", metric="mean_iou", precision=precision)


def train_alone(members, *, n_epochs=1, precision="fp32"):
    cohort = make_cohort(precision)
    for member in members:
        for _ in range(n_epochs):
            assert cohort.train_epoch(member).error is None
    return torch.tensor([member.curve["train_loss"][-n_epochs:] for member in members]).T


def assert_close_states(one, other, *, tolerance):
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(value, other.network.state_dict()[name], rtol=tolerance, atol=tolerance, msg=name)
    assert_close_optimizers(one, other, tolerance=tolerance)


def assert_close_optimizers(one, other, *, tolerance):
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in ours["state"].items():
        assert list(state) == list(theirs["state"][index])
        for part, value in state.items():
            expected = theirs["state"][index][part]
            assert (value.dtype, value.stride()) == (expected.dtype, expected.stride())
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
            assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_members_side_by_side_train_as_each_alone(normalization):
    members, alone = make_members(normalization), make_members(normalization)
    expected = train_alone(alone, n_epochs=25)
    losses, features = train_side_by_side(members, n_epochs=25)
    # Kernels add in another order, and Adam makes a rounding grow wherever a gradient is small: 1.2e-7 measured after
    # 2 steps and 1.9e-4 after 50, where losses fell from 0.72 to 0.06. The next test tells rounding from error.
    bounds = dict.fromkeys(range(25), 2e-3) | {0: 1e-6}
    for epoch, bound in bounds.items():
        torch.testing.assert_close(losses[epoch], expected[epoch], rtol=0, atol=bound)
    assert (expected[-1] - expected[0]).max() < -0.2
    curves = {"bottleneck": [each.bottleneck.mean(dim=1) for each in features], "skip": [e.skip for e in features]}
    for column, values in curves.items():
        columns = torch.tensor([member.curve[column] for member in alone]).T
        torch.testing.assert_close(torch.stack(values), columns, rtol=0, atol=2e-3)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_in_double_precision_slots_are_refilled_and_left_as_if_members_had_always_been_alone(normalization):
    data = make_data(dtype=torch.float64)
    members, alone = (make_members(normalization, data=data) for _ in range(2))
    train_side_by_side(members, n_epochs=4)
    first = members[0]
    members[0] = make_members(normalization, data=data)[0]
    train_side_by_side(members, n_epochs=3)
    train_alone(members, n_epochs=3)
    train_alone([first], n_epochs=6)
    train_alone(alone, n_epochs=10)
    for member, expected in zip([first, *members[1:]], alone, strict=True):
        assert_close_states(member, expected, tolerance=1e-8)  # 3.2e-10 measured after 50 steps
    train_alone(members[:1], n_epochs=4)
    assert_close_states(members[0], alone[0], tolerance=1e-8)
    assert members[0].optimizer.state_dict()["state"][0]["step"] == 20


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision_is_that_of_each_alone(normalization):
    members, alone = make_members(normalization), make_members(normalization)
    expected = train_alone(alone, n_epochs=3, precision="bf16")
    losses, _ = train_side_by_side(members, n_epochs=3, precision="bf16")
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-2)
    for member in members:
        assert {value.dtype for value in member.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layer", ["encoder.0.0.conv1", "head"])
def test_a_number_that_is_none_stays_in_its_slot(normalization, precision, layer):
    sound, members = make_members(normalization), make_members(normalization)
    with torch.no_grad():
        members[1].network.get_submodule(layer).weight.fill_(math.nan)
    expected, _ = train_side_by_side(sound, n_epochs=2, precision=precision)
    losses, features = train_side_by_side(members, n_epochs=2, precision=precision)
    others = [0, 2, 3]
    assert losses[:, 1].isnan().all()
    assert torch.equal(losses[:, others], expected[:, others])
    assert features[-1].bottleneck[others].isfinite().all()
    for slot in others:
        for name, value in members[slot].network.state_dict().items():
            assert torch.equal(value, sound[slot].network.state_dict()[name]), name


def test_an_epoch_that_fails_leaves_the_members_as_they_were():
    members = make_members()
    train_side_by_side(members[:2])
    before = copy.deepcopy([(m.network.state_dict(), m.optimizer.state_dict()) for m in members])
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return LOSS.function(*args)

    epoch = prepare_epoch(EpochPlan(make_data(), 0, 0, 3, BATCH, None, Augmentation()))
    with pytest.raises(torch.OutOfMemoryError):
        train_stacked(members, epoch, loss=LOSS._replace(function=fails), precision="fp32")
    for member, (network, optimizer) in zip(members, before, strict=True):
        assert all(torch.equal(value, network[name]) for name, value in member.network.state_dict().items())
        after = member.optimizer.state_dict()["state"]
        assert list(after) == list(optimizer["state"])
        for index, state in after.items():
            assert all(torch.equal(value, optimizer["state"][index][name]) for name, value in state.items())


def test_a_checkpoint_of_a_stacked_member_is_one_of_a_plain_member():
    members = make_members()
    train_side_by_side(members)
    stored = dump_checkpoint(Folds(0, [members[1]]), identity={})
    train_alone([plain := make_member(1, B=8, learning_rate=3e-3)])
    # A slice of the stack would be stored with all of the stack; the plain one holds a curve and best weights too.
    assert len(stored) < len(dump_checkpoint(Folds(0, [plain]), identity={}))
    fresh = make_member(1, B=8, learning_rate=3e-3)
    assert load_checkpoint(Folds(0, [fresh]), stored, identity={})
    assert_close_states(fresh, members[1], tolerance=0)


def watch_augmentation(monkeypatch):
    seen = []
    turn = batches_module.turn_and_flip

    def watched(x, flags):
        if x.is_floating_point():
            seen.append(len(x))
        return turn(x, flags)

    monkeypatch.setattr(batches_module, "turn_and_flip", watched)
    return seen


def test_equal_batches_are_turned_once_for_all_members(monkeypatch):
    seen = watch_augmentation(monkeypatch)
    members = make_members()
    train_side_by_side(members)
    assert seen == [N_IMAGES]
    members[2].epoch = 7
    train_side_by_side(members)
    assert seen[1:] == [N_IMAGES, N_IMAGES], "three members share an epoch"


def test_members_without_augmentation_may_be_among_those_with_it(monkeypatch):
    plain = {"augmentation": Augmentation(turns=False)}
    differing = [plain, {}, plain]
    members, alone = (make_members(differing=differing) for _ in range(2))
    losses, _ = train_side_by_side(members)
    torch.testing.assert_close(losses, train_alone(alone), rtol=0, atol=1e-6)
    assert abs(losses[0, 0] - losses[0, 1]) > 1e-4
    seen = watch_augmentation(monkeypatch)
    train_side_by_side(members[::2])
    assert seen == []


def test_one_member_is_a_stack_too():
    members, alone = [make_member()], [make_member()]
    losses, features = train_side_by_side(members)
    torch.testing.assert_close(losses, train_alone(alone), rtol=0, atol=1e-6)
    assert (losses.shape, features[0].bottleneck.shape, features[0].skip.shape) == ((1, 1), (1, 8), (1,))


@pytest.mark.parametrize(
    ("params", "is_equal"),
    [
        ({"B": 2, "X": 3.0, "learning_rate": 1.0, "weight": 0.9, "fixed_maps": True}, True),
        ({"augmentation": Augmentation(turns=False, alpha=3.0), "weight_decay": 0.1, "schedule": [(2, 0.5)]}, True),
        ({"augmentation": Augmentation(crop_size=(8, 8))}, False),
        ({"steps_per_epoch": 1}, False),
        ({"batch_size": 3}, False),
        ({"base_channels": 8}, False),
        ({"supervision": False}, False),
        ({"normalization": "batch_renorm"}, False),
    ],
)
def test_members_of_one_shape_have_one_key(params, is_equal):
    assert (stack_key(make_member()) == stack_key(make_member(1, **params))) is is_equal


def draw_grads(params, rng):
    # Laid out as the parameter, as autograd does: the fused kernel takes numbers in the order of memory.
    return [torch.empty_like(each).copy_(torch.randn(each.shape, generator=rng)).detach() for each in params]


def step_alone(member, grads):
    for parameter, grad in zip(member.network.parameters(), grads, strict=True):
        parameter.grad = grad
    member.optimizer.step()


def test_adam_steps_as_each_members_own_optimizer_bit_for_bit():
    rng = torch.Generator().manual_seed(0)
    differing = [
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-2, "weight_decay": 0.3},
        {"learning_rate": 4e-2, "schedule": [(1, 0.25)]},
    ]
    members, alone = make_members(differing=differing), make_members(differing=differing)
    for member in (*members, *alone):
        member.set_learning_rate()
    for _ in range(3):
        grads = draw_grads(members[1].network.parameters(), rng)
        step_alone(members[1], grads)
        step_alone(alone[1], grads)
    params = [stack(each) for each in zip(*(member.network.parameters() for member in members), strict=True)]
    optimizer = StackedAdam(members, params)
    for _ in range(4):
        for parameter in params:
            (parameter.grad,) = draw_grads([parameter], rng)
        for slot, member in enumerate(alone):
            step_alone(member, [parameter.grad[slot] for parameter in params])
        optimizer.step()
        assert all(parameter.grad is None for parameter in params)
    optimizer.write_back()
    for slot, (member, own) in enumerate(zip(members, alone, strict=True)):
        assert_close_optimizers(member, own, tolerance=0)
        assert member.optimizer.state_dict()["state"][0]["step"] == (7 if slot == 1 else 4)
        for parameter, expected in zip(params, own.network.parameters(), strict=True):
            assert torch.equal(parameter[slot], expected)


class EveryKernel(nn.Module):
    """Kernels with what the U-Net does not ask of them."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.norm = nn.BatchNorm2d(8, momentum=0.3)
        self.last = nn.Conv2d(10, 3, 1, bias=False)

    def forward(self, x):
        small = nn.functional.max_pool2d(x, 2)
        y = self.norm(self.grouped(self.strided(x)))
        top, indices = nn.functional.max_pool2d(y, 2, return_indices=True)
        return self.last(torch.cat([y, small], 1)), torch.cat([top.flatten(2), indices.flatten(2)], dim=2)


@pytest.mark.parametrize("is_shared", [True, False])
def test_kernels_are_those_of_each_member(is_shared):
    rng = torch.Generator().manual_seed(0)
    members = [EveryKernel().double() for _ in range(3)]
    x = torch.randn((3, 2, 2, 12, 8), generator=rng, dtype=torch.float64)
    x = x[0] if is_shared else x
    params, buffers = stack_module_state(members)
    expected = [member(x if is_shared else x[slot]) for slot, member in enumerate(members)]
    sum(each.square().sum() for outputs in expected for each in outputs).backward()
    base = copy.deepcopy(members[0])
    with SideBySide():
        outputs = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), in_dims=(0, 0, None if is_shared else 0))(
            params, buffers, x
        )
    sum(each.square().sum() for each in outputs).backward()
    for slot, member in enumerate(members):
        for output, alone in zip(outputs, expected[slot], strict=True):
            torch.testing.assert_close(output[slot], alone)
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(params[name].grad[slot], parameter.grad)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][slot], buffer)


class CountReadBacks(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: a value of a tensor that Python asks for."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::item")
        self.n += func.name().split(".")[0] in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_python_asks_for_no_value_within_an_epoch(normalization):
    members = make_members(normalization)
    with CountReadBacks() as counter:
        losses, _ = train_side_by_side(members)
    assert counter.n == 0
    with CountReadBacks() as counter:
        losses[0, 0].item()
    assert counter.n > 0, "the test needs a counter that counts"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_side_by_side_on_the_gpu_train_as_each_alone(precision):
    members, alone = (make_members(data=make_data(device="cuda:0")) for _ in range(2))
    expected = train_alone(alone, n_epochs=3, precision=precision)
    losses, _ = train_side_by_side(members, n_epochs=3, precision=precision)
    torch.testing.assert_close(losses.cpu(), expected, rtol=0, atol=2e-2)
