"""Training: what a member becomes depends on its parameters and the seed, not on company or interruptions."""

import copy
import hashlib
import io
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch.utils._python_dispatch import TorchDispatchMode

from frem_search.data.augmentation.order import epoch_batches
from frem_search.data.augmentation.turns import Augmentation, turn_and_flip
from frem_search.data.borders import border_distances
from frem_search.data.dataset import Dataset
from frem_search.data.folds import Split
from frem_search.errors import DatasetError, DeviceError, DeviceMemoryError, UsageError
from frem_search.segmentation.inference import EVAL_BATCH, predict, score_images
from frem_search.segmentation.networks import build_network, enhancement
from frem_search.system import device as device_module
from frem_search.system.device import (
    best_precision,
    device_errors,
    find_device,
    is_of_device,
    is_out_of_memory,
    make_repeatable,
)
from frem_search.training import batches as batches_module
from frem_search.training import cohort as cohort_module
from frem_search.training.batches import EpochPlan, prepare_epoch
from frem_search.training.checkpoint import dump_checkpoint, load_checkpoint
from frem_search.training.cohort import Cohort
from frem_search.training.member import CURVE_COLUMNS, Member
from frem_search.training.resident import load_resident
from frem_search.training.side_by_side.layouts import in_turn
from frem_search.training.side_by_side.stacked import train_epoch_stacked
from frem_search.training.trial import Folds

CPU = torch.device("cpu")
IDENTITY = {"study": "s", "number": 0}
SETTINGS = (
    "augmentation",
    "weight_decay",
    "schedule",
    "patience",
    "steps_per_epoch",
    "tiles",
    "recalibrate",
)  # of a member
PRECISIONS = ["fp32", "bf16"]  # PyTorch computes bf16 on every CPU, only slower than fp32 on some


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def make_dataset(*, n_train=6, n_val=2, n_test=2, size=(16, 16), channels=1):
    """A bright square on noise: class 1 can be told by its brightness."""
    rng = np.random.default_rng(0)
    n = n_train + n_val + n_test
    labels = np.zeros((n, *size), dtype=np.uint8)
    for label in labels:
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        label[top : top + size[0] // 2, left : left + size[1] // 2] = 1
    images = (labels[:, None] - 0.5 + 0.5 * rng.standard_normal((n, channels, *size))).astype(np.float32)
    cases = tuple(f"case{i}" for i in range(n))
    split = Split(cases[:n_train], cases[n_train : n_train + n_val], cases[n_train + n_val :])
    return Dataset("d", None, ("ground", "square"), ("grey",) * channels, cases, images, labels, (split,), "0" * 64)


def make_cohort(*, precision="fp32"):
    return Cohort(loss="softmax_cross_entropy", metric="mean_iou", precision=precision)


def make_member(key=0, *, n_epochs=4, seed=0, channels=1, dataset=None, device=CPU, **params):
    rate, batch_size = params.pop("learning_rate", 1e-2), params.pop("batch_size", 4)
    settings = {name: params.pop(name) for name in SETTINGS if name in params}
    coefficients = {"lambda": params.pop("weight", 0.3)}
    wanted = {"base_channels": 4, "depth": 2, "B": 4, "X": 100.0} | params
    network = build_network("unet", in_channels=channels, n_classes=2, seed=seed, params=wanted).to(device)
    return Member(
        key=key,
        network=network,
        data=load_resident(dataset or make_dataset(), folds=[0], device=device)[0],
        coefficients=coefficients,
        learning_rate=rate,
        batch_size=batch_size,
        n_epochs=n_epochs,
        seed=seed,
        **settings,
    )


def train(member, cohort=None):
    cohort = cohort or make_cohort()
    cohort.admit(member)
    reports = list(in_turn(cohort))
    cohort.release(member.key)
    return reports


def curve(member):
    return {column: values for column, values in member.curve.items() if column != "seconds"}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_same(member, other):
    assert curve(member) == curve(other)
    assert (member.epoch, member.best_epoch, member.best_score) == (other.epoch, other.best_epoch, other.best_score)
    assert_same_weights(member.network.state_dict(), other.network.state_dict())
    assert_same_weights(member.best_weights, other.best_weights)


def test_training_is_repeatable():
    member, again = make_member(), make_member()
    train(member)
    train(again)
    assert_same(member, again)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_member_trains_the_same_alone_and_among_others(precision):
    alone, among = make_member(), make_member()
    train(alone, make_cohort(precision=precision))
    cohort = make_cohort(precision=precision)
    for member in (make_member(1, B=0), among, make_member(2, X=7.0, batch_size=3)):
        cohort.admit(member)
    list(in_turn(cohort))
    assert_same(alone, among)


def test_members_take_turns_epoch_by_epoch():
    cohort = make_cohort()
    for key in (3, 5):
        cohort.admit(make_member(key, n_epochs=2))
    assert [(report.key, report.epoch, report.is_done) for report in in_turn(cohort)] == [
        (3, 1, False),
        (5, 1, False),
        (3, 2, True),
        (5, 2, True),
    ]


def test_nothing_is_trained_before_it_is_asked_for():
    cohort, member = make_cohort(), make_member()
    cohort.admit(member)
    reports = in_turn(cohort)
    assert member.epoch == 0
    next(reports)
    assert member.epoch == 1
    reports.close()
    assert member.epoch == 1


def test_members_come_and_go_between_reports():
    cohort = make_cohort()
    for key in (0, 1):
        cohort.admit(make_member(key, n_epochs=3))
    seen = []
    for report in in_turn(cohort):
        seen.append((report.key, report.epoch))
        if seen == [(0, 1)]:
            cohort.release(1)
            cohort.admit(make_member(2, n_epochs=1))
    assert seen == [(0, 1), (0, 2), (2, 1), (0, 3)]


def test_a_member_that_replaces_another_of_its_key_is_trained_from_its_own_epoch():
    cohort = make_cohort()
    cohort.admit(make_member(0, n_epochs=3))
    reports = in_turn(cohort)
    assert next(reports).epoch == 1
    cohort.release(0)
    cohort.admit(make_member(0, n_epochs=2))
    assert [report.epoch for report in reports] == [1, 2]


def test_a_cohort_without_members_ends_at_once():
    assert list(in_turn(make_cohort())) == []


def test_a_finished_member_is_not_trained_further():
    member = make_member(n_epochs=1)
    cohort = make_cohort()
    train(member, cohort)
    assert train(member, cohort) == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("at", [1, 3])
def test_a_restored_checkpoint_goes_on_bit_for_bit(precision, at):
    straight = make_member()
    train(straight, make_cohort(precision=precision))
    broken, cohort = make_member(), make_cohort(precision=precision)
    cohort.admit(broken)
    for report in in_turn(cohort):
        if report.epoch == at:
            stored = dump_checkpoint(Folds(0, [broken]), identity=IDENTITY)
            break
    fresh = make_member()
    assert load_checkpoint(Folds(0, [fresh]), stored, identity=dict(IDENTITY))
    assert fresh.epoch == at
    reports = train(fresh, make_cohort(precision=precision))
    assert [report.epoch for report in reports] == list(range(at + 1, 5))
    assert_same(straight, fresh)


def test_what_is_stored_does_not_change_while_the_member_trains_on():
    cohort, member = make_cohort(), make_member()
    cohort.admit(member)
    reports = in_turn(cohort)
    next(reports)
    stored = dump_checkpoint(Folds(0, [member]), identity=IDENTITY)
    then = copy.deepcopy(member.network.state_dict())
    next(reports)
    fresh = make_member()
    assert load_checkpoint(Folds(0, [fresh]), stored, identity=IDENTITY)
    assert_same_weights(fresh.network.state_dict(), then)
    assert fresh.curve["epoch"] == [1]


def untouched(member):
    return (
        copy.deepcopy(member.network.state_dict()),
        copy.deepcopy(member.optimizer.state_dict()),
        (member.epoch, member.best_score, member.best_epoch, member.best_per_class, dict(member.best_weights)),
        copy.deepcopy(member.curve),
    )


def packed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stored():
    member = make_member(n_epochs=1)
    train(member)
    return dump_checkpoint(Folds(0, [member]), identity=IDENTITY)


def flipped(content, at):
    at %= len(content)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        *(pytest.param(lambda c, n=n: c[:n], id=f"first {n} bytes") for n in (0, 1, 31, 32, 33, 1000)),
        *(pytest.param(lambda c, n=n: c[:-n], id=f"without the last {n} bytes") for n in (1, 32, 5000)),
        *(pytest.param(lambda c, n=n: flipped(c, n), id=f"bit flipped at {n}") for n in (0, 900, 20_000, -40, -1)),
        pytest.param(lambda c: c + b"x", id="longer"),
        pytest.param(lambda c: bytes(len(c)), id="zeros, as after a power cut"),
        pytest.param(lambda c: packed({"format": 1}), id="another program's"),
        pytest.param(lambda c: packed(torch.ones(3)), id="a tensor"),
        pytest.param(lambda c: b"<html>404</html>", id="a web page"),
    ],
)
def test_a_torn_or_foreign_checkpoint_leaves_the_member_as_it_was(stored, spoil):
    member = make_member()
    before = untouched(member)
    assert not load_checkpoint(Folds(0, [member]), spoil(stored), identity=IDENTITY)
    after = untouched(member)
    assert_same_weights(before[0], after[0])
    assert before[1]["state"] == after[1]["state"] == {}
    assert before[2:] == after[2:]


