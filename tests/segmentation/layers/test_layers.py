import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from frem_search.errors import ParameterError
from frem_search.segmentation.layers.batch_renorm import BatchRenorm
from frem_search.segmentation.layers.batch_statistics import BatchStatistics
from frem_search.segmentation.layers.double_conv import NORMALIZATIONS, DoubleConv
from frem_search.segmentation.layers.feature_enhancement import FeatureEnhancement
from frem_search.segmentation.layers.resize import resize_bilinear
from frem_search.segmentation.layers.squeeze_excite import SqueezeExcite
from frem_search.segmentation.layers.up_conv import UpConv, UpCopy


def images(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def enhanced_maps(*, B=3, epoch=0, seed=0, fold=0, **options):
    layer = FeatureEnhancement(16, B=B, X=10.0, **options)
    layer.redraw(seed=seed, fold=fold, epoch=epoch)
    return layer.enhanced


def test_enhancement_multiplies_b_maps_by_x_in_training():
    layer = FeatureEnhancement(16, B=5, X=632.0)
    layer.redraw(seed=0, fold=0, epoch=0)
    x = images(2, 16, 3, 4)
    expected = x.numpy().copy()
    expected[:, layer.enhanced] *= 632
    assert layer.enhanced.dtype == np.bool_
    assert layer.enhanced.sum() == 5
    np.testing.assert_array_equal(layer(x).numpy(), expected)


def test_enhancement_returns_its_input_in_test():
    layer = FeatureEnhancement(16, B=5, X=632.0).eval()
    layer.redraw(seed=0, fold=0, epoch=0)
    x = images(2, 16, 3, 4)
    assert layer(x) is x


def test_enhancement_in_test_uses_the_maps_of_training():
    layer = FeatureEnhancement(16, B=5, X=632.0, enhanced_in_test=True)
    layer.redraw(seed=0, fold=0, epoch=3)
    x = images(2, 16, 3, 4)
    trained = layer(x)
    assert torch.equal(layer.eval()(x), trained)
    assert not torch.equal(trained, x)


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"seed": 1}, {"fold": 1}])
def test_maps_change_with_epoch_seed_and_fold(changed):
    assert (enhanced_maps(**changed) != enhanced_maps()).any()


def test_maps_are_a_function_of_seed_fold_and_epoch():
    np.testing.assert_array_equal(enhanced_maps(epoch=7), enhanced_maps(epoch=7))


def test_fixed_maps_stay_those_of_the_first_epoch():
    np.testing.assert_array_equal(enhanced_maps(epoch=7, fixed_maps=True), enhanced_maps(epoch=0))


def test_trials_with_other_b_share_the_permutation():
    few, many = enhanced_maps(B=3, epoch=2), enhanced_maps(B=9, epoch=2)
    assert (few & many).sum() == 3


def test_every_map_is_enhanced_within_some_epochs():
    assert np.any([enhanced_maps(epoch=epoch) for epoch in range(60)], axis=0).all()


def test_redraw_writes_into_the_same_tensor():
    layer = FeatureEnhancement(16, B=3, X=10.0)
    gain = layer.gain
    layer.redraw(seed=0, fold=0, epoch=1)
    assert layer.gain is gain
    assert sorted(gain.tolist()) == [1.0] * 13 + [10.0] * 3


def test_enhancement_does_not_round_x_to_half_precision():
    layer = FeatureEnhancement(4, B=4, X=1.01)  # bfloat16 has no number between 1.0078 and 1.0156
    layer.redraw(seed=0, fold=0, epoch=0)
    x = torch.full((1, 4, 1, 1), 100.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.flatten().tolist() == torch.full((4,), 101.0).to(torch.bfloat16).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_enhanced_as_the_features_are(dtype):
    layer = FeatureEnhancement(4, B=2, X=8.0)
    layer.redraw(seed=0, fold=0, epoch=0)
    x = images(1, 4, 2, 2, dtype=dtype).requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.gain[None, :, None, None].expand_as(x).to(dtype))


@pytest.mark.parametrize("B", [-1, 17])
def test_b_outside_the_maps_is_an_error_that_says_how_many_there_are(B):
    with pytest.raises(ParameterError, match=rf"B: expected 0 to 16, the bottleneck's maps, but got {B}\."):
        FeatureEnhancement(16, B=B)


