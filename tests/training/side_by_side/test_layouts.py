"""Layouts: however members share a device, each becomes what it becomes alone, and ends alone if it has to."""

import functools
import gc
import math
import threading
import weakref

import numpy as np
import pytest
import torch

from frem_search.data.augmentation.turns import Augmentation
from frem_search.data.borders import border_distances
from frem_search.segmentation.metrics import METRICS, Score
from frem_search.segmentation.networks import build_network
from frem_search.system.device import make_repeatable
from frem_search.training import cohort as cohort_module
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.member import CURVE_COLUMNS, Member
from frem_search.training.resident import Images, Part, ResidentData
from frem_search.training.side_by_side import graphs as graphs_module
from frem_search.training.side_by_side import layouts as layouts_module
from frem_search.training.side_by_side import stacked as stacked_module
from frem_search.training.side_by_side.graphs import Graphed, train_epoch_graphed
from frem_search.training.side_by_side.layouts import LAYOUTS, in_threads
from frem_search.training.side_by_side.stacked import stack_key
from frem_search.training.trial import Folds

DIFFERING = (
    {},
    {"B": 8, "learning_rate": 3e-3},
    {"X": 1000.0, "weight": 0.6},
    {"B": 1, "X": 3.0, "weight": 0.1, "learning_rate": 2e-2},
)
SETTINGS = (  # of a member
    "augmentation", "weight_decay", "schedule", "patience", "steps_per_epoch", "tiles", "seed", "recalibrate",
)  # fmt: skip
N_EPOCHS, BATCH = 5, 4
SHORT, LONG = 8, 40  # training images: 2 steps an epoch, and 10
# A stack's kernels add in another order, and Adam makes a rounding grow: tests/training/side_by_side/test_stacked.py.
STACKED_TOLERANCE = 2e-3
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
)


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def _no_thread_of_a_member_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("member")] == []


class NoStream:
    """Stands for a CUDA stream where all work is done in the order in which it is asked for."""

    def __init__(self, _device=None):
        pass

    def wait_stream(self, _other):
        pass


def run_when_replayed(work, stream):
    """Stand for `capture`: the warm-ups are run, and what a graph would replay is run then."""
    for _ in range(graphs_module.WARM_UPS):
        work()
    return lambda stream: work()


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """CUDA graphs by stand-ins that show what is left of the warm-up, and what a replay reads."""
    monkeypatch.setattr(graphs_module, "capture", run_when_replayed)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    """The name of a layout; one for CUDA alone runs on the CPU by stand-ins."""
    if "cpu" not in LAYOUTS[request.param].devices:
        request.getfixturevalue("graphs_on_cpu")
    return request.param