def changed(**changes):
    """Return what packs a checkpoint anew in which keys of the whole, or of its fold, have other values."""

    def change(content):
        held = torch.load(io.BytesIO(content[:-32]), weights_only=True)
        (fold,) = held["folds"]
        for name, value in changes.items():
            of = fold if name in fold else held
            of[name] = value(of[name]) if callable(value) else value
            if of[name] is None:
                del of[name]
        return packed(held)

    return change


def with_state(key, value):
    return lambda optimizer: optimizer | {"state": {0: optimizer["state"][0] | {key: value}}}


UNUSABLE = {
    "nothing": lambda _: b"",
    "text": lambda _: b"whole, but of another kind",
    "half": lambda content: content[: len(content) // 2],
    "a pickle that torch.load refuses": lambda _: packed({"format": print}),
    "a tensor": lambda _: packed(torch.ones(3)),
    "a list": lambda _: packed([1]),
    "another program's": lambda _: packed({"epoch": 3}),
    "of the format before": changed(format=1),
    "without an identity": changed(identity=None),
    "without folds": changed(folds=None),
    "folds that are none": changed(folds=[3]),
    "of more folds": changed(folds=lambda folds: folds * 2),
    "without the scores of images": changed(image_scores=None),
    "without a curve": changed(curve=None),
    "without an optimizer": changed(optimizer=None),
    "an optimizer without groups": changed(optimizer={"state": {}, "param_groups": []}),
    "an optimizer of two groups": changed(optimizer=lambda o: o | {"param_groups": o["param_groups"] * 2}),
    "an optimizer of fewer weights": changed(
        optimizer=lambda o: o | {"param_groups": [o["param_groups"][0] | {"params": [0, 1]}]}
    ),
    "moments of other weights": changed(optimizer=with_state("exp_avg", torch.ones(3))),
    "no second moment": changed(optimizer=with_state("exp_avg_sq", None)),
    "best weights of another network": changed(best_weights={"head.weight": torch.ones(3)}),
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE)
def test_a_whole_checkpoint_that_does_not_fit_leaves_the_member_as_it_was(stored, spoil):
    member = make_member()
    before = untouched(member)
    content = spoil(stored)
    digest = hashlib.sha256(content).digest()
    assert not load_checkpoint(Folds(0, [member]), content + digest, identity=IDENTITY)
    after = untouched(member)
    assert_same_weights(before[0], after[0])
    assert before[1]["state"] == after[1]["state"] == {}
    assert before[2:] == after[2:]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("CUDA error: broken")])
