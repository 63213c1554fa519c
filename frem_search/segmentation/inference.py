"""Predictions of a network, and their score against the labels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from frem_search.segmentation.metrics import METRICS, Score

EVAL_BATCH = 32  # images; bounds the memory of an evaluation


def precision_context(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks run: bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def predict(
    network: nn.Module, images: Float[Tensor, "n c h w"], *, precision: str, takes: str = "classes", tiles: int = 1
) -> Integer[Tensor, "n h w"] | Float[Tensor, "n k h w"]:
    """Return the class of every pixel, uint8, or the classes' probabilities; the network's mode is restored.

    Args:
        network: Of any mode.
        images: Normalised.
        precision: `fp32` or `bf16`.
        takes: `classes` or `probabilities`.
        tiles: Cut each image into so many bands of so many regions, predict these and put them together again.
    """
    was_training = network.training
    network.eval()
    bands = [
        torch.cat([_predict(network, each, precision, takes) for each in _cut(band, tiles, dim=3)], dim=-1)
        for band in _cut(images, tiles, dim=2)
    ]
    network.train(was_training)
    return torch.cat(bands, dim=-2)


def _cut(images: Float[Tensor, "n c h w"], n: int, *, dim: int) -> Sequence[Tensor]:
    """Return regions that differ by a pixel at most where their number does not divide the image."""
    return images.tensor_split(min(n, images.shape[dim]), dim=dim)


def _predict(
    network: nn.Module, images: Float[Tensor, "n c h w"], precision: str, takes: str
) -> Integer[Tensor, "n h w"] | Float[Tensor, "n k h w"]:
    parts = []
    for batch in images.split(EVAL_BATCH):
        with precision_context(images.device, precision):
            logits = network(batch).logits
        # argmax of bf16 logits would let ties decide; softmax needs the range.
        parts.append(
            logits.float().softmax(dim=1) if takes == "probabilities" else logits.argmax(dim=1).to(torch.uint8)
        )
    return torch.cat(parts)


def score_images(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Integer[Tensor, "n h w"],
    *,
    metric: str,
    n_classes: int,
    precision: str,
    tiles: int = 1,
) -> Score:
    """Return a metric over all images together, not yet waiting for the device."""
    chosen = METRICS[metric]
    pred = predict(network, images, precision=precision, takes=chosen.takes, tiles=tiles)
    return chosen.function(pred, labels, n_classes=n_classes)
