"""Training images per second on the CPU: a plain loop against a member trained alone, in one run.

The plain loop is what a careful user would write first: eager, fp32, contiguous, DataLoader, Adam, augmentation of each
image on its own. Both train the same U-Net on the same images; validation is left out of both.

    python benchmarks/training_speed.py [--repeats 5]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from frem_search.losses import LOSSES
from frem_search.networks import build_network
from frem_search.training.cohort import Cohort
from frem_search.training.device import describe_device
from frem_search.training.epoch import train_alone
from frem_search.training.member import Member
from frem_search.training.resident import Part, ResidentData

SIZE, BATCH, BASE, N_IMAGES = 64, 8, 8, 40
DEVICE = torch.device("cpu")
COEFFICIENTS = {name: torch.tensor(value) for name, value in LOSSES["softmax_cross_entropy"].coefficients.items()}


class PlainImages(TorchDataset):
    """Images that are turned and flipped one by one when they are asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels, self.rng = images, labels, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.images[index], self.labels[index]
        turns, is_flipped = self.rng.integers(4), self.rng.integers(2)
        image, label = np.rot90(image, turns, axes=(1, 2)), np.rot90(label, turns)
        if is_flipped:
            image, label = image[:, :, ::-1], label[:, ::-1]
        return torch.from_numpy(image.copy()), torch.from_numpy(label.astype(np.int64))


def make_network() -> torch.nn.Module:
    """Return the network that both train."""
    return build_network(
        "unet", in_channels=1, n_classes=3, seed=0, params={"base_channels": BASE, "B": 40, "X": 100.0}
    )


def time_plain(images: np.ndarray, labels: np.ndarray) -> float:
    """Return images per second of one epoch of the plain loop."""
    network = make_network().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loader = DataLoader(PlainImages(images, labels), batch_size=BATCH, shuffle=True)

    def epoch() -> None:
        for image, target in loader:
            optimizer.zero_grad()
            loss = LOSSES["softmax_cross_entropy"].function(network(image), target, COEFFICIENTS)
            loss.backward()
            optimizer.step()
            loss.item()

    return images_per_s(epoch)


def time_alone(images: np.ndarray, labels: np.ndarray, precision: str) -> float:
    """Return images per second of one epoch of a member by itself."""
    whole = Part(
        tuple(map(str, range(len(images)))),
        torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
        torch.from_numpy(labels),
    )
    data = ResidentData(whole, whole, whole, n_classes=3, device=DEVICE)
    cohort = Cohort(loss="softmax_cross_entropy", metric="mean_iou", precision=precision, seed=0, fold=0)
    member = Member(0, make_network(), data, {"lambda": 0.3}, learning_rate=1e-3, batch_size=BATCH, n_epochs=10**9)

    def epoch() -> None:
        batches = cohort.begin_epoch(member)
        train_alone(member, batches, loss=cohort.loss, precision=precision)
        member.epoch += 1  # so that the next one has batches of its own

    return images_per_s(epoch)


def images_per_s(epoch: object, n_epochs: int = 4) -> float:
    """Return the speed of `epoch` after one run that is not counted."""
    epoch()
    started = time.perf_counter()
    for _ in range(n_epochs):
        epoch()
    return n_epochs * N_IMAGES / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N_IMAGES, 1, SIZE, SIZE), dtype=np.float32)
    labels = rng.integers(0, 3, (N_IMAGES, SIZE, SIZE), dtype=np.uint8)
    rows: dict[str, list[float]] = {"plain loop, fp32": [], "frem-search, fp32": [], "frem-search, bf16": []}
    for _ in range(repeats):  # in turn, so that a change of the machine's speed meets all of them
        rows["plain loop, fp32"].append(time_plain(images, labels))
        rows["frem-search, fp32"].append(time_alone(images, labels, "fp32"))
        rows["frem-search, bf16"].append(time_alone(images, labels, "bf16"))
    print(
        f"torch {torch.__version__}, {describe_device(DEVICE)}, base {BASE}, {SIZE}x{SIZE}, batch {BATCH},"
        f" n = {repeats}"
    )
    print(f"{'':20} {'images/s':>9} {'min':>7} {'max':>7} {'ratio to plain: median':>23} {'min':>6} {'max':>6}")
    for name, speeds in rows.items():
        ratios = [speed / plain for speed, plain in zip(speeds, rows["plain loop, fp32"], strict=True)]
        print(
            f"{name:20} {statistics.median(speeds):9.0f} {min(speeds):7.0f} {max(speeds):7.0f}"
            f" {statistics.median(ratios):23.2f} {min(ratios):6.2f} {max(ratios):6.2f}"
        )


if __name__ == "__main__":
    main()
