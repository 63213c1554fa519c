"""Losses agree with numpy, scikit-learn and PyTorch, whatever the precision and however members are stacked."""

import inspect
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.func import grad, vmap

from frem_search.segmentation import losses
from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses import LOSSES, Coefficient
from frem_search.segmentation.losses.border_cross_entropy import border_cross_entropy, class_balance
from frem_search.segmentation.losses.feedback_cross_entropy import feedback_cross_entropy
from frem_search.segmentation.losses.smooth_l1 import smooth_l1
from frem_search.segmentation.losses.softmax_cross_entropy import softmax_cross_entropy
from frem_search.segmentation.losses.weighted_cross_entropy import weighted_cross_entropy
from frem_search.segmentation.output import Output
from frem_search.training.resident import balanced_weights

WEIGHTS = np.array([0.4, 2.5, 1.3, 1.9])


def make(seed=0, *, k=3):
    """Logits, and a batch of labels with distances to cells and class weights."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((2, k, 5, 6)) * 3).float()
    label = torch.from_numpy(rng.integers(k, size=(2, 5, 6), dtype=np.uint8))
    border = torch.from_numpy(rng.uniform(0, 20, (2, 5, 6))).float()
    return logits, Batch(torch.zeros(2, 1, 5, 6), label, border, torch.from_numpy(WEIGHTS[:k]).float())


def defaults(loss, **others):
    return {name: torch.tensor(value) for name, value in (loss.defaults | others).items()}


def n_classes(name):
    return LOSSES[name].n_classes or 3


def reference(logits, batch, weights=None):
    """The cross entropy by scikit-learn; with weights it divides by their sum, which is taken back here."""
    scores = logits.double().numpy().transpose(0, 2, 3, 1).reshape(-1, logits.shape[1])
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    factor = 1 if weights is None else weights.mean()
    return factor * log_loss(batch.label.numpy().ravel(), probs, labels=range(logits.shape[1]), sample_weight=weights)


def test_cross_entropy_equals_scikit_learn():
    logits, batch = make()
    loss = softmax_cross_entropy(Output(logits), batch, {}).item()
    assert loss == pytest.approx(reference(logits, batch), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3257, 1.0])
def test_lambda_weighs_the_two_losses(weight):
    (logits, batch), (auxiliary, _) = make(), make(1)
    loss = softmax_cross_entropy(Output(logits, auxiliary), batch, {"lambda": torch.tensor(weight)})
    expected = (1 - weight) * reference(logits, batch) + weight * reference(auxiliary, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_class_weights_are_those_of_scikit_learn():
    label = np.random.default_rng(0).choice(4, p=[0.6, 0.3, 0.09, 0.01], size=(3, 20, 30)).astype(np.uint8)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=label.ravel())
    np.testing.assert_allclose(balanced_weights(torch.from_numpy(label), n_classes=4), expected, rtol=1e-6)


def test_a_class_that_no_training_image_has_changes_no_weight():
    label = torch.tensor([[[0, 0, 2, 2], [0, 0, 0, 2]]], dtype=torch.uint8)
    assert balanced_weights(label, n_classes=4).tolist() == pytest.approx([8 / 10, 0, 8 / 6, 0])


def test_weighted_cross_entropy_equals_scikit_learn():
    logits, batch = make(k=4)
    loss = weighted_cross_entropy(Output(logits), batch, {}).item()
    assert loss == pytest.approx(reference(logits, batch, WEIGHTS[batch.label.numpy().ravel()]), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_feedback_adds_the_first_round_to_the_second(weight):
    (logits, batch), (auxiliary, _) = make(), make(1)
    loss = feedback_cross_entropy(Output(logits, auxiliary), batch, {"lambda": torch.tensor(weight)})
    weights = WEIGHTS[batch.label.numpy().ravel()]
    expected = weight * reference(auxiliary, batch, weights) + reference(logits, batch, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("omega_0", "sigma"), [(0.0, 5.0), (10.0, 5.0), (3.0, 0.7)])
def test_border_weights_are_those_of_the_formula(omega_0, sigma):
    logits, batch = make(k=4)
    batch.label[0][batch.label[0] == 2] = 3  # a class that one of the images does not have
    coefficients = {"omega_0": torch.tensor(omega_0), "sigma_border": torch.tensor(sigma)}
    omega_c = np.zeros(batch.label.shape)
    for image, weight in zip(batch.label.numpy(), omega_c, strict=True):
        classes, counts = np.unique(image, return_counts=True)
        for label, count in zip(classes, counts, strict=True):
            weight[image == label] = counts.min() / count
    weights = omega_c + omega_0 * np.exp(-(batch.border.double().numpy() ** 2) / (2 * sigma**2))
    loss = border_cross_entropy(Output(logits), batch, coefficients)
    assert loss.item() == pytest.approx(reference(logits, batch, weights.ravel()), rel=1e-5)


def test_a_pixel_without_two_cells_near_it_has_the_weight_of_its_class():
    logits, batch = make()
    far = batch._replace(border=torch.full_like(batch.border, 1e9))
    usual = LOSSES["border_cross_entropy"]
    coefficients = defaults(usual, sigma_border=usual.coefficients["sigma_border"].high)
    weights = class_balance(batch.label, n_classes=3).double().numpy().ravel()
    loss = border_cross_entropy(Output(logits), far, coefficients)
    assert loss.item() == pytest.approx(reference(logits, batch, weights), rel=1e-5)


def test_smooth_l1_is_the_papers_formula_on_the_difference_of_the_probabilities():
    logits, batch = make(k=2)
    probs = torch.softmax(logits.double(), dim=1).numpy()
    distance = np.abs(probs[:, 1] - probs[:, 0] - np.where(batch.label.numpy() == 1, 1, -1))
    expected = np.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()  # eq. 3-4
    assert (distance < 1).any()
    assert (distance > 1).any()
    assert smooth_l1(Output(logits), batch, {}).item() == pytest.approx(expected, rel=1e-6)


def test_smooth_l1_stays_exact_where_a_softmax_in_half_precision_would_not():
    z = torch.tensor([[[3.0, 40.0, -40.0]]])
    batch = Batch(torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 3, dtype=torch.uint8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = smooth_l1(Output(torch.stack([-z, z], dim=1).bfloat16()), batch, {})
    expected = np.mean([0.5 * (np.tanh(3.0) - 1) ** 2, 0.0, 2 - 0.5])
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.coefficients])
def test_members_may_differ_in_every_coefficient(name):
    loss, k = LOSSES[name], n_classes(name)
    (logits, batch), (auxiliary, _) = make(k=k), make(1, k=k)
    members = {key: torch.tensor([0.9 * each.default, 0.5 * each.default]) for key, each in loss.coefficients.items()}

    def value(coefficients):
        return loss.function(Output(logits, auxiliary), batch, coefficients)

    alone = [value({key: each[slot] for key, each in members.items()}) for slot in range(2)]
    torch.testing.assert_close(vmap(value)(members), torch.stack(alone))
    assert alone[0] != alone[1]


@pytest.mark.parametrize("name", LOSSES)
def test_stacked_gradients_are_those_of_each_member(name):
    loss, k = LOSSES[name], n_classes(name)
    made = [make(seed, k=k) for seed in range(4)]
    logits, auxiliary = (torch.stack([made[i][0] for i in pair]) for pair in ((0, 1), (2, 3)))
    batches = Batch(*(torch.stack(each) for each in list(zip(made[0][1], made[1][1], strict=True))[:3]), made[0][1][3])

    def value(logits, auxiliary, batch):
        return loss.function(Output(logits, auxiliary), batch, defaults(loss))

    stacked = vmap(grad(value), in_dims=(0, 0, Batch(0, 0, 0, None)))(logits, auxiliary, batches)
    for slot in range(2):
        alone = grad(value)(logits[slot], auxiliary[slot], batches.step(slot))
        torch.testing.assert_close(stacked[slot], alone)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_single_precision_under_autocast(name):
    loss, k = LOSSES[name], n_classes(name)
    logits, batch = make(k=k)
    halves = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss.function(Output(halves, halves), batch, defaults(loss))
    assert value.dtype == torch.float32
    exact = loss.function(Output(halves.double(), halves.double()), batch, defaults(loss))
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_takes_the_coefficients_it_names(name):
    loss, k = LOSSES[name], n_classes(name)
    logits, batch = make(k=k)
    needed = batch if loss.needs_border else batch._replace(border=None)
    output = Output(logits.requires_grad_(), make(1, k=k)[0])
    value = loss.function(output, needed, defaults(loss))
    value.backward()
    assert value.shape == ()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_file_of_its_name_that_names_its_source_and_what_differs(name):
    function = LOSSES[name].function
    assert (function.__name__, function.__module__) == (name, f"{losses.__name__}.{name}")
    assert re.search("Source: .*Differs: ", inspect.getdoc(function), flags=re.DOTALL)


@pytest.mark.parametrize("name", LOSSES)
def test_every_coefficient_allows_its_default_and_its_ends_and_nothing_else(name):
    for each in LOSSES[name].coefficients.values():
        for value in (each.default, each.low, each.high, int(each.high)):
            assert each.allows(value)
        for value in (each.high * 1.001, -0.001, float("nan"), True, "1", None, [1.0]):
            assert not each.allows(value)


def test_a_coefficient_says_what_it_may_be():
    assert Coefficient(5.0, low=0.1, high=1000.0, kind="pixels").expected == "pixels from 0.1 to 1000"
