import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.func import vmap

from frem_search.errors import UsageError
from frem_search.segmentation.metrics import METRICS, check_score, lacking
from frem_search.segmentation.metrics.iou import (
    cell_iou,
    cell_iou_per_frame,
    class_iou,
    confusion_matrix,
    mean_iou,
    mean_iou_score,
)


def labels(seed=0, *, k=4):
    rng = np.random.default_rng(seed)
    target = rng.integers(k, size=(3, 9, 7))
    pred = np.where(rng.random(target.shape) < 0.6, target, rng.integers(k, size=target.shape))
    return torch.from_numpy(pred), torch.from_numpy(target)


def test_confusion_matrix_equals_scikit_learn():
    pred, target = labels()
    expected = sklearn.metrics.confusion_matrix(target.ravel(), pred.ravel(), labels=range(4))
    np.testing.assert_array_equal(confusion_matrix(pred, target, n_classes=4).numpy(), expected)


def test_iou_equals_scikit_learn():
    pred, target = labels()
    score = mean_iou_score(pred, target, n_classes=4)
    expected = sklearn.metrics.jaccard_score(target.ravel(), pred.ravel(), average=None)
    np.testing.assert_allclose(score.per_class.numpy(), expected, rtol=1e-12)
    assert score.value.item() == pytest.approx(expected.mean(), rel=1e-12)


def test_matrices_of_batches_may_be_summed():
    pred, target = labels()
    parts = sum(confusion_matrix(p, t, n_classes=4) for p, t in zip(pred, target, strict=True))
    assert torch.equal(parts, confusion_matrix(pred, target, n_classes=4))


def test_absent_class_does_not_count():
    pred, target = labels(k=3)
    with_absent = mean_iou_score(pred, target, n_classes=5)
    assert with_absent.per_class.isnan().tolist() == [False, False, False, True, True]
    assert with_absent.value == mean_iou_score(pred, target, n_classes=3).value


def test_class_only_predicted_counts_as_zero():
    pred, target = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
    confusion = confusion_matrix(pred, target, n_classes=2)
    assert class_iou(confusion)[1] == 0
    assert mean_iou(confusion).item() == pytest.approx((2 / 3 + 0) / 2)


def test_small_integer_labels_do_not_overflow():
    target = torch.full((1, 20, 20), 19, dtype=torch.uint8)
    confusion = confusion_matrix(target, target, n_classes=20)
    assert confusion[19, 19] == 400
    assert confusion.sum() == 400


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_label_outside_the_classes_is_not_counted_silently(label):
    with pytest.raises(RuntimeError, match="out of bounds"):
        confusion_matrix(torch.tensor([0]), torch.tensor([label]), n_classes=3)


def cells(seed=0, *, k):
    """Four cells between membranes in each of three images; from class 2 on, one of each is a cell of that class."""
    rng = np.random.default_rng(seed)
    target = np.ones((3, 48, 52), dtype=np.int64)
    for image, (row, column) in zip(target, rng.integers(20, 28, size=(3, 2)), strict=True):
        for label in range(2, k):
            image[:row, :column][label * 4 : label * 4 + 3, 3:9] = label
        image[row : row + 2] = image[:, column : column + 2] = 0
    pred = np.where(rng.random(target.shape) < 0.6, target, rng.integers(k, size=target.shape))
    return torch.from_numpy(pred), torch.from_numpy(target)


def as_taken(metric, classes, *, k):
    """The prediction of classes, each quite sure, in the form that a metric takes."""
    if metric.takes == "classes":
        return classes
    return torch.nn.functional.one_hot(classes, k).movedim(-1, 1).float()


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_one_for_the_truth_and_less_otherwise(name):
    metric = METRICS[name]
    k = metric.n_classes or 4
    pred, target = cells(k=k)

    def score(classes):
        return metric.function(as_taken(metric, classes, k=k), target, n_classes=k)

    assert score(target).value == 1
    assert 0 <= score(pred).value < 1
    assert score(pred).per_class.shape == (k,)
    assert score(pred).value.shape == ()


@pytest.mark.parametrize("name", METRICS)
def test_score_of_small_integers_is_that_of_large_ones(name):
    metric = METRICS[name]
    k = metric.n_classes or 4
    pred, target = cells(k=k)
    large = metric.function(as_taken(metric, pred, k=k), target, n_classes=k)
    small = as_taken(metric, pred, k=k)
    small = small.to(torch.uint8) if metric.takes == "classes" else small
    assert metric.function(small, target.to(torch.uint8), n_classes=k).value == large.value


@pytest.mark.parametrize("name", [name for name in METRICS if name != "mean_iou"])
def test_labels_without_a_cell_score_zero_and_not_nan(name):
    metric, target = METRICS[name], torch.zeros((2, 9, 8), dtype=torch.int64)
    for classes in (target, target + 1):
        pred = as_taken(metric, classes, k=2)
        assert metric.function(pred, target, n_classes=2).value == 0