@functools.cache
def make_data(n=SHORT, *, size=16, device="cpu"):
    """A bright square on noise: class 1 can be told by its brightness."""
    rng = np.random.default_rng(0)
    labels = np.zeros((n + 4, size, size), np.uint8)
    for label in labels:
        top, left = rng.integers(0, size // 2, 2)
        label[top : top + size // 2, left : left + size // 2] = 1
    images = (labels[:, None] - 0.5 + 0.5 * rng.standard_normal((n + 4, 1, size, size))).astype(np.float32)
    images = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(labels).to(device)
    border = torch.stack([torch.from_numpy(border_distances(label.cpu().numpy())) for label in labels]).to(device)
    whole, rows = Images(images, labels, border), torch.arange(n + 4, device=device)
    train, val = (Part(tuple(map(str, range(n + 4)))[part], whole, rows[part]) for part in (slice(n), slice(n, None)))
    return ResidentData(train, val, val, 2, torch.device(device))


def make_member(key=0, *, data=None, n_epochs=N_EPOCHS, **params):
    rate, weight = params.pop("learning_rate", 1e-2), params.pop("weight", 0.3)
    batch_size, params_of_loss = params.pop("batch_size", BATCH), params.pop("coefficients", None)
    settings = {name: params.pop(name) for name in SETTINGS if name in params}
    wanted = {"base_channels": 4, "depth": 1, "B": 4, "X": 100.0, "supervision": True} | params
    data = data or make_data()
    network = build_network("unet", in_channels=1, n_classes=2, seed=0, params=wanted).to(data.device)
    coefficients = params_of_loss or {"lambda": weight}
    return Member(key, network, data, coefficients, rate, batch_size, n_epochs, **settings)


def make_members(**of_all):
    return [make_member(key, **of_all, **params) for key, params in enumerate(DIFFERING)]


def make_cohort(*members, precision="fp32", loss="softmax_cross_entropy", metric="mean_iou"):
    cohort = Cohort(loss=loss, metric=metric, precision=precision)
    for member in members:
        cohort.admit(member)
    return cohort


def train(layout, *members, **settings):
    """Train members side by side; return what was reported of each."""
    reports = list(LAYOUTS[layout].function(make_cohort(*members, **settings)))
    return {member.key: [report for report in reports if report.key == member.key] for member in members}


def train_alone(member, **settings):
    cohort = make_cohort(**settings)
    while member.is_active:
        assert cohort.train_epoch(member).error is None
    return member


@functools.cache
def alone(which, *, n_images=SHORT):
    """One of `DIFFERING` as it becomes alone; do not change it."""
    return train_alone(make_member(which, data=make_data(n_images), **DIFFERING[which]))


def assert_as_alone(member, expected, *, layout):
    """Expect what the other was after as many epochs: every bit, but for a stack."""
    n = member.epoch
    assert member.curve["epoch"] == list(range(1, n + 1))
    is_exact = layout != "stacked"
    compared = [column for column in CURVE_COLUMNS if column not in ("epoch", "per_class", "seconds")]
    for column in compared:
        values, others = member.curve[column], expected.curve[column][:n]
        if column == "train_loss" or (is_exact and column in ("train_iou", "val_loss", "score", "best_score")):
            assert values == (others if is_exact else pytest.approx(others, rel=0, abs=STACKED_TOLERANCE)), column
        elif column not in ("train_iou", "score", "best_score"):  # graphs sum magnitudes in another order
            assert values == pytest.approx(others, rel=1e-5 if is_exact else 2e-2), column
    if is_exact and n == expected.epoch:
        assert_same_state(member, expected)


def assert_same_state(member, expected):
    for name, value in member.network.state_dict().items():
        assert torch.equal(value, expected.network.state_dict()[name]), name
    ours, theirs = (each.optimizer.state_dict()["state"] for each in (member, expected))
    assert list(ours) == list(theirs)
    for index, state in ours.items():
        assert all(torch.equal(value, theirs[index][name]) for name, value in state.items())


def raising(error):
    def act(*_, **__):
        raise error

    return act


# ---- Numbers.


def test_members_side_by_side_train_for_fifty_steps_as_each_alone(layout):
    members = make_members(data=make_data(LONG))
    reports = train(layout, *members)
    for member in members:
        assert [(report.epoch, report.error) for report in reports[member.key]] == [(n, None) for n in range(1, 6)]
        assert_as_alone(member, alone(member.key, n_images=LONG), layout=layout)
        assert member.curve["train_loss"][-1] < member.curve["train_loss"][0] - 0.2
    assert len({member.curve["train_loss"][-1] for member in members}) == len(members)


def test_slots_are_refilled_while_the_others_go_on(layout):
    members = [make_member(key, n_epochs=n, **DIFFERING[key]) for key, n in enumerate((2, 3, N_EPOCHS, 4))]
    waiting = [make_member(key, n_epochs=3, **DIFFERING[key - 10]) for key in (11, 10)]
    cohort, seen = make_cohort(*members), []
    for report in LAYOUTS[layout].function(cohort):
        seen.append((report.key, report.epoch, report.error))
        if len(seen) == 1:
            cohort.admit(late := make_member(12, n_epochs=2, **DIFFERING[2]))
        if report.is_done:
            cohort.release(report.key)
            if waiting:
                cohort.admit(waiting[-1])
                members.append(waiting.pop())
    members.append(late)
    assert sorted(seen, key=lambda each: each[:2]) == [
        (member.key, epoch, None)
        for member in sorted(members, key=lambda each: each.key)
        for epoch in range(1, member.n_epochs + 1)
    ]
    first_done = next(i for i, (key, epoch, _) in enumerate(seen) if (key, epoch) == (0, 2))
    assert any(key < 10 for key, _, _ in seen[first_done + 1 :]), "the test needs members that go on"
    for member in members:
        assert member.is_done
        assert_as_alone(member, alone(member.key % 10), layout=layout)


def test_members_of_different_shapes_and_image_sizes_share_a_cohort(layout):
    def members():
        small, large = make_data(), make_data(size=24)
        return [
            make_member(0, data=small, n_epochs=2),
            make_member(1, data=large, n_epochs=2, B=8),
            make_member(2, data=small, n_epochs=2, depth=2),
            make_member(3, data=large, n_epochs=2, X=3.0),
            make_member(4, data=small, n_epochs=2, batch_size=2, X=7.0),
        ]

    together = members()
    train(layout, *together)
    for member, expected in zip(together, members(), strict=True):
        assert_as_alone(member, train_alone(expected), layout=layout)


@pytest.mark.parametrize(
    "reading",
    [
        {"concatenation": "batch_norm"},
        {"concatenation": "batch_renorm", "upsampling": "nearest"},
        {"concatenation": "batch_renorm_unlimited"},
        {"concatenation": "batch_statistics", "normalization": "none"},
        {"concatenation": "batch_renorm", "enhanced_before_gate": True},
    ],
    ids=str,
)
def test_members_of_every_reading_recalibrated_or_not_and_with_seeds_of_their_own_are_as_alone(layout, reading):
    own = ({"B": 8}, {"X": 1000.0, "seed": 3}, {"recalibrate": True}, {"recalibrate": True, "seed": 3})

    def members():
        return [make_member(key, n_epochs=2, learning_rate=3e-3, **reading, **each) for key, each in enumerate(own)]

    together = members()
    train(layout, *together)
    for member, expected in zip(together, members(), strict=True):
        assert_as_alone(member, train_alone(expected), layout=layout)


def test_members_whose_module_stands_elsewhere_are_not_stacked():
    one, other = make_member(0), make_member(1, enhanced_before_gate=True)
    assert stack_key(one) != stack_key(other)


def test_recalibration_changes_the_score_and_not_the_training():
    plain, recalibrated = (train_alone(make_member(X=300.0, recalibrate=each)) for each in (False, True))
    assert plain.curve["train_loss"] == recalibrated.curve["train_loss"]
    assert plain.curve["score"] != recalibrated.curve["score"]
    assert_same_state(plain, recalibrated)
    assert any(
        not torch.equal(value, recalibrated.best_weights[name])
        for name, value in plain.best_weights.items()
        if "running" in name
    )


ELASTIC = ("alpha", "fixed_alpha", "elastic_share", "elastic_from", "sigma_elastic")
STUDIES = (
    {"alpha": 4.0, "elastic_from": 0.0, "elastic_share": 0.5, "weight_decay": 1e-3},
    {"alpha": 8.0, "elastic_from": 0.3, "sigma_border": 3.0},
    {"alpha": 8.0, "elastic_from": 2.0, "sigma_elastic": 3.0, "learning_rate": 3e-3},  # never reached
    {"alpha": 2.0, "fixed_alpha": True, "elastic_from": 0.3, "weight_decay": 1e-2, "omega_0": 1.0},
)


def make_studied(n_epochs=N_EPOCHS, *, which=range(4), data=None):
    """Members as a study after the compressed U-Net has them: everything that changes from epoch to epoch at once."""
    members = []
    for key in which:
        given = dict(STUDIES[key])
        elastic = {name: given.pop(name) for name in ELASTIC if name in given}
        coefficients = {name: given.pop(name, usual) for name, usual in (("omega_0", 10.0), ("sigma_border", 5.0))}
        augmentation = Augmentation(rotation=True, mirror_quarters=0.3, crop_size=(12, 12), **elastic)
        settings = {"schedule": ((2, 0.5), (4, 0.1)), "steps_per_epoch": 3, "batch_size": 3, "tiles": 2}
        settings |= {"augmentation": augmentation, "coefficients": coefficients, "supervision": False}
        members.append(make_member(key, n_epochs=n_epochs, data=data, **settings, **given))
    return members


@functools.cache
def studied_alone(which):
    (member,) = make_studied(which=[which])
    return train_alone(member, loss="border_cross_entropy")


def test_members_whose_images_rates_and_weights_change_train_as_each_alone(layout):
    members = make_studied()
    reports = train(layout, *members, loss="border_cross_entropy")
    for member in members:
        assert [(report.epoch, report.error) for report in reports[member.key]] == [(n, None) for n in range(1, 6)]
        assert_as_alone(member, studied_alone(member.key), layout=layout)
    began = [next(e for e, s in enumerate(m.curve["best_score"], start=2) if s >= 0.3) for m in members[1::2]]
    assert max(began) <= N_EPOCHS, "the test needs scores after which images are deformed"


def test_a_curriculum_changes_nothing_before_it_begins_and_all_after_it():
    never, plain = studied_alone(2), make_studied(which=[2])[0]
    plain.augmentation = Augmentation(rotation=True, mirror_quarters=0.3, crop_size=(12, 12))
    train_alone(plain, loss="border_cross_entropy")
    assert plain.curve["train_loss"] == never.curve["train_loss"]
    later, plain = studied_alone(1), make_studied(which=[1])[0]
    plain.augmentation = never.augmentation
    train_alone(plain, loss="border_cross_entropy")
    begins = next(i for i, score in enumerate(later.curve["best_score"], start=1) if score >= 0.3)
    assert plain.curve["train_loss"][:begins] == later.curve["train_loss"][:begins]
    assert plain.curve["train_loss"][begins] != later.curve["train_loss"][begins]


@pytest.mark.parametrize("at", [1, 3])
def test_a_checkpoint_in_the_middle_of_all_that_goes_on_in_a_cohort_and_alone(layout, at):
    members = make_studied(n_epochs=at)
    train(layout, *members, loss="border_cross_entropy")
    restored = make_studied()
    for member, fresh in zip(members, restored, strict=True):
        assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [member]), identity={}), identity={})
    train(layout, *restored[:2], loss="border_cross_entropy")
    for fresh in restored[:2]:
        assert_as_alone(fresh, studied_alone(fresh.key), layout=layout)
    for fresh in restored[2:]:
        assert_as_alone(train_alone(fresh, loss="border_cross_entropy"), studied_alone(fresh.key), layout=layout)