@pytest.mark.parametrize("X", [0.0, -1.0, float("nan"), float("inf"), 1e39])
def test_x_that_is_not_a_finite_factor_is_an_error(X):
    with pytest.raises(ParameterError, match="X: expected a finite factor above 0"):
        FeatureEnhancement(16, B=1, X=X)


def test_squeeze_excite_equals_its_equations():
    layer = SqueezeExcite(8, reduction=4)
    x = images(3, 8, 5, 6)
    w1, b1, w2, b2 = (each.detach().numpy() for each in layer.parameters())
    z = x.numpy().mean(axis=(2, 3))
    s = 1 / (1 + np.exp(-(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2)))
    assert w1.shape == (2, 8)
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() * s[:, :, None, None], rtol=1e-5, atol=1e-6)


def test_squeeze_excite_gate_is_not_rounded_under_autocast():
    layer = SqueezeExcite(8)
    x = images(3, 8, 5, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    gate = layer(x.float()) / x.float()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x * gate.mean(dim=(2, 3), keepdim=True).to(torch.bfloat16))


def test_squeeze_excite_refuses_no_reduction():
    with pytest.raises(ParameterError, match="se_reduction: expected at least 1, but got 0"):
        SqueezeExcite(8, reduction=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_up_conv_equals_the_transposed_convolution(memory_format):
    ours = UpConv(6, 4)
    theirs = nn.ConvTranspose2d(6, 4, kernel_size=2, stride=2, bias=False)
    with torch.no_grad():
        theirs.weight.copy_(ours.expand.weight.reshape(2, 2, 4, 6).permute(3, 2, 0, 1))
    x = images(2, 6, 3, 5).contiguous(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x))
    upstream = images(2, 4, 6, 10, seed=1)
    (of_ours,) = torch.autograd.grad(ours(x), x, upstream)
    (of_theirs,) = torch.autograd.grad(theirs(x), x, upstream)
    torch.testing.assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_double_conv_has_a_bias_only_where_nothing_normalizes(normalization):
    layer = DoubleConv(2, 4, normalization=normalization)
    has_bias = [each.bias is not None for each in layer.modules() if isinstance(each, nn.Conv2d)]
    assert has_bias == [normalization == "none"] * 2
    assert layer(images(2, 2, 8, 8)).min() == 0


def test_double_conv_names_the_normalizations_it_knows():
    with pytest.raises(
        ParameterError, match="normalization: expected batch_norm or batch_renorm or none, but got 'layer_norm'"
    ):
        DoubleConv(2, 4, normalization="layer_norm")


def trained(layer, x, *, steps):
    y = [layer(x + 0.1 * step) for step in range(steps)]
    return y[-1]


