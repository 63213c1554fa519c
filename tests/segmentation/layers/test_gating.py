import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch.func import functional_call, grad, vmap

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.gating import ConfidenceMask, PixelGate

GAMMAS = [1.0, 1.5, 2.0, 3.0, 4.0]


def images(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def test_pixel_gate_equals_its_equation():
    layer = PixelGate()
    x = images(3, 5, 6, 7)
    (kernel,) = layer.conv.weight.detach().numpy()[0]
    mean = x.numpy().mean(axis=1)
    gate = 1 / (1 + np.exp(-np.stack([correlate(each, kernel, mode="constant") for each in mean])))
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() * gate[:, None], rtol=1e-5, atol=1e-6)


def test_pixel_gate_is_not_rounded_under_autocast():
    layer = PixelGate()
    x = images(2, 5, 6, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    gate = torch.sigmoid(layer.conv(x.float().mean(dim=1, keepdim=True)))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x * gate.to(torch.bfloat16))


def test_mask_is_one_in_doubt_and_zero_in_certainty():
    mask = ConfidenceMask(3.0)(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    assert mask.tolist() == [0.0, 27 / 64, 1.0, 27 / 64, 0.0]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_and_its_gradient_are_those_of_the_equation_and_finite(gamma, dtype):
    x = torch.tensor([-1.0, -0.75, -1e-20, 0.0, 0.25, 0.9375, 1.0], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = ConfidenceMask(gamma)(x)
    y.sum().backward()
    exact = x.detach().double().numpy()
    doubt = 1 - exact**2
    np.testing.assert_allclose(y.detach().numpy(), doubt**gamma, rtol=1e-6)
    slope = -2 * exact * gamma * doubt ** (gamma - 1)
    np.testing.assert_allclose(x.grad.double().numpy(), slope, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_mask_is_computed_in_single_precision_under_autocast():
    x = torch.tensor([0.9375], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ConfidenceMask(3.0)(x)
    assert y.dtype == torch.float32
    assert y.item() == np.float32(1 - 0.9375**2) ** 3  # rounded to bfloat16 it would be another number
    assert y.item() != y.bfloat16().item()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_answer_rounded_past_one_is_certain(gamma):
    x = torch.tensor([np.nextafter(np.float32(1), np.float32(2)), -1.5], requires_grad=True)
    y = ConfidenceMask(gamma)(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0]
    assert x.grad.isfinite().all()


def test_exponent_is_a_buffer():
    layer = ConfidenceMask(2.5)
    assert list(layer.parameters()) == []
    assert {name: value.item() for name, value in layer.state_dict().items()} == {"gamma": 2.5}
    assert layer.gamma.dtype == torch.float32
    assert layer.gamma.shape == ()


def test_exponents_side_by_side_give_each_its_own_mask_and_gradient():
    layer = ConfidenceMask(3.0)
    x = images(len(GAMMAS), 4, 5).tanh()

    def total(x, gamma):
        return functional_call(layer, {"gamma": gamma}, (x,)).sum()

    stacked = vmap(grad(total))(x, torch.tensor(GAMMAS))
    for own, gamma, of_all in zip(x, GAMMAS, stacked, strict=True):
        own = own.clone().requires_grad_()
        ConfidenceMask(gamma)(own).sum().backward()
        torch.testing.assert_close(of_all, own.grad)


@pytest.mark.parametrize("gamma", [0.999, 0.0, -3.0, float("nan"), float("inf"), 1e39])
def test_exponent_without_a_finite_gradient_is_an_error(gamma):
    with pytest.raises(ParameterError, match="gamma: expected a finite exponent of at least 1, but got"):
        ConfidenceMask(gamma)