def test_half_precision_in_threads_is_that_of_each_alone_bit_for_bit():
    members = make_members(
        n_epochs=2
    )  # in_turn: tests/training/test_cohort.py, stacked: tests/training/side_by_side/test_stacked.py
    train("threads", *members, precision="bf16")
    for member, expected in zip(members, make_members(n_epochs=2), strict=True):
        assert_as_alone(member, train_alone(expected, precision="bf16"), layout="threads")


def test_a_checkpoint_from_a_cohort_goes_on_alone_and_one_from_alone_goes_on_in_a_cohort(layout):
    members = make_members(n_epochs=2)
    train(layout, *members)
    for member in members:
        fresh = make_member(member.key, **DIFFERING[member.key])
        assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [member]), identity={}), identity={})
        assert_as_alone(train_alone(fresh), alone(member.key), layout=layout)
    begun = [train_alone(member) for member in make_members(n_epochs=2)]
    restored = make_members()
    for member, fresh in zip(begun, restored, strict=True):
        assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [member]), identity={}), identity={})
    train(layout, *restored)
    for member in restored:
        assert_as_alone(member, alone(member.key), layout=layout)


# ---- Ends.


def test_a_cohort_without_members_ends_at_once(layout):
    assert list(LAYOUTS[layout].function(make_cohort())) == []