def test_a_checkpoint_that_the_device_cannot_take_is_not_taken_for_an_unusable_one(stored, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        load_checkpoint(Folds(0, [make_member()]), stored, identity=IDENTITY)


@pytest.mark.parametrize(
    ("identity", "params"),
    [
        (IDENTITY | {"number": 1}, {}),
        (IDENTITY | {"study": "another"}, {}),
        ({}, {}),
        (IDENTITY, {"base_channels": 8}),
        (IDENTITY, {"depth": 1}),
        (IDENTITY, {"supervision": True}),
    ],
)
def test_a_checkpoint_of_another_trial_or_shape_is_not_used(stored, identity, params):
    member = make_member(**params)
    before = copy.deepcopy(member.network.state_dict())
    assert not load_checkpoint(Folds(0, [member]), stored, identity=identity)
    assert_same_weights(before, member.network.state_dict())
    assert (member.epoch, member.curve["epoch"]) == (0, [])


def test_the_stored_checkpoint_itself_can_be_used(stored):
    member = make_member()
    assert load_checkpoint(Folds(0, [member]), stored, identity=IDENTITY)
    assert member.epoch == 1


def test_a_loss_that_is_no_number_ends_its_member_alone():
    sound, alone = make_member(1), make_member(1)
    broken = make_member(0)
    with torch.no_grad():
        broken.network.head.weight.fill_(math.nan)
    cohort = make_cohort()
    cohort.admit(broken)
    cohort.admit(sound)
    reports = list(in_turn(cohort))
    assert [(r.epoch, r.is_finite) for r in reports if r.key == 0] == [(1, False)]
    assert [(r.epoch, r.is_finite) for r in reports if r.key == 1] == [(epoch, True) for epoch in (1, 2, 3, 4)]
    assert broken.curve["train_loss"] == [None]
    assert (broken.best_epoch, broken.best_weights) == (0, {})
    train(alone)
    assert_same(alone, sound)


def test_weights_from_before_the_loss_was_no_number_are_kept():
    member, cohort = make_member(), make_cohort()
    cohort.admit(member)
    reports = in_turn(cohort)
    best = next(reports).best_score
    kept = copy.deepcopy(member.best_weights)
    with torch.no_grad():
        member.network.head.weight.fill_(math.inf)
    last = next(reports)
    assert (last.is_finite, last.best_score, member.best_epoch) == (False, best, 1)
    assert_same_weights(kept, member.best_weights)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_enhancing_no_map_is_the_baseline_bit_for_bit(precision):
    none, by_one, baseline = make_member(B=0, X=1000.0), make_member(B=16, X=1.0), make_member(B=0, X=1.0)
    for member in (none, by_one, baseline):
        train(member, make_cohort(precision=precision))
    for other in (none, by_one):
        assert curve(other)["score"] == curve(baseline)["score"]
        assert curve(other)["train_loss"] == curve(baseline)["train_loss"]
        assert_same_weights(other.network.state_dict(), baseline.network.state_dict())


@pytest.mark.parametrize(
    "params", [{"B": 8}, {"X": 3.0}, {"fixed_maps": True}, {"learning_rate": 1e-3}, {"batch_size": 2}]
)
def test_every_parameter_reaches_the_training(params):
    member, usual = make_member(**params), make_member()
    train(member)
    train(usual)
    assert member.curve["train_loss"] != usual.curve["train_loss"]


def test_the_weight_of_the_auxiliary_loss_reaches_the_training():
    members = [make_member(supervision=True, weight=weight) for weight in (0.1, 0.9)]
    for member in members:
        train(member)
    assert members[0].curve["train_loss"] != members[1].curve["train_loss"]


def test_kept_weights_are_those_of_the_best_epoch():
    cohort, member = make_cohort(), make_member(n_epochs=8, learning_rate=0.05)
    cohort.admit(member)
    weights = {}
    for report in in_turn(cohort):
        weights[report.epoch] = copy.deepcopy(member.network.state_dict())
        assert report.best_score == member.best_score == max(member.curve["score"])
    scores = member.curve["score"]
    assert member.best_epoch == scores.index(max(scores)) + 1
    assert member.best_epoch < 8, "the test needs a training whose last epoch is not its best"
    assert_same_weights(member.best_weights, weights[member.best_epoch])
    member.network.load_state_dict(member.best_weights)
    val = member.data.val
    again = score_images(member.network, val.images, val.labels, metric="mean_iou", n_classes=2, precision="fp32")
    assert again.value.item() == member.best_score
    assert again.per_class.tolist() == member.best_per_class == member.curve["per_class"][member.best_epoch - 1]


def test_among_equal_epochs_the_first_is_the_best(monkeypatch):
    score = cohort_module.score_images

    def constant(*args, **kwargs):
        return score(*args, **kwargs)._replace(value=torch.tensor(0.5))

    monkeypatch.setattr(cohort_module, "score_images", constant)
    member = make_member()
    train(member)
    assert (member.best_epoch, member.curve["best_score"]) == (1, [0.5] * 4)


def test_the_curve_has_a_row_for_every_epoch_and_says_what_it_says():
    cohort, member = make_cohort(), make_member(B=5, X=1000.0)
    cohort.admit(member)
    reports, magnitudes = [], []
    forward = member.network.forward

    def watched(x):
        output = forward(x)
        if output.features is not None:
            magnitudes[-1].append(output.features)
        return output

    member.network.forward = watched
    magnitudes.append([])
    for report in in_turn(cohort):
        reports.append((report, enhancement(member.network).enhanced.copy()))
        magnitudes.append([])
    rows = member.curve
    assert tuple(rows) == CURVE_COLUMNS
    assert {len(values) for values in rows.values()} == {4}
    assert rows["epoch"] == [1, 2, 3, 4]
    assert rows["best_score"] == np.maximum.accumulate(rows["score"]).tolist()
    assert all(seconds > 0 for seconds in rows["seconds"])
    for i, (report, enhanced) in enumerate(reports):
        assert (rows["train_loss"][i], rows["score"][i]) == (report.train_loss, report.score)
        assert rows["score"][i] == pytest.approx(np.mean(rows["per_class"][i]))
        maps = torch.stack([features.bottleneck for features in magnitudes[i]]).mean(dim=0)
        assert enhanced.sum() == 5
        assert rows["bottleneck"][i] == pytest.approx(maps.mean().item())
        assert rows["skip"][i] == pytest.approx(np.mean([features.skip.item() for features in magnitudes[i]]))
        assert rows["enhanced_sum"][i] == pytest.approx(maps[enhanced].sum().item())
        # Taken before the enhancement, so that X is not in it.
        assert rows["enhanced_sum"][i] + rows["other_sum"][i] == pytest.approx(rows["bottleneck"][i] * 16)


def test_the_curve_says_what_training_pixels_were_taken_for_and_the_loss_of_validation_images():
    cohort, member = make_cohort(), make_member(supervision=True, n_epochs=1)
    seen, val = [], member.data.val
    forward = member.network.forward

    def watched(x):
        output = forward(x)
        seen.append((member.network.training, output.logits.detach().argmax(dim=1)))
        return output

    member.network.forward = watched
    cohort.admit(member)
    batches = cohort.begin_epoch(member)
    train(member, cohort)
    steps = torch.cat([pred for is_training, pred in seen if is_training])
    labels = batches.label.flatten(0, 1)
    expected = jaccard_score(labels.flatten(), steps.flatten(), average="macro")
    assert member.curve["train_iou"] == [pytest.approx(expected)]
    with torch.no_grad():
        logits = member.network.eval()(val.images).logits  # after the only epoch; no auxiliary output in test
    loss = torch.nn.functional.cross_entropy(logits, val.labels.long())
    assert member.curve["val_loss"] == [pytest.approx(loss.item())]


@pytest.mark.parametrize("n_images", [1, EVAL_BATCH, EVAL_BATCH + 3])
def test_the_validation_loss_is_that_of_all_images_together(n_images):
    member = make_member(dataset=make_dataset(n_val=n_images))
    val = member.data.val
    score = make_cohort().validate(member)
    with torch.no_grad():
        logits = torch.cat([member.network.eval()(each).logits for each in val.images.split(5)])
    expected = torch.nn.functional.cross_entropy(logits, val.labels.long())
    torch.testing.assert_close(score.loss, expected, rtol=1e-5, atol=0)


def test_a_checkpoint_of_an_earlier_version_leaves_what_its_curve_did_not_know_empty(stored):
    held = torch.load(io.BytesIO(stored[:-32]), weights_only=True)
    (fold,) = held["folds"]
    for column in ("train_iou", "val_loss"):
        del fold["curve"][column]
    fold["curve"]["skip"] = [0.3] * len(fold["curve"]["epoch"])  # measured elsewhere then
    member, content = make_member(), packed(held)
    assert load_checkpoint(Folds(0, [member]), content + hashlib.sha256(content).digest(), identity=IDENTITY)
    assert tuple(member.curve) == CURVE_COLUMNS
    assert member.curve["val_loss"] == member.curve["skip"] == [None] * member.epoch
    train(member)
    assert {len(values) for values in member.curve.values()} == {member.n_epochs}
    assert member.curve["val_loss"][-1] is not None


def test_batch_renormalization_of_a_member_follows_the_length_of_its_training():
    member = make_member(n_epochs=10, concatenation="batch_renorm")
    assert member.n_steps == 2
    for joint in member.network.joints:
        # Of 20 steps, the limits open within the first, and the statistics remember 10.
        assert joint.limits.tolist() == [3.0, 5.0, 0.0, 1.0, 1.0]
        assert joint.momentum.item() == pytest.approx(0.1)


def test_a_recalibrated_member_keeps_its_statistics_in_the_same_tensors():
    """A CUDA graph of the validation writes into them, and `resume` reads them."""
    member = make_member(recalibrate=True)
    kept = []
    for _ in range(2):
        member.prepare_score(precision="fp32")
        kept.append({name: value.data_ptr() for name, value in member._statistics.items()})
        member.resume()
    assert kept[0] == kept[1] != {}


def test_the_enhanced_maps_change_with_the_epoch_unless_they_are_fixed():
    drawn = {}
    for fixed in (False, True):
        cohort, member = make_cohort(), make_member(fixed_maps=fixed)
        cohort.admit(member)
        drawn[fixed] = {tuple(enhancement(member.network).enhanced) for _ in in_turn(cohort)}
    assert len(drawn[True]) == 1
    assert len(drawn[False]) > 1


def watch_batches(monkeypatch):
    seen = []
    drawn = batches_module.epoch_batches

    def watched(*args, **kwargs):
        batches = drawn(*args, **kwargs)
        seen.append(batches)
        return batches

    monkeypatch.setattr(batches_module, "epoch_batches", watched)
    return seen


def test_every_trial_begins_with_the_same_weights_and_sees_the_same_batches(monkeypatch):
    seen = watch_batches(monkeypatch)
    members = [make_member(0, B=0), make_member(7, B=16, X=1000.0)]
    assert_same_weights(*(dict(member.network.named_parameters()) for member in members))
    for member in members:
        train(member)
    for one, other in zip(seen[:4], seen[4:], strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.flags, other.flags)
    assert not np.array_equal(seen[0].indices, seen[1].indices)


def test_the_seed_changes_weights_batches_and_maps(monkeypatch):
    seen = watch_batches(monkeypatch)
    members = [make_member(seed=seed) for seed in (0, 1)]
    for member in members:
        train(member, make_cohort())
    assert not np.array_equal(seen[0].indices, seen[4].indices)
    assert members[0].curve["train_loss"] != members[1].curve["train_loss"]
    assert not torch.equal(make_member(seed=0).network.head.weight, make_member(seed=1).network.head.weight)


def test_nothing_depends_on_the_global_generators():
    member, again = make_member(), make_member()
    train(member)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        before = torch.get_rng_state()
        train(again)
        assert torch.equal(before, torch.get_rng_state())
    assert_same(member, again)


@pytest.mark.parametrize("B", [0, 4])
def test_training_learns_a_task_that_can_be_learned(B):
    member = make_member(n_epochs=16, B=B, X=10.0, dataset=make_dataset(n_train=16))
    val = member.data.val
    kwargs = {"metric": "mean_iou", "n_classes": 2, "precision": "fp32"}
    before = score_images(member.network, val.images, val.labels, **kwargs).value.item()
    train(member)
    # The least of 20 seeds, in torch 2.13 on a CPU: 0.56 more than before, 0.94, and 0.37 of the first loss.
    assert member.best_score > before + 0.4
    assert member.best_score > 0.85
    assert member.curve["train_loss"][-1] < 0.5 * member.curve["train_loss"][0]


def test_augmentation_can_be_left_out(monkeypatch):
    turned = []
    turn = batches_module.turn_and_flip

    def watched(x, flags):
        turned.append(flags)
        return turn(x, flags)

    monkeypatch.setattr(batches_module, "turn_and_flip", watched)
    with_it, without = make_member(), make_member(augmentation=Augmentation(turns=False))
    train(without)
    assert turned == []
    train(with_it)
    assert len(turned) == 4 * 2  # epochs, images and labels
    assert without.curve["train_loss"] != with_it.curve["train_loss"]


WARPS = Augmentation(rotation=True, alpha=3.0, mirror_quarters=0.5, crop_size=(10, 12))


def test_warped_images_reach_the_training_and_have_the_size_of_the_crop():
    warped, again, plain = (make_member(augmentation=each) for each in (WARPS, WARPS, Augmentation()))
    sizes, forward = set(), warped.network.forward

    def watched(x):
        sizes.add((warped.network.training, *x.shape[2:]))
        return forward(x)

    warped.network.forward = watched
    for member in (warped, again, plain):
        train(member)
    assert sizes == {(True, 10, 12), (False, 16, 16)}
    assert_same(warped, again)
    assert warped.curve["train_loss"] != plain.curve["train_loss"]


@pytest.mark.parametrize("chunk", [1, 5, 6, 64])
def test_an_epoch_is_the_images_of_its_batches_turned_by_their_flags(chunk, monkeypatch):
    monkeypatch.setattr(batches_module, "CHUNK", chunk)
    data = load_resident(make_dataset(n_train=11, channels=2), folds=[0], device=CPU, needs_border=True)[0]
    epoch = prepare_epoch(EpochPlan(data, 1, 0, 3, 4, None, Augmentation()))
    indices, flags = epoch_batches(11, 4, seed=1, fold=0, epoch=3)
    assert epoch.n_steps == len(indices)
    for i, (rows, turns) in enumerate(zip(indices, flags, strict=True)):
        step = epoch.step(i)
        assert step.image.is_contiguous(memory_format=torch.channels_last)
        for drawn, whole in zip(step.tensors(), (data.train.images, data.train.labels, data.train.border), strict=True):
            assert torch.equal(drawn, turn_and_flip(whole[rows], torch.from_numpy(turns)))
        for one, other in zip(step.tensors(), epoch.step_at(torch.tensor([i])).tensors(), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_images_labels_and_distances_are_moved_alike():
    data = load_resident(make_dataset(size=(24, 24)), folds=[0], device=CPU)[0]
    images = data.train.whole.labels[:, None].float()
    whole = replace(data.train.whole, images=images, border=images[:, 0])
    data = replace(data, train=replace(data.train, whole=whole))
    plan = EpochPlan(data, 0, 0, 1, 4, None, replace(WARPS, crop_size=(20, 20), alpha=30.0))
    epoch = prepare_epoch(plan)
    torch.testing.assert_close(epoch.border, epoch.image[:, :, 0])
    within = (epoch.border == 0) | (epoch.border == 1)  # where all four pixels around agree
    assert 0.5 < within.float().mean() < 1
    assert torch.equal(epoch.border[within], epoch.label[within].float())


def watch_rates(member):
    rates, step = [], member.optimizer.step
    member.optimizer.step = lambda: (rates.append(member.optimizer.param_groups[0]["lr"]), step())[1]
    return rates


def test_the_learning_rate_follows_the_schedule_also_after_a_checkpoint():
    params = {"learning_rate": 0.02, "schedule": ((2, 0.5), (4, 0.1)), "batch_size": 6, "n_epochs": 5}
    member = make_member(**params)
    rates = watch_rates(member)
    train(member)
    assert rates == pytest.approx([0.02, 0.01, 0.01, 0.002, 0.002])
    begun = make_member(**params | {"n_epochs": 3})
    train(begun)
    fresh = make_member(**params)
    assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [begun]), identity=IDENTITY), identity=IDENTITY)
    rates = watch_rates(fresh)
    train(fresh)
    assert rates == pytest.approx([0.002, 0.002])
    assert_same(member, fresh)


