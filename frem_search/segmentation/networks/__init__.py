"""Networks by name, and how a study's parameters become one of them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

import torch
from torch import nn

from frem_search import seeds
from frem_search.errors import ParameterError, UsageError, did_you_mean
from frem_search.segmentation.layers.batch_renorm import BatchRenorm
from frem_search.segmentation.layers.feature_enhancement import FeatureEnhancement
from frem_search.segmentation.networks.clmser import CLmser
from frem_search.segmentation.networks.compressed_unet import CompressedUNet
from frem_search.segmentation.networks.feedback_unet import FeedbackUNet
from frem_search.segmentation.networks.recurrent_unet import RecurrentUNet
from frem_search.segmentation.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "feedback_unet": FeedbackUNet,
    "recurrent_unet": RecurrentUNet,
    "clmser": CLmser,
    "compressed_unet": CompressedUNet,
}


def network_params(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a network that a study file may set: the keyword-only ones of its constructor.

    >>> network_params("unet")["base_channels"].default
    32
    """
    if name not in NETWORKS:
        message = f"Unknown network {name!r}.{did_you_mean(name, NETWORKS)} Known: {', '.join(NETWORKS)}."
        raise UsageError(message)
    parameters = inspect.signature(NETWORKS[name]).parameters
    return {key: each for key, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


def build_network(
    name: str, *, in_channels: int, n_classes: int, seed: int, params: Mapping[str, object], device: str = "cpu"
) -> nn.Module:
    """Return a network whose initial weights depend on `seed` alone.

    Args:
        name: A key of `NETWORKS`.
        in_channels: Channels of the images.
        n_classes: Classes of the labels, background included.
        seed: Whatever it is, the global generator is as before afterwards.
        params: Some of `network_params`, by name.
        device: Where the weights are drawn; "meta" gives shapes without memory.
    """
    known = network_params(name)
    checked = {key: _check(key, value, known=known, network=name) for key, value in params.items()}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        # The CPU's generator alone: torch.manual_seed would reseed every GPU too, which fork_rng then does not restore.
        torch.default_generator.manual_seed(seeds.derive(seed, "weights"))
        return NETWORKS[name](in_channels, n_classes, **checked)


def enhancement(network: nn.Module) -> FeatureEnhancement | None:
    """Return the first layer of a network that enhances features, if it has one."""
    return next((each for each in network.modules() if isinstance(each, FeatureEnhancement)), None)


def redraw(network: nn.Module, *, seed: int, fold: int, epoch: int) -> None:
    """Select the maps that a network enhances during an epoch."""
    for layer in network.modules():
        if isinstance(layer, FeatureEnhancement):
            layer.redraw(seed=seed, fold=fold, epoch=epoch)


def has_effect(network: nn.Module) -> bool:
    """Whether a network enhances features in training: there are maps to enhance, and by a factor that is not 1."""
    layer = enhancement(network)
    return layer is not None and layer.B > 0 and layer.X != 1


def is_enhanced_in_test(network: nn.Module) -> bool:
    """Whether a network enhances features in test too."""
    layer = enhancement(network)
    return layer is not None and layer.enhanced_in_test


@contextmanager
def in_phase(network: nn.Module, *, is_enhanced: bool) -> Iterator[None]:
    """Let a network enhance in test, or not, for as long as the block lasts.

    Args:
        network: Any; one without the module has one phase.
        is_enhanced: Whether the maps of the last epoch are enhanced in test.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, FeatureEnhancement)]
    before = [layer.enhanced_in_test for layer in layers]
    for layer in layers:
        layer.enhanced_in_test = is_enhanced
    try:
        yield
    finally:
        for layer, was_enhanced in zip(layers, before, strict=True):
            layer.enhanced_in_test = was_enhanced


def follow_length(network: nn.Module, n_steps: int) -> None:
    """Tell the layers that depend on it how many steps the whole training has."""
    for layer in network.modules():
        if isinstance(layer, BatchRenorm):
            layer.follow(n_steps)


def _check(key: str, value: object, *, known: Mapping[str, inspect.Parameter], network: str) -> object:
    """Return `value` as the type that parameter `key` of the network has, or raise."""
    if key not in known:
        message = f"a parameter of network {network!r} ({', '.join(known)})"
        raise ParameterError(key, message, value)
    wanted = known[key].annotation
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ParameterError(key, " or ".join(map(repr, get_args(wanted))), value)
        return value
    # bool is a subclass of int, but True is no count; 10 in a study file is a factor as good as 10.0.
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ParameterError(key, f"a value of type {wanted.__name__}", value)
    return value