def test_a_finished_member_is_not_trained_further(layout):
    member = train_alone(make_member(n_epochs=1))
    assert train(layout, member) == {0: []}
    assert member.epoch == 1


def test_a_member_whose_loss_is_no_number_ends_alone(layout):
    members = make_members(n_epochs=3)
    with torch.no_grad():
        members[1].network.head.weight.fill_(math.nan)
    reports = train(layout, *members)
    (report,) = reports[1]
    assert (report.epoch, report.is_finite, report.error, members[1].has_ended) == (1, False, None, True)
    for key in (0, 2, 3):
        assert [(report.epoch, report.is_finite) for report in reports[key]] == [(1, True), (2, True), (3, True)]
        assert_as_alone(members[key], alone(key), layout=layout)


@pytest.mark.parametrize("which", [0, 2])
def test_a_member_whose_network_raises_ends_alone(layout, which):
    members, error = make_members(n_epochs=3), ZeroDivisionError("a bug in a network")
    members[which].network.forward = raising(error)
    reports = train(layout, *members)
    (report,) = reports[which]
    assert (report.error, report.is_finite, report.is_done, report.epoch) == (error, False, False, 0)
    assert members[which].has_ended
    for key in {0, 1, 2, 3} - {which}:
        assert [(report.epoch, report.error) for report in reports[key]] == [(1, None), (2, None), (3, None)]
        assert_as_alone(members[key], alone(key), layout=layout)