def test_weight_decay_is_added_to_the_gradient():
    member = make_member(weight_decay=0.1, learning_rate=0.01)
    parameter = member.network.head.weight
    before = parameter.detach().clone()
    for each in member.network.parameters():
        each.grad = torch.zeros_like(each)
    member.optimizer.step()
    # Adam's first step is the rate in the direction of the gradient, here of 0.1 * weight alone.
    torch.testing.assert_close(parameter.detach(), before - 0.01 * before.sign(), rtol=0, atol=1e-6)


def test_a_member_without_a_better_score_for_its_patience_is_done(monkeypatch):
    scores = iter([0.3, 0.5, 0.5, 0.4, 0.1, 0.9])
    score = cohort_module.score_images
    monkeypatch.setattr(
        cohort_module, "score_images", lambda *a, **k: score(*a, **k)._replace(value=torch.tensor(next(scores)))
    )
    member, cohort = make_member(n_epochs=10, patience=3), make_cohort()
    assert [report.is_done for report in train(member, cohort)] == [False] * 4 + [True]
    assert (member.best_epoch, member.is_active, member.has_ended) == (2, False, False)
    assert train(member, cohort) == []
    fresh = make_member(n_epochs=10, patience=3)
    stored = dump_checkpoint(Folds(0, [member]), identity=IDENTITY)
    assert load_checkpoint(Folds(0, [fresh]), stored, identity=IDENTITY)
    assert fresh.is_done


