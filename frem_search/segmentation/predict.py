"""New images in, class pictures out: what a trained network says of images without labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import torch
from torch import nn

from frem_search.data.dataset import normalise
from frem_search.data.pages import read_pages
from frem_search.data.resize import resize_image
from frem_search.errors import ArtifactError, DatasetError, DeviceMemoryError, UsageError
from frem_search.segmentation.inference import predict
from frem_search.segmentation.weights import Weights
from frem_search.system.device import find_device
from frem_search.system.files import write_atomically

# Okabe and Ito's palette, told apart with every common colour blindness; class 0, the ground, is left as it is.
COLOURS = ((213, 94, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
OPACITY_RATIO = 0.45


class Page(NamedTuple):
    """One image to predict: the file, which of its pages, and the name of what is written."""

    file: Path
    position: int
    name: str


def predict_files(weights: Weights, files: Sequence[Path], *, out: Path, device: str = "auto") -> Iterator[Path]:
    """Write `<name>.png` with class indices and `<name>_overlay.png` to look at; yield each path when it is written.

    Every file is read and checked before the first is predicted. An image is resized and normalised as in training;
    then the classes' probabilities, not the classes, are brought back to the image's own size, which leaves no steps.
    Whatever an image shows is resized to `image_size`: it should be a field as wide as those of the training.

    Args:
        weights: Of the network.
        files: PNG or TIFF. Every page of a TIFF is an image, called `<name>_000` and so on if there are several.
        out: The folder to write into.
        device: As `find_device` takes it.

    Raises:
        DatasetError: A file cannot be read, or has other channels than the network was trained on.
        UsageError: Two pictures would have one name, or one would replace an image.
    """
    chosen = find_device(device)
    pages = [page for file in files for page in _check_file(file, n_channels=weights.in_channels)]
    _check_names(pages, out)
    network = weights.build(chosen)
    for file in files:
        images = read_pages(file)
        for page in (page for page in pages if page.file is file):
            image = images[page.position]
            try:
                pred = predict_image(network, image, weights=weights)
            except torch.OutOfMemoryError:
                size = " x ".join(map(str, image.shape[1:]))
                message = f"{file}: {chosen} has no memory for an image of {size} pixels. Use --device cpu, or cut it."
                raise DeviceMemoryError(message) from None
            yield _write(out / f"{page.name}.png", pred)
            yield _write(out / f"{page.name}_overlay.png", overlay(image, pred))


def predict_image(network: nn.Module, image: np.ndarray, *, weights: Weights) -> np.ndarray:
    """Return the class of every pixel, uint8 [h w], of an image [c h w] of any size and number type."""
    device = next(network.parameters()).device
    own = image.shape[1:]
    size = own if weights.image_size is None else weights.image_size
    rows, columns = (size, size) if isinstance(size, int) else size
    prepared = torch.from_numpy(normalise(resize_image(image, (rows, columns))))[None].to(device)
    prepared = prepared.contiguous(memory_format=torch.channels_last)
    if (rows, columns) == own:
        return predict(network, prepared, precision=weights.precision, tiles=weights.tiles)[0].cpu().numpy()
    probs = predict(network, prepared, precision=weights.precision, takes="probabilities", tiles=weights.tiles)
    # Antialiased: where the image is smaller than image_size, every probability counts and not each fourth.
    resized = nn.functional.interpolate(probs, size=own, mode="bilinear", antialias=True)
    return resized[0].argmax(dim=0).to(torch.uint8).cpu().numpy()


def overlay(image: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Return the image [c h w] as uint8 [h w 3], with the classes of `pred` above 0 in colours.

    From the eighth coloured class on, colours repeat.
    """
    shown = image if len(image) == 3 else image[:1].repeat(3, axis=0)
    low, high = np.percentile(shown, (1, 99))
    grey = np.clip((shown - low) / max(high - low, 1e-12), 0, 1) * 255
    palette = np.array(COLOURS, dtype=np.float64)[(pred.astype(int) - 1) % len(COLOURS)]
    ratio = np.where(pred > 0, OPACITY_RATIO, 0.0)[..., None]
    return np.rint((1 - ratio) * np.moveaxis(grey, 0, -1) + ratio * palette).astype(np.uint8)


def _check_file(file: Path, *, n_channels: int) -> list[Page]:
    images = read_pages(file)
    for image in images:
        if len(image) != n_channels:
            message = (
                f"{file}: expected an image of {n_channels} channel(s), as the network was trained on, but got "
                f"{len(image)}. Save it with as many, a grey one not as RGB."
            )
            raise DatasetError(message)
    names = [file.stem] if len(images) == 1 else [f"{file.stem}_{i:03d}" for i in range(len(images))]
    return [Page(file, i, name) for i, name in enumerate(names)]


def _check_names(pages: Sequence[Page], out: Path) -> None:
    """Nothing is written twice, and no image is replaced by its own prediction."""
    targets = Counter(str((out / f"{page.name}{end}").resolve()) for page in pages for end in (".png", "_overlay.png"))
    twice = [path for path, count in targets.items() if count > 1]
    replaced = [str(page.file) for page in pages if str(page.file.resolve()) in targets]
    if twice:
        message = f"--out: expected one picture of each name, but {twice[0]} would be written twice. Rename an image."
        raise UsageError(message)
    if replaced:
        message = f"--out: {replaced[0]} would be replaced by its own prediction. Choose another folder."
        raise UsageError(message)


def _write(path: Path, pixels: np.ndarray) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=4)))
    except OSError as error:
        message = f"{path}: cannot be written: {error.strerror or error}. Free space, or choose another --out."
        raise ArtifactError(message) from None
    return path