def test_a_member_whose_metric_raises_ends_alone(layout, monkeypatch):
    members, error = make_members(n_epochs=3), ZeroDivisionError("a bug in a metric")
    # None of the code of a captured metric runs again.
    score, fails_in = cohort_module.score_images, 1 if layout == "graphs" else 2

    def fails_for_one(network, *args, **kwargs):
        if network is members[2].network and members[2].epoch + 1 == fails_in:
            raise error
        return score(network, *args, **kwargs)

    monkeypatch.setattr(cohort_module, "score_images", fails_for_one)
    reports = train(layout, *members)
    assert [report.error for report in reports[2]] == [None] * (fails_in - 1) + [error]
    assert (members[2].epoch, members[2].has_ended) == (fails_in - 1, True)
    for key in (0, 1, 3):
        assert [(report.epoch, report.error) for report in reports[key]] == [(1, None), (2, None), (3, None)]
        assert_as_alone(members[key], alone(key), layout=layout)


def test_all_members_may_end_by_what_they_raise(layout):
    members = make_members()
    for member in members:
        member.network.forward = raising(ZeroDivisionError())
    assert [len(each) for each in train(layout, *members).values()] == [1] * len(members)


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_lack_of_memory_is_raised_for_all(layout, which, error):
    members = make_members()
    members[which].network.forward = raising(error)
    with pytest.raises(type(error)) as raised:
        train(layout, *members)
    assert raised.value is error
    assert not any(member.has_ended for member in members)


def test_lack_of_memory_in_a_stack_is_not_tried_again_with_each_alone(monkeypatch):
    members, n_alone = make_members(), []
    monkeypatch.setattr(stacked_module, "train_stacked", raising(OUT_OF_MEMORY[0]))
    monkeypatch.setattr(cohort_module, "train_alone", lambda *_, **__: n_alone.append(1))
    with pytest.raises(torch.OutOfMemoryError):
        train("stacked", *members)
    assert n_alone == []


def test_a_released_member_is_reported_no_more(layout):
    cohort, seen = make_cohort(*make_members(n_epochs=3)), []
    for report in LAYOUTS[layout].function(cohort):
        seen.append(report.key)
        if len(seen) == 1:
            gone = [key for key in (0, 1, 2, 3) if key != report.key][:2]
            for key in gone:
                cohort.release(key)
    assert sorted(seen) == sorted([key for key in (0, 1, 2, 3) if key not in gone] * 3)


def test_a_released_member_that_would_raise_is_reported_no_more(layout):
    members = make_members(n_epochs=2)
    for member in members[:2]:
        member.network.forward = raising(ZeroDivisionError())
    cohort, seen = make_cohort(*members), []
    for report in LAYOUTS[layout].function(cohort):
        if report.error and not seen:
            cohort.release(1 - report.key)
        seen.append((report.key, report.error is not None))
    assert len([key for key, has_raised in seen if has_raised]) == 1
    assert [seen.count((key, False)) for key in (2, 3)] == [2, 2]