def test_an_epoch_may_have_fewer_steps_than_a_pass():
    member = make_member(n_epochs=3, dataset=make_dataset(n_train=9), batch_size=2, steps_per_epoch=3)
    calls, step = [], member.optimizer.step
    member.optimizer.step = lambda: (calls.append(1), step())[1]
    train(member)
    assert len(calls) == 9
    assert member.images_per_epoch == 6
    assert make_member(dataset=make_dataset(n_train=9), batch_size=2).images_per_epoch == 9


def test_python_asks_for_no_value_while_an_epoch_is_prepared():
    data = load_resident(make_dataset(n_train=24), folds=[0], device=CPU, needs_border=True)[0]
    plan = EpochPlan(data, 0, 0, 1, 4, 3, WARPS)
    prepare_epoch(plan)
    with CountReadBacks() as counter:
        prepare_epoch(plan)
    assert counter.n == 0


@pytest.mark.parametrize(("tiles", "size"), [(2, (16, 16)), (4, (16, 32))])
def test_training_images_are_cut_and_validation_images_are_whole(tiles, size):
    whole, cut = (load_resident(make_dataset(size=size), folds=[0], device=CPU, tiles=n)[0] for n in (1, tiles))
    assert (len(cut.train), len(cut.val), len(cut.test)) == (6 * tiles**2, 2, 2)
    assert len(set(cut.train.cases)) == len(cut.train)
    height, width = size[0] // tiles, size[1] // tiles
    for i, (image, label) in enumerate(zip(whole.train.images, whole.train.labels, strict=True)):
        for row in range(tiles):
            for column in range(tiles):
                region = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                at = i * tiles**2 + row * tiles + column
                assert torch.equal(cut.train.images[at], image[:, *region])
                assert torch.equal(cut.train.labels[at], label[region])
    assert torch.equal(cut.val.images, whole.val.images)


