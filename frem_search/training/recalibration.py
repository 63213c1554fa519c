"""Running statistics of normalization, estimated again on the training images as they are and without enhancement."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frem_search.segmentation.inference import precision_context
from frem_search.segmentation.layers.batch_renorm import BatchRenorm
from frem_search.segmentation.networks import in_phase

Normalization = nn.BatchNorm2d | BatchRenorm
STATISTICS = ("running_mean", "running_var", "running_std", "num_batches_tracked")


@torch.no_grad()
def recalibrate(network: nn.Module, images: Float[Tensor, "n c h w"], *, batch_size: int, precision: str) -> None:
    """Let running statistics be the mean over the images of one pass, each layer normalizing by its batch meanwhile.

    A training with enhancement leaves statistics of enhanced features behind, by which features that are not enhanced
    are divided in test. Nothing waits for the device.

    Source: none of the four papers; Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
        Generalization", arXiv:1803.05407, Algorithm 1, do so for averaged weights.

    Args:
        network: Its statistics are changed in place; its mode is restored.
        images: Normalised, not augmented.
        batch_size: Of the pass, as in training.
        precision: `fp32` or `bf16`.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Normalization)]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    with ExitStack() as undone:
        undone.enter_context(in_phase(network, is_enhanced=False))
        undone.enter_context(precision_context(images.device, precision))
        for layer in layers:
            undone.enter_context(_by_its_batch(layer))
        n_before = 0
        for batch in _batches(images, batch_size):
            for layer in layers:
                _weigh(layer, len(batch) / (n_before + len(batch)))
            network(batch)
            n_before += len(batch)
    for module, mode in modes.items():
        module.training = mode


def copy_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of a network's running statistics, by their names in its state."""
    return {name: value.clone() for name, value in network.named_buffers() if name.rpartition(".")[2] in STATISTICS}


def restore_statistics(network: nn.Module, copies: dict[str, Tensor]) -> None:
    """Put copied statistics back in place."""
    for name, value in network.named_buffers():
        if name in copies:
            value.copy_(copies[name])


def _batches(images: Tensor, batch_size: int) -> list[Tensor]:
    """Return batches, the last one joined to the one before it if it were a single image, of which no layer learns."""
    batches = list(images.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


@contextmanager
def _by_its_batch(layer: Normalization) -> Iterator[None]:
    """Let a layer forget its statistics, and normalize by its batch alone for as long as the block lasts."""
    layer.training = True
    # Forgotten, as what is large, or no number, would else be left over in the last digits.
    if isinstance(layer, BatchRenorm):
        layer.running_mean.zero_()
        layer.running_std.fill_(1.0)
        limits, memory = layer.limits.clone(), layer.momentum.clone()
        layer.limits[0].fill_(1.0)  # no correction of the scale
        layer.limits[1].fill_(0.0)  # nor of the shift
        yield
        layer.limits.copy_(limits)
        layer.momentum.copy_(memory)
    else:
        layer.reset_running_stats()
        momentum = layer.momentum
        yield
        layer.momentum = momentum


def _weigh(layer: Normalization, share: float) -> None:
    """Set by how much the statistics move towards those of the next batch."""
    if isinstance(layer, BatchRenorm):
        layer.momentum.fill_(share)
    else:
        layer.momentum = share