def test_a_member_that_replaces_another_of_its_key_is_trained_from_its_own_epoch(layout):
    cohort = make_cohort(make_member(0, n_epochs=3), make_member(1, n_epochs=3))
    seen = []
    for report in LAYOUTS[layout].function(cohort):
        seen.append((report.key, report.epoch))
        if len(seen) == 1:
            # The other one may be in the middle of its epoch, of which nobody is told any more.
            cohort.release(replaced := 1 - report.key)
            cohort.admit(make_member(replaced, n_epochs=2))
        if seen[-1] == (1 - replaced, 2) and seen.count(seen[-1]) == 1:
            cohort.release(1 - replaced)
            cohort.admit(make_member(1 - replaced, n_epochs=2))
    assert [epoch for key, epoch in seen if key == replaced] == [1, 2]
    assert [epoch for key, epoch in seen if key != replaced] == [1, 2, 1, 2]


@pytest.mark.parametrize("n_reports", [1, 3])
def test_closing_leaves_every_member_at_the_end_of_an_epoch(layout, n_reports):
    members = make_members()
    reports = LAYOUTS[layout].function(make_cohort(*members))
    for _ in range(n_reports):
        next(reports)
    reports.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("member")]
    assert any(member.is_active for member in members)
    for member in members:
        assert_as_alone(train_alone(member), alone(member.key), layout=layout)


# ---- Threads.


def test_nobody_waits_for_the_slowest_in_threads(monkeypatch):
    monkeypatch.setattr(layouts_module, "n_cores", lambda: 2)
    slow, quick = make_member(0, n_epochs=1), make_member(1, n_epochs=3)
    may_go_on, forward = threading.Event(), slow.network.forward

    def wait_and_compute(x):
        assert may_go_on.wait(60)
        return forward(x)

    slow.network.forward = wait_and_compute
    seen = []
    for report in in_threads(make_cohort(slow, quick)):
        seen.append((report.key, report.epoch, report.error))
        if len(seen) == 3:
            may_go_on.set()
    assert seen == [(1, 1, None), (1, 2, None), (1, 3, None), (0, 1, None)]


def test_as_many_members_train_at_a_time_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(layouts_module, "n_cores", lambda: 2)
    members, both, lock, inside, most = make_members(n_epochs=1), threading.Barrier(2), threading.Lock(), [], []
    train_epoch = Cohort.train_epoch

    def counted(cohort, member):
        with lock:
            inside.append(member)
            most.append(len(inside))
        both.wait(60)
        report = train_epoch(cohort, member)
        with lock:
            inside.remove(member)
        return report

    monkeypatch.setattr(Cohort, "train_epoch", counted)
    assert [len(each) for each in train("threads", *members).values()] == [1] * 4
    assert max(most) == 2


# ---- Graphs.


def untouched(member):
    optimizer = {p: {n: v.clone() for n, v in each.items()} for p, each in member.optimizer.state.items()}
    return {name: value.clone() for name, value in member.network.state_dict().items()}, optimizer


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize("normalization", ["batch_norm", "batch_renorm"])
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_capture_leaves_no_trace_of_its_warm_up(n_before, normalization):
    cohort, member = make_cohort(), make_member(normalization=normalization)
    for _ in range(n_before):
        cohort.train_epoch(member)
    network, optimizer = untouched(member)
    at = {name: value.data_ptr() for name, value in member.network.state_dict().items()}
    Graphed(cohort, member)
    assert (member.epoch, member.curve["epoch"]) == (n_before, list(range(1, n_before + 1)))
    for name, value in member.network.state_dict().items():
        # But for the enhanced maps, which are those of the epoch that comes.
        assert name.endswith("gain") or torch.equal(value, network[name]), name
        assert value.data_ptr() == at[name], name
    assert len(member.optimizer.state) == len(list(member.network.parameters()))
    for parameter, state in member.optimizer.state.items():
        for name, value in state.items():
            expected = optimizer[parameter][name] if n_before else torch.zeros_like(value)
            assert torch.equal(value, expected), name


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_graphed_member_trains_as_alone_bit_for_bit(n_before):
    cohort = make_cohort()
    member, expected = make_member(**DIFFERING[3]), alone(3)
    for _ in range(n_before):
        cohort.train_epoch(member)
    graph = Graphed(cohort, member)
    for epoch in range(n_before + 1, N_EPOCHS + 1):
        (report,) = train_epoch_graphed(cohort, [graph])
        assert (report.epoch, report.train_loss) == (epoch, expected.curve["train_loss"][epoch - 1])
    assert_as_alone(member, expected, layout="graphs")


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize(("n_images", "batch_size"), [(1, 1), (8, 8), (3, 2), (7, 3)])
def test_epochs_shorter_than_the_warm_up_and_odd_ones_are_graphed(n_images, batch_size):
    data = make_data(n_images)
    member, expected = (make_member(data=data, batch_size=batch_size, n_epochs=3) for _ in range(2))
    assert [report.error for report in train("graphs", member)[0]] == [None] * 3
    assert_as_alone(member, train_alone(expected), layout="graphs")


