import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.func import vmap

from frem_search.losses import LOSSES, softmax_cross_entropy
from frem_search.output import Output


def batch(seed=0, *, k=3):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((2, k, 5, 6)) * 3).float()
    return logits, torch.from_numpy(rng.integers(k, size=(2, 5, 6)))


def reference(logits, target):
    scores = logits.double().numpy().transpose(0, 2, 3, 1).reshape(-1, logits.shape[1])
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return log_loss(target.numpy().ravel(), probs, labels=range(logits.shape[1]))


def test_cross_entropy_equals_scikit_learn():
    logits, target = batch()
    assert softmax_cross_entropy(Output(logits), target, {}).item() == pytest.approx(
        reference(logits, target), rel=1e-6
    )


@pytest.mark.parametrize("weight", [0.0, 0.3257, 1.0])
def test_lambda_weighs_the_two_losses(weight):
    logits, target = batch()
    auxiliary, _ = batch(1)
    loss = softmax_cross_entropy(Output(logits, auxiliary), target, {"lambda": torch.tensor(weight)})
    expected = (1 - weight) * reference(logits, target) + weight * reference(auxiliary, target)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_members_may_differ_in_lambda():
    logits, target = batch()
    auxiliary, _ = batch(1)
    weights = torch.tensor([0.1, 0.9])

    def loss(weight):
        return softmax_cross_entropy(Output(logits, auxiliary), target, {"lambda": weight})

    torch.testing.assert_close(vmap(loss)(weights), torch.stack([loss(each) for each in weights]))


def test_loss_is_single_precision_under_autocast():
    logits, target = batch()
    halves = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = softmax_cross_entropy(Output(halves), target, {})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(halves.float(), target), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_takes_the_coefficients_it_names(name):
    loss = LOSSES[name]
    logits, target = batch()
    coefficients = {key: torch.tensor(value) for key, value in loss.coefficients.items()}
    output = Output(logits.requires_grad_(), batch(1)[0])
    value = loss.function(output, target.to(torch.uint8), coefficients)
    value.backward()
    assert value.shape == ()
    assert logits.grad.isfinite().all()
