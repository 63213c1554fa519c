"""Predictions of a network, and their score against the labels."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from frem_search.segmentation.metrics import METRICS, Score
from frem_search.segmentation.output import Output

Criterion = Callable[[Output, slice], Tensor]  # the loss of an output for some of the images
EVAL_BATCH = 32  # images; bounds the memory of an evaluation


def precision_context(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks run: bf16 autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


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
    return predict_with_loss(network, images, precision=precision, takes=takes, tiles=tiles, criterion=None)[0]


@torch.inference_mode()
def predict_with_loss(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    *,
    precision: str,
    takes: str,
    tiles: int,
    criterion: Criterion | None,
) -> tuple[Integer[Tensor, "n h w"] | Float[Tensor, "n k h w"], Float[Tensor, ""] | None]:
    """Return what `predict` does, and the mean loss of an image, not yet waiting for the device.

    Args:
        network: Of any mode.
        images: Normalised.
        precision: `fp32` or `bf16`.
        takes: `classes` or `probabilities`.
        tiles: As `predict` takes them.
        criterion: Gives the loss of an output for a slice of the images; None is no loss.
    """
    was_training = network.training
    network.eval()
    preds, losses = [], []
    for start in range(0, len(images), EVAL_BATCH):
        rows = slice(start, min(start + EVAL_BATCH, len(images)))
        with precision_context(images.device, precision):
            logits = _logits(network, images[rows], tiles)
            if criterion is not None:
                losses.append(criterion(Output(logits), rows).float() * (rows.stop - rows.start))
        # argmax of bf16 logits would let ties decide; softmax needs the range.
        preds.append(
            logits.float().softmax(dim=1) if takes == "probabilities" else logits.argmax(dim=1).to(torch.uint8)
        )
    network.train(was_training)
    return torch.cat(preds), torch.stack(losses).sum() / len(images) if losses else None


def _logits(network: nn.Module, images: Float[Tensor, "n c h w"], tiles: int) -> Float[Tensor, "n k h w"]:
    if tiles == 1:
        logits: Tensor = network(images).logits
        return logits
    bands = [
        torch.cat([network(region).logits for region in _cut(band, tiles, dim=3)], dim=3)
        for band in _cut(images, tiles, dim=2)
    ]
    return torch.cat(bands, dim=2)


def _cut(images: Float[Tensor, "n c h w"], n: int, *, dim: int) -> Sequence[Tensor]:
    """Return regions that differ by a pixel at most where their number does not divide the image."""
    return images.tensor_split(min(n, images.shape[dim]), dim=dim)


def score_images(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Integer[Tensor, "n h w"],
    *,
    metric: str,
    n_classes: int,
    precision: str,
    tiles: int = 1,
    criterion: Criterion | None = None,
) -> Score:
    """Return a metric over all images together, and their loss if a criterion gives it, not yet waiting."""
    chosen = METRICS[metric]
    pred, loss = predict_with_loss(
        network, images, precision=precision, takes=chosen.takes, tiles=tiles, criterion=criterion
    )
    return chosen.function(pred, labels, n_classes=n_classes)._replace(loss=loss)