@pytest.mark.usefixtures("graphs_on_cpu")
def test_members_of_different_numbers_of_steps_are_graphed_side_by_side():
    sizes = (2, 8, 3)
    members, expected = ([make_member(key, batch_size=n, n_epochs=2) for key, n in enumerate(sizes)] for _ in range(2))
    train("graphs", *members)
    for member, other in zip(members, expected, strict=True):
        assert_as_alone(member, train_alone(other), layout="graphs")


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_capture_that_fails_in_its_warm_up_leaves_the_member_as_it_was():
    cohort, member = make_cohort(), make_member()
    cohort.train_epoch(member)
    network, optimizer = untouched(member)
    forward, calls = member.network.forward, []

    def fails_later(x):
        calls.append(member.network.training)
        if calls.count(True) == 2:
            raise OUT_OF_MEMORY[0]
        return forward(x)

    member.network.forward = fails_later
    with pytest.raises(torch.OutOfMemoryError):
        Graphed(cohort, member)
    for name, value in member.network.state_dict().items():
        assert name.endswith("gain") or torch.equal(value, network[name]), name
    for parameter, state in member.optimizer.state.items():
        assert all(torch.equal(value, optimizer[parameter][name]) for name, value in state.items())


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_member_is_captured_once_and_its_graphs_go_with_it(monkeypatch):
    captured = []

    class Watched(Graphed):
        def __init__(self, cohort, member):
            captured.append(member.key)
            super().__init__(cohort, member)

    monkeypatch.setattr(layouts_module, "Graphed", Watched)
    cohort = make_cohort(*(first := [make_member(key, n_epochs=2 + 2 * key) for key in (0, 1)]))
    gone = weakref.ref(first.pop(0))
    for report in LAYOUTS["graphs"].function(cohort):
        if report.key == 0 and report.is_done:
            cohort.release(0)
            cohort.admit(make_member(2, n_epochs=2))
        if report.key == 2:
            gc.collect()
            assert gone() is None
    assert captured == [0, 1, 2]


ON_CPU = [name for name, metric in METRICS.items() if not metric.on_device]


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize(("metric", "tiles"), [*((name, 1) for name in ON_CPU), ("v_rand", 2)])
def test_a_metric_on_the_cpu_is_computed_outside_of_the_graph(monkeypatch, metric, tiles):
    in_graph, was_in_graph = [], []

    def marked(work, stream):
        def mark_and_work():
            in_graph.append(work)
            work()
            in_graph.pop()

        return run_when_replayed(mark_and_work, stream)

    def watched(pred, target, *, n_classes):
        was_in_graph.append(bool(in_graph))
        return Score(pred.double().mean(dim=(0, -2, -1)).ravel()[-1], torch.zeros(n_classes))  # differs in every epoch

    monkeypatch.setattr(graphs_module, "capture", marked)
    monkeypatch.setitem(METRICS, metric, METRICS[metric]._replace(function=watched))
    member = make_member(tiles=tiles, **DIFFERING[3])
    train("graphs", member, metric=metric)
    assert was_in_graph == [False] * N_EPOCHS
    expected = train_alone(make_member(tiles=tiles, **DIFFERING[3]), metric=metric)
    assert_as_alone(member, expected, layout="graphs")
    assert len(set(member.curve["score"])) > 2