def test_distances_are_those_of_whole_training_images():
    whole = load_resident(make_dataset(), folds=[0], device=CPU, needs_border=True)[0]
    cut = load_resident(make_dataset(), folds=[0], device=CPU, needs_border=True, tiles=2, is_eightfold=True)[0]
    for label, border in zip(whole.train.labels, whole.train.border, strict=True):
        np.testing.assert_array_equal(border.numpy(), border_distances(label.numpy()))
    assert torch.equal(cut.train.border[:4].reshape(2, 2, 8, 8).swapaxes(1, 2).reshape(16, 16), whole.train.border[0])
    assert load_resident(make_dataset(), folds=[0], device=CPU)[0].train.whole.border is None


def test_every_image_has_eight_orientations_in_every_part():
    whole, eight = (
        load_resident(make_dataset(), folds=[0], device=CPU, is_eightfold=each)[0] for each in (False, True)
    )
    for part in ("train", "val", "test"):
        one, all_of_them = getattr(whole, part), getattr(eight, part)
        n = len(one)
        assert (len(all_of_them), len(set(all_of_them.cases))) == (8 * n, 8 * n)
        assert torch.equal(all_of_them.images[:n], one.images)
        for i, (image, label) in enumerate(zip(one.images, one.labels, strict=True)):
            flags = torch.tensor(list(itertools.product([False, True], repeat=3)))
            expected = {each.numpy().tobytes() for each in turn_and_flip(label.expand(8, -1, -1), flags)}
            assert {each.numpy().tobytes() for each in all_of_them.labels[i::n]} == expected
            for turned, of_label in zip(all_of_them.images[i::n], all_of_them.labels[i::n], strict=True):
                assert torch.equal(turned[0][of_label == 1].sort()[0], image[0][label == 1].sort()[0])