@pytest.mark.parametrize("name", METRICS)
def test_a_prediction_that_is_all_one_class_has_a_score(name):
    metric = METRICS[name]
    k = metric.n_classes or 3
    _, target = cells(k=k)
    for label in range(k):
        score = metric.function(as_taken(metric, torch.full_like(target, label), k=k), target, n_classes=k)
        assert 0 <= score.value < 1


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.takes == "probabilities"])
def test_probabilities_that_are_no_numbers_count_as_membrane(name):
    _, target = cells(k=2)
    score = METRICS[name].function
    nan, membrane = torch.full((3, 2, 48, 52), torch.nan), as_taken(METRICS[name], torch.zeros_like(target), k=2)
    assert score(nan, target, n_classes=2).value == score(membrane, target, n_classes=2).value


@pytest.mark.parametrize("name", METRICS)
def test_an_unfit_number_of_classes_is_told_before_training_and_by_the_metric(name):
    metric = METRICS[name]
    for k in (1, 3) if metric.n_classes == 2 else (1,):
        message = f"score = '{name}': expected labels of .* classes, .* but got {k}\\. Choose another score"
        with pytest.raises(UsageError, match=message):
            check_score(name, n_classes=k)
        if name != "mean_iou":
            pred = as_taken(metric, torch.zeros((1, 4, 4), dtype=torch.int64), k=k)
            with pytest.raises(UsageError, match=message):
                metric.function(pred, torch.zeros((1, 4, 4), dtype=torch.int64), n_classes=k)


@pytest.mark.parametrize("name", METRICS)
def test_fit_classes_pass_the_check(name):
    for k in (2,) if METRICS[name].n_classes else (2, 3, 9):
        check_score(name, n_classes=k)


def test_a_missing_package_is_told_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "bioimage_cpp", None)
    with pytest.raises(UsageError, match=r'bioimage-cpp, but .* `pip install "frem-search\[multicut\]"'):
        check_score("v_rand_multicut", n_classes=2)
    check_score("v_rand", n_classes=2)


def test_of_an_extra_score_a_missing_package_is_no_error_and_an_unfit_number_of_classes_is(monkeypatch):
    assert lacking(METRICS) == {}
    monkeypatch.setitem(sys.modules, "bioimage_cpp", None)
    check_score("v_rand_multicut", n_classes=2, is_extra=True)
    with pytest.raises(UsageError, match="expected labels of 2 classes"):
        check_score("v_rand_multicut", n_classes=3, is_extra=True)
    assert list(lacking(METRICS)) == ["v_rand_multicut", "v_info_multicut"]
    assert "frem-search[multicut]" in lacking(["seg", "v_info_multicut"])["v_info_multicut"]


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.on_device])
def test_a_metric_on_the_device_reads_nothing_back(name):
    metric = METRICS[name]
    pred, target = (each.to("meta") for each in cells(k=3))  # tensors without content: reading one raises
    assert metric.function(pred, target, n_classes=3).value.device.type == "meta"


def test_cell_iou_is_that_of_class_one_of_all_images_together():
    pred, target = labels()
    score = cell_iou(pred, target, n_classes=4)
    expected = sklearn.metrics.jaccard_score(target.ravel() == 1, pred.ravel() == 1)
    assert score.value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(score.per_class, mean_iou_score(pred, target, n_classes=4).per_class)


def frames():
    """Three frames that differ in how many cells they have, one of them in none."""
    pred, target = labels()
    return torch.cat([pred, pred[:1]]), torch.cat([target.where(torch.arange(9)[:, None] > 6, 0)[:1], target])


def test_cell_iou_per_frame_is_the_mean_over_frames_that_have_a_cell():
    pred, target = frames()
    target[2] = 0
    score = cell_iou_per_frame(pred, target, n_classes=4)
    expected = [
        sklearn.metrics.jaccard_score(t.ravel() == 1, p.ravel() == 1)
        for p, t in zip(pred.numpy(), target.numpy(), strict=True)
        if (t == 1).any()
    ]
    assert len(expected) == 3
    assert score.value.item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert score.per_class.isnan().tolist() == [True, False, True, True]
    assert score.per_class[1] == score.value
    assert abs(score.value - cell_iou(pred, target, n_classes=4).value) > 0.01


def test_batches_of_equal_size_average_to_the_whole():
    pred, target = frames()  # as the report's validation steps of four frames do
    halves = [cell_iou_per_frame(pred[i::2], target[i::2], n_classes=4).value for i in range(2)]
    assert sum(halves).item() / 2 == pytest.approx(cell_iou_per_frame(pred, target, n_classes=4).value.item())


def test_members_are_scored_as_each_alone():
    preds, targets = (torch.stack(each) for each in zip(labels(0), labels(1), strict=True))
    for metric in (mean_iou_score, cell_iou, cell_iou_per_frame):
        stacked = vmap(lambda p, t, metric=metric: metric(p, t, n_classes=4).value)(preds, targets)
        alone = [metric(p, t, n_classes=4).value for p, t in zip(preds, targets, strict=True)]
        assert stacked.tolist() == alone
