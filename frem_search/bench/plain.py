"""The plain loop: what a careful user would write first, without anything of frem-search's training."""

import copy
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from frem_search.batch import Batch
from frem_search.data.dataset import Dataset, load_dataset
from frem_search.errors import ParameterError
from frem_search.losses import LOSSES
from frem_search.metrics import METRICS
from frem_search.networks import build_network, redraw
from frem_search.parameters import first_image_size, split_params
from frem_search.seeds import derive, generator
from frem_search.speed import Trainee
from frem_search.training.resident import balanced_weights


class PlainImages(TorchDataset[tuple[Tensor, Tensor]]):
    """Images on the host, each turned and flipped when it is asked for if there is a generator to draw from."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator | None) -> None:
        self.images, self.labels, self._rng = images, labels, rng

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index], self.labels[index]
        if self._rng is not None:
            quarter = 1 if image.shape[1] == image.shape[2] else 2  # a batch has one shape
            turns, is_flipped = quarter * int(self._rng.integers(4)), bool(self._rng.integers(2))
            image, label = np.rot90(image, turns, axes=(1, 2)), np.rot90(label, turns)
            if is_flipped:
                image, label = image[:, :, ::-1], label[:, ::-1]
        return torch.from_numpy(image.copy()), torch.from_numpy(label.astype(np.int64))


class PlainLoop:
    """Eager, in single precision and PyTorch's own layout of images; it reads the loss after every step.

    Network, loss, optimizer, images and score are the study's. The images go through a DataLoader without processes
    of its own: they are in memory, and turning one takes less time than sending it from another process.
    """

    def __init__(self, trainee: Trainee) -> None:
        file, self.device = trainee.study_file, trainee.device
        split, dataset = split_params(file, trainee.params), _dataset(trainee)
        self._seed, self._fold = file.sampler.seed, file.folds[0]
        self._n_classes = len(dataset.class_names)
        self.network = build_network(
            file.network,
            in_channels=dataset.images.shape[1],
            n_classes=self._n_classes,
            seed=self._seed,
            params=split.network,
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=split.training.learning_rate)
        loss, self._metric = LOSSES[file.loss], METRICS[file.score]
        if loss.needs_border:
            raise ParameterError(name="loss", expected="one that needs no distances between cells", got=file.loss)
        self._loss = loss.function
        self._coefficients = {
            name: torch.tensor(value, device=self.device) for name, value in split.coefficients.items()
        }
        rng = generator(self._seed, "plain") if split.training.augmentation else None
        self.train_batches = self._loader(dataset, "train", batch_size=split.training.batch_size, rng=rng)
        self.val_batches = self._loader(dataset, "val", batch_size=split.training.batch_size)
        train = dataset.indices("train", fold=self._fold)
        self.n_train = len(train)
        labels = torch.from_numpy(dataset.labels[train]).to(self.device)
        self._class_weights = balanced_weights(labels, n_classes=self._n_classes)
        self._epoch, self._best = 0, -math.inf
        self.best_weights: dict[str, Tensor] = {}

    def epoch(self) -> float:
        """Train and validate once; return the score."""
        self._epoch += 1
        redraw(self.network, seed=self._seed, fold=self._fold, epoch=self._epoch)
        self.network.train()
        for image, target in self.train_batches:
            self.step(image, target)
        score = self.validate()
        if score > self._best:
            self._best, self.best_weights = score, copy.deepcopy(self.network.state_dict())
        return score

    def step(self, image: Tensor, target: Tensor) -> float:
        """Train on one batch; return its loss."""
        image, target = image.to(self.device), target.to(self.device)
        self.optimizer.zero_grad()
        batch = Batch(image, target, class_weights=self._class_weights)
        loss = self._loss(self.network(image), batch, self._coefficients)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Return the score of the validation images."""
        self.network.eval()
        preds, targets = [], []
        for image, target in self.val_batches:
            logits = self.network(image.to(self.device)).logits
            pred = logits.softmax(dim=1) if self._metric.takes == "probabilities" else logits.argmax(dim=1)
            preds.append(pred.cpu())
            targets.append(target)
        return self._metric.function(torch.cat(preds), torch.cat(targets), n_classes=self._n_classes).value.item()

    def _loader(
        self, dataset: Dataset, part: str, *, batch_size: int, rng: np.random.Generator | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        indices = dataset.indices(part, fold=self._fold)  # type: ignore[arg-type]
        order = torch.Generator()
        order.manual_seed(derive(self._seed, "plain", part))
        return DataLoader(
            PlainImages(dataset.images[indices], dataset.labels[indices], rng),
            batch_size=batch_size,
            shuffle=part == "train",
            generator=order,
            pin_memory=self.device.type == "cuda",
        )


def _dataset(trainee: Trainee) -> Dataset:
    """Return the images at the size that is trained; where a study searches sizes, not that of its first trial."""
    image_size = split_params(trainee.study_file, trainee.params).training.image_size
    if image_size == first_image_size(trainee.study_file):
        return trainee.dataset
    return load_dataset(trainee.study_file.dataset, image_size=image_size)