@pytest.mark.parametrize(("size", "tiles"), [((16, 16), 2), ((13, 22), 3), ((2, 9), 4)])
@pytest.mark.parametrize("takes", ["classes", "probabilities"])
def test_regions_are_predicted_by_themselves_and_put_together_again(size, tiles, takes):
    train(member := make_member())
    network = member.network
    images = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    pred = predict(network, images, precision="fp32", takes=takes, tiles=tiles)
    bands = [
        np.concatenate(
            [predict(network, torch.from_numpy(each), precision="fp32", takes=takes).numpy() for each in regions],
            axis=-1,
        )
        for band in np.array_split(images.numpy(), min(tiles, size[0]), axis=2)
        for regions in [np.array_split(band, tiles, axis=3)]
    ]
    torch.testing.assert_close(pred, torch.from_numpy(np.concatenate(bands, axis=-2)))
    assert not torch.equal(pred, predict(network, images, precision="fp32", takes=takes))


def test_a_member_is_validated_in_as_many_regions_as_it_is_trained_in():
    member, cohort = make_member(tiles=2), make_cohort()
    train(member, cohort)
    val = member.data.val
    kwargs = {"metric": "mean_iou", "n_classes": 2, "precision": "fp32"}
    expected = score_images(member.network, val.images, val.labels, tiles=2, **kwargs).value
    assert cohort.validate(member).value == expected
    assert expected != score_images(member.network, val.images, val.labels, **kwargs).value


@pytest.mark.parametrize(
    ("size", "batch_size", "n_train", "channels"),
    [((13, 22), 4, 6, 1), ((5, 3), 2, 5, 2), ((16, 16), 99, 3, 1), ((9, 40), 1, 2, 3), ((17, 17), 3, 1, 1)],
)
def test_odd_sizes_batches_and_channels_train(size, batch_size, n_train, channels):
    dataset = make_dataset(size=size, n_train=n_train, channels=channels)
    reports = train(member := make_member(n_epochs=2, batch_size=batch_size, channels=channels, dataset=dataset))
    assert [report.is_finite for report in reports] == [True, True]
    assert all(0 <= score <= 1 for score in member.curve["score"])


def test_one_image_to_validate_and_none_to_test():
    member = make_member(n_epochs=1, dataset=make_dataset(n_val=1, n_test=0))
    assert (len(member.data.val), len(member.data.test)) == (1, 0)
    train(member)
    assert member.best_weights


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_fold_without_images_to_train_or_validate_is_told(part):
    with pytest.raises(DatasetError, match=f"fold 0 has no {part} image, but training needs one. Check splits_final"):
        load_resident(make_dataset(**{f"n_{part}": 0}), folds=[0], device=CPU)[0]


def test_a_class_that_is_nowhere_has_no_score():
    dataset = make_dataset()
    dataset.labels[:] = 0
    member = make_member(n_epochs=12, dataset=dataset)
    train(member)
    assert member.curve["per_class"][-1] == [1.0, None]
    assert member.curve["score"][-1] == 1.0


def test_predicting_restores_the_mode_and_goes_in_parts():
    network = make_member().network
    images = torch.randn(EVAL_BATCH + 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        network.train(mode)
        pred = predict(network, images, precision="fp32")
        assert network.training is mode
    assert (pred.shape, pred.dtype) == ((EVAL_BATCH + 3, 8, 8), torch.uint8)
    network.eval()
    expected = torch.cat([network(image[None]).logits for image in images])
    assert torch.equal(pred, expected.argmax(dim=1).to(torch.uint8))
    probabilities = predict(network, images, precision="fp32", takes="probabilities")
    torch.testing.assert_close(probabilities, expected.softmax(dim=1))


def test_the_precision_is_the_one_of_the_cohort():
    seen = {}
    for precision in PRECISIONS:
        member = make_member(n_epochs=1)
        member.network.head.register_forward_hook(lambda _m, _i, out, p=precision: seen.update({p: out.dtype}))
        train(member, make_cohort(precision=precision))
        assert all(value.dtype == torch.float32 for value in member.best_weights.values() if value.is_floating_point())
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16}


class CountReadBacks(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: a value of a tensor that Python asks for."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique_dim")
        self.n += func.name().split(".")[0] in waits
        return func(*args, **(kwargs or {}))


