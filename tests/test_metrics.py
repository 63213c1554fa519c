import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.func import vmap

from frem_search.metrics import METRICS
from frem_search.metrics.iou import class_iou, confusion_matrix, mean_iou, mean_iou_score


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


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_one_for_the_truth_and_less_otherwise(name):
    metric = METRICS[name]
    pred, target = labels()

    def score(classes):
        if metric.takes == "probabilities":
            classes = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).float()
        return metric.function(classes, target, n_classes=4)

    assert score(target).value == 1
    assert score(pred).value < 1
    assert score(pred).per_class.shape == (4,)
    assert score(pred).value.shape == ()


def test_members_are_scored_as_each_alone():
    preds, targets = (torch.stack(each) for each in zip(labels(0), labels(1), strict=True))
    stacked = vmap(lambda p, t: mean_iou_score(p, t, n_classes=4).value)(preds, targets)
    alone = [mean_iou_score(p, t, n_classes=4).value for p, t in zip(preds, targets, strict=True)]
    assert stacked.tolist() == alone
