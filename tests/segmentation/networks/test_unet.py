import re

import pytest
import torch

from frem_search.errors import ParameterError, UsageError
from frem_search.segmentation.networks import NETWORKS, build_network, enhancement
from frem_search.segmentation.networks.unet import JOINTS

SMALL = {"base_channels": 4, "depth": 2}


def build_unet(**params):
    return build_network("unet", in_channels=1, n_classes=3, seed=0, params=params)


def test_default_unet_has_the_papers_512_bottleneck_maps():
    with torch.device("meta"):
        assert enhancement(NETWORKS["unet"](1, 3)).channels == 512


def test_unknown_network_is_told_the_known_ones():
    with pytest.raises(UsageError, match=r"Unknown network 'unte'. Did you mean 'unet'\? Known: .*unet"):
        build_network("unte", in_channels=1, n_classes=3, seed=0, params={})


def test_unknown_parameter_is_told_the_known_ones():
    with pytest.raises(ParameterError, match=r"width: expected a parameter of network 'unet' \(base_channels, .*got 3"):
        build_unet(width=3)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("B", 1.5, "a value of type int"),
        ("B", True, "a value of type int"),
        ("B", 17, "0 to 16, the bottleneck's maps"),
        ("X", "10", "a value of type float"),
        ("X", True, "a value of type float"),
        ("base_channels", "x", "a value of type int"),
        ("base_channels", 0, "at least 1"),
        ("depth", 0, "at least 1"),
        ("squeeze_excite", 1, "a value of type bool"),
        ("normalization", "group_norm", "'batch_norm' or 'batch_renorm' or 'none'"),
        ("normalization", ["batch_norm"], "'batch_norm' or 'batch_renorm' or 'none'"),
    ],
)
def test_wrong_value_says_what_was_expected(key, value, expected):
    with pytest.raises(ParameterError, match=re.escape(f"{key}: expected {expected}, but got {value!r}.")):
        build_unet(**{**SMALL, key: value})


def test_whole_number_is_a_factor():
    assert enhancement(build_unet(**SMALL, B=1, X=10)).X == 10.0


@pytest.mark.parametrize("sizes", [{"n_classes": 1}, {"in_channels": 0}])
def test_too_few_classes_or_channels_is_an_error(sizes):
    with pytest.raises(ParameterError, match="expected at least"):
        build_network("unet", **{"in_channels": 1, "n_classes": 3, **sizes}, seed=0, params=SMALL)


def test_one_tiny_image_cannot_be_trained_on():
    network = build_unet(**SMALL)
    with pytest.raises(ParameterError, match="batch_size: expected at least 2 for training on images of 4x4 pixels"):
        network(torch.zeros(1, 1, 4, 4))
    assert network.eval()(torch.zeros(1, 1, 4, 4)).logits.shape == (1, 3, 4, 4)


def test_supervision_is_a_projection_of_the_bottleneck_resized_to_the_images():
    network = build_unet(**SMALL, supervision=True)
    seen = []
    network.enhancement.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    auxiliary = network(torch.randn(2, 1, 16, 16)).auxiliary
    head = network.supervision_head
    projected = torch.einsum("bchw,kc->bkhw", seen[0], head.weight[:, :, 0, 0]) + head.bias[:, None, None]
    expected = torch.nn.functional.interpolate(projected, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(auxiliary, expected)


def test_padding_does_not_change_the_logits_far_from_it():
    network = build_unet(**SMALL, squeeze_excite=False).eval()  # the blocks' means see the whole image
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(
        network(x[:, :, :, :63]).logits[:, :, :, :32], network(x).logits[:, :, :, :32], rtol=1e-4, atol=1e-5
    )


def test_parts_can_be_left_out():
    names = {type(each).__name__ for each in build_unet(**SMALL, squeeze_excite=False).modules()}
    assert "SqueezeExcite" not in names
    assert "DoubleConv" in names


@pytest.mark.parametrize("before_gate", [False, True])
def test_magnitudes_are_of_rectified_features_before_the_gate(before_gate):
    network = build_network(
        "unet", in_channels=1, n_classes=2, seed=0, params=SMALL | {"enhanced_before_gate": before_gate}
    )
    seen = []
    for block in network.encoder:
        convolutions = block if before_gate and block is network.encoder[-1] else block[0]
        convolutions.register_forward_hook(lambda *of: seen.append(of[2]))
    features = network(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))).features
    torch.testing.assert_close(features.bottleneck, seen[-1].abs().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(features.skip, seen[-2].abs().mean())


def test_the_gate_follows_the_module_that_stands_before_it():
    params = SMALL | {"B": 16, "X": 1e6, "enhanced_before_gate": True}
    network = build_network("unet", in_channels=1, n_classes=2, seed=0, params=params)
    network.enhancement.redraw(seed=0, fold=0, epoch=1)
    seen = []
    network.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rectified = []
    network.encoder[-1].register_forward_hook(lambda *of: rectified.append(of[2]))
    network(torch.randn(2, 1, 16, 16))
    torch.testing.assert_close(seen[0], rectified[0] * 1e6)


@pytest.mark.parametrize("concatenation", JOINTS)
def test_a_concatenation_is_normalized_before_its_block(concatenation):
    network = build_network(
        "unet", in_channels=1, n_classes=2, seed=0, params=SMALL | {"concatenation": concatenation}
    ).train()
    seen = []
    network.decoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(3 * torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    deviation = seen[0].std(dim=(0, 2, 3), correction=0)
    alive = deviation > 0
    is_normal = bool(((deviation[alive] - 1).abs() < 0.1).all())
    # Without limits it is the running statistics that normalize, and they begin with mean 0 and deviation 1.
    assert is_normal == (concatenation not in ("plain", "batch_renorm_unlimited"))