def test_python_asks_for_as_many_values_in_a_long_epoch_as_in_a_short_one():
    counted = []
    for n_train in (4, 24):
        member = make_member(n_epochs=1, dataset=make_dataset(n_train=n_train))
        with CountReadBacks() as counter:
            train(member)
        counted.append(counter.n)
    assert counted[0] == counted[1]
    assert 0 < counted[0] <= 5  # score and loss of validation, mean loss and IoU of training, skip magnitude


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_steps_of_an_epoch_never_wait_for_the_gpu(monkeypatch):
    device = torch.device("cuda:0")
    member = make_member(dataset=make_dataset(n_train=24), device=device)
    train_epoch_steps = cohort_module.train_alone
    unwatched = member.network.forward

    def watched(x):
        # From the first step on: before it the epoch's batches are copied to the device, which waits for nothing else.
        torch.cuda.set_sync_debug_mode("error")
        return unwatched(x)

    def watch_steps(*args, **kwargs):
        member.network.forward = watched
        try:
            return train_epoch_steps(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            member.network.forward = unwatched

    monkeypatch.setattr(cohort_module, "train_alone", watch_steps)
    assert [report.error for report in train(member)] == [None] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_member_trains_on_the_gpu_and_goes_on_there_from_a_checkpoint():
    device = torch.device("cuda:0")
    member, fresh = make_member(n_epochs=2, device=device), make_member(n_epochs=3, device=device)
    train(member, make_cohort(precision=best_precision(device)))
    assert load_checkpoint(Folds(0, [fresh]), dump_checkpoint(Folds(0, [member]), identity=IDENTITY), identity=IDENTITY)
    assert [r.epoch for r in train(fresh, make_cohort(precision=best_precision(device)))] == [3]
    assert all(value.is_cuda for value in fresh.best_weights.values())


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:x", "cpu:", "cpu:7", "CUDA", "cuda:-1", "cuda:99999999999999999999", "mps", "xpu:0"]
)
def test_a_device_that_is_none_is_told_with_what_is(name):
    with pytest.raises(UsageError, match=r"^--device: expected auto, cpu, cuda or cuda:N, but got "):
        find_device(name)


def test_a_device_that_is_not_here_is_told():
    with pytest.raises(DeviceError, match=r"^--device cuda:99: this machine has \d+ CUDA device"):
        find_device("cuda:99")


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in its documentation."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
    MemoryError("Unable to allocate 4.00 TiB for an array with shape (1099511627776,) and data type float32"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
OF_THE_CODE = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    ValueError("a text that speaks of an error: out of memory"),
    ZeroDivisionError("a bug in a network"),
]


def first_line(error):
    return f"{type(error).__name__}: {str(error)[:30]}"


@pytest.mark.parametrize("error", NO_MEMORY + BROKEN + OF_THE_CODE, ids=first_line)
def test_an_error_is_the_devices_or_the_codes(error):
    assert is_out_of_memory(error) == (error in NO_MEMORY)
    assert is_of_device(error) == (error not in OF_THE_CODE)
    expected = DeviceMemoryError if error in NO_MEMORY else DeviceError if error in BROKEN else type(error)
    with pytest.raises(expected) as raised, device_errors(CPU):
        raise error
    assert type(raised.value) is expected
    if error in OF_THE_CODE:
        assert raised.value is error
    else:
        says = "cpu: out of memory: " if error in NO_MEMORY else "cpu: failed: "
        assert str(raised.value).startswith(says + (str(error).split("\n")[0].removesuffix(".") or "MemoryError") + ".")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [NO_MEMORY[-1], BROKEN[0], BROKEN[-1]], ids=first_line)
@pytest.mark.parametrize("train", [lambda c, m: c.train_epoch(m[0]), train_epoch_stacked])
def test_an_error_of_the_device_concerns_all_members_and_is_not_tried_again(error, train):
    n_calls = []

    def fail(_):
        n_calls.append(1)
        raise error

    members = [make_member(key) for key in (0, 1)]
    for member in members:
        member.network.forward = fail
    with pytest.raises(type(error)) as raised:
        train(make_cohort(), members)
    assert raised.value is error
    assert n_calls == [1]
    assert not any(member.has_ended for member in members)


@pytest.mark.parametrize(("n_devices", "expected"), [(0, "cpu"), (2, "cuda:0")])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, n_devices, expected):
    monkeypatch.setattr(device_module.torch.cuda, "is_available", lambda: n_devices > 0)
    monkeypatch.setattr(device_module.torch.cuda, "device_count", lambda: n_devices)
    assert str(find_device()) == expected
    assert str(find_device("cpu")) == "cpu"
    if n_devices:
        assert [str(find_device(name)) for name in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]


GPU_SETTINGS = (
    (torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)  # fmt: skip


@pytest.fixture
def careless_gpu():
    """The settings of a GPU as another program may have left them."""
    before = [getattr(holder, name) for holder, name in GPU_SETTINGS]
    for holder, name in GPU_SETTINGS:
        setattr(holder, name, name != "deterministic")
    yield
    for (holder, name), value in zip(GPU_SETTINGS, before, strict=True):
        setattr(holder, name, value)


@pytest.mark.parametrize(("name", "expected"), [("cpu", [0, 1, 1, 1]), ("cuda:0", [1, 0, 0, 0])])
@pytest.mark.usefixtures("careless_gpu")
def test_a_gpu_is_set_to_repeat_every_bit_and_the_cpu_needs_nothing(name, expected):
    make_repeatable(torch.device(name))
    assert [getattr(holder, name) for holder, name in GPU_SETTINGS] == expected
    with torch.backends.cudnn.flags(enabled=True):  # raises where PyTorch finds the settings at odds with each other
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_trains_the_same_twice_bit_for_bit(precision):
    device = torch.device("cuda:0")
    make_repeatable(device)
    curves = []
    for _ in range(2):
        dataset = make_dataset(n_train=24, size=(48, 48))
        member = make_member(n_epochs=6, device=device, dataset=dataset, B=3, X=100.0, supervision=True)
        train(member, make_cohort(precision=precision))
        curves.append({name: column for name, column in member.curve.items() if name != "seconds"})
    assert curves[0] == curves[1]