def test_batch_renorm_starts_as_batch_norm():
    ours, theirs = BatchRenorm(4), nn.BatchNorm2d(4)
    x = images(3, 4, 5, 6).requires_grad_()
    upstream = images(3, 4, 5, 6, seed=1)
    torch.testing.assert_close(trained(ours, x, steps=3), trained(theirs, x, steps=3))
    (of_ours,) = torch.autograd.grad(ours(x), x, upstream)
    (of_theirs,) = torch.autograd.grad(theirs(x), x, upstream)
    torch.testing.assert_close(of_ours, of_theirs)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_batch_renorm_equals_its_algorithm():
    layer = BatchRenorm(4, r_limit=1.5, d_limit=0.4, warmup_steps=2, r_ramp_steps=4, d_ramp_steps=8)
    x = images(3, 4, 5, 6)
    mean, std = np.zeros((4, 1, 1)), np.ones((4, 1, 1))
    for step, (r_max, d_max) in enumerate(
        [(1, 0), (1, 0), (1, 0), (1.125, 0.05), (1.25, 0.1), (1.375, 0.15), (1.5, 0.2)]
    ):
        batch = x.double().numpy() * (1 + step) + step
        mean_b = batch.mean(axis=(0, 2, 3))[:, None, None]
        std_b = np.sqrt(batch.var(axis=(0, 2, 3))[:, None, None] + 1e-5)
        r, d = np.clip(std_b / std, 1 / r_max, r_max), np.clip((mean_b - mean) / std, -d_max, d_max)
        expected = (batch - mean_b) / std_b * r + d
        mean, std = mean + 0.1 * (mean_b - mean), std + 0.1 * (std_b - std)
        np.testing.assert_allclose(layer(x * (1 + step) + step).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_std.numpy(), std.ravel(), rtol=1e-5)
    expected = (x.numpy() - mean) / std
    np.testing.assert_allclose(layer.eval()(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_corrections_of_batch_renorm_are_constants_to_the_gradient():
    layer = BatchRenorm(2, warmup_steps=0, r_ramp_steps=1, d_ramp_steps=1).double()
    layer.num_batches_tracked.fill_(10)
    x = images(3, 2, 4, 4, dtype=torch.float64) * 2 + 1
    r, d = BatchRenorm.correct(layer, x)
    layer.running_mean.zero_()
    layer.running_std.fill_(1)
    upstream = images(3, 2, 4, 4, seed=1, dtype=torch.float64)
    x.requires_grad_()
    (of_ours,) = torch.autograd.grad(layer(x), x, upstream)
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), (x.var(dim=(0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    by_hand = (x - mean) / std * r[:, None, None] + d[:, None, None]
    (expected,) = torch.autograd.grad(by_hand, x, upstream)
    assert (r > 1.5).all()
    torch.testing.assert_close(of_ours, expected)


def test_batch_renorm_members_at_different_steps_are_stacked_as_each_alone():
    def member(steps):
        layer = BatchRenorm(3, warmup_steps=5, r_ramp_steps=10, d_ramp_steps=10)
        layer.num_batches_tracked.fill_(steps)
        return layer

    x = images(2, 3, 4, 4) * 3 + 2
    params, buffers = stack_module_state([member(0), member(12)])
    base = member(0)
    stacked = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    for index, steps in enumerate([0, 12]):
        alone = member(steps)
        torch.testing.assert_close(stacked[index], alone(x))
        torch.testing.assert_close(buffers["running_std"][index], alone.running_std)
        assert buffers["num_batches_tracked"][index] == steps + 1


def test_batch_renorm_stays_in_half_precision_under_autocast():
    layer = BatchRenorm(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(images(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("shapes", [((3, 4), (48, 64)), ((1, 1), (4, 2)), ((5, 7), (9, 7)), ((8, 6), (3, 5))])
def test_resizing_equals_interpolate_and_so_does_its_gradient(shapes):
    (height, width), size = shapes
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    results = [resize_bilinear(x, size), nn.functional.interpolate(x, size=size, mode="bilinear")]
    gradients = [torch.autograd.grad((result * weight).sum(), x)[0] for result in results]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    stacked = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(lambda x: resize_bilinear(x, size))(stacked)[1], 2 * results[0])


def test_limits_of_batch_renorm_open_by_the_length_of_the_training():
    layers = [BatchRenorm(2, follows_length=True), BatchRenorm(2)]
    before = layers[1].limits.clone(), layers[1].momentum.clone()
    for layer in layers:
        layer.follow(400)
    assert layers[0].limits.tolist() == [3, 5, 0, 20, 20]
    assert layers[0].momentum.item() == pytest.approx(0.1)  # a memory of ten steps at least
    assert torch.equal(layers[1].limits, before[0])
    assert torch.equal(layers[1].momentum, before[1])
    layers[0].follow(100_000)
    assert layers[0].limits.tolist() == [3, 5, 0, 100, 100]
    assert layers[0].momentum.item() == pytest.approx(0.01)
    assert sorted(layers[0].state_dict()) == ["bias", "num_batches_tracked", "running_mean", "running_std", "weight"]


def test_an_unlimited_batch_renorm_normalizes_by_running_statistics_in_training_too():
    layer = BatchRenorm.unlimited(3)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    layer.running_std.copy_(torch.tensor([0.1, 20.0, 1.0]))
    x = images(4, 3, 5, 5) * 3
    expected = (x - layer.running_mean[:, None, None]) / layer.running_std[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_batch_statistics_normalize_by_the_batch_in_training_and_by_each_image_in_test():
    layer, x = BatchStatistics(3), images(4, 3, 5, 6) * 2 + 1
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))
    mean, std = x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), keepdim=True, correction=0).add(1e-5).sqrt()
    torch.testing.assert_close(layer.eval()(x), (x - mean) / std)


def test_copies_of_pixels_equal_interpolate():
    x = images(2, 3, 4, 5)
    assert torch.equal(UpCopy()(x), nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