@pytest.mark.usefixtures("graphs_on_cpu")
def test_a_metric_on_the_cpu_that_raises_ends_its_member_alone(monkeypatch):
    members, error, n_scored = make_members(n_epochs=3), ZeroDivisionError("a bug in a metric"), []
    score = METRICS["v_rand"].function

    def fails_for_one(*args, **kwargs):
        n_scored.append(1)
        if len(n_scored) == len(members) + 3:  # the third member's second epoch
            raise error
        return score(*args, **kwargs)

    monkeypatch.setitem(METRICS, "v_rand", METRICS["v_rand"]._replace(function=fails_for_one))
    reports = train("graphs", *members, metric="v_rand")
    assert [(report.epoch, report.error) for report in reports[2]] == [(1, None), (1, error)]
    assert members[2].has_ended
    for key in (0, 1, 3):
        assert [(report.epoch, report.error) for report in reports[key]] == [(1, None), (2, None), (3, None)]


@pytest.mark.usefixtures("graphs_on_cpu")
def test_lack_of_memory_while_a_metric_on_the_cpu_reads_is_raised_for_all(monkeypatch):
    members = make_members(n_epochs=1)
    monkeypatch.setitem(METRICS, "seg", METRICS["seg"]._replace(function=raising(OUT_OF_MEMORY[0])))
    with pytest.raises(torch.OutOfMemoryError):
        train("graphs", *members, metric="seg")
    assert not any(member.has_ended for member in members)


# ---- With a GPU.

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if "cuda" in layout.devices])
def test_members_side_by_side_on_the_gpu_train_as_each_alone(name, precision):
    device = "cuda:0"
    make_repeatable(torch.device(device))
    members, expected = (make_members(data=make_data(device=device), n_epochs=3) for _ in range(2))
    reports = train(name, *members, precision=precision)
    for member, other in zip(members, expected, strict=True):
        assert [report.error for report in reports[member.key]] == [None] * 3
        train_alone(other, precision=precision)
        assert member.curve["train_loss"] == pytest.approx(other.curve["train_loss"], rel=0, abs=2e-2)
        assert member.optimizer.state_dict()["state"][0]["step"] == 6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("metric", ON_CPU)
def test_scores_computed_on_the_cpu_are_those_of_each_alone_on_the_gpu(metric):
    device = "cuda:0"
    make_repeatable(torch.device(device))
    members, expected = (make_members(data=make_data(device=device), n_epochs=2) for _ in range(2))
    train("graphs", *members, metric=metric)
    for member, other in zip(members, expected, strict=True):
        train_alone(other, metric=metric)
        assert member.curve["score"] == pytest.approx(other.curve["score"], rel=0, abs=2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if "cuda" in layout.devices])
def test_images_rates_and_weights_that_change_from_epoch_to_epoch_are_followed_on_the_gpu(name):
    device = "cuda:0"
    make_repeatable(torch.device(device))
    members, expected = (make_studied(data=make_data(device=device)) for _ in range(2))
    reports = train(name, *members, loss="border_cross_entropy")
    for member, other in zip(members, expected, strict=True):
        assert [report.error for report in reports[member.key]] == [None] * N_EPOCHS
        train_alone(other, loss="border_cross_entropy")
        assert member.curve["train_loss"] == pytest.approx(other.curve["train_loss"], rel=0, abs=2e-2)
        assert member.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 * member.learning_rate)


@pytest.mark.gpu
@needs_gpu
def test_graphs_are_refilled_and_go_on_from_checkpoints_on_the_gpu():
    device = "cuda:0"
    make_repeatable(torch.device(device))
    data = make_data(device=device)
    begun = train_alone(make_member(0, data=data, n_epochs=2))
    fresh, expected = (make_member(0, data=data) for _ in range(2))
    assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [begun]), identity={}), identity={})
    cohort = make_cohort(make_member(1, data=data, n_epochs=1), make_member(2, data=data, n_epochs=4))
    for report in LAYOUTS["graphs"].function(cohort):
        assert report.error is None
        if report.key == 1:
            cohort.release(1)
            cohort.admit(fresh)
    train_alone(expected)
    assert fresh.curve["train_loss"] == pytest.approx(expected.curve["train_loss"], rel=0, abs=2e-3)
