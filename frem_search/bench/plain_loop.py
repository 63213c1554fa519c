"""The plain loop: what a careful user would write first, without anything of frem-search's training."""

import copy
import math

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from frem_search.bench.plain_images import PlainImages, part_arrays
from frem_search.bench.speed import Trainee
from frem_search.data.dataset import Dataset, load_dataset
from frem_search.seeds import derive, generator
from frem_search.segmentation.batch import Batch
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.networks import build_network, redraw
from frem_search.training.recipe import first_image_size, split_params
from frem_search.training.resident import balanced_weights


class PlainLoop:
    """Eager, in single precision and PyTorch's own layout of images; it reads the loss after every step.

    Network, loss, optimizer, images, their number in an epoch, turns, crops and score are the study's. The images go
    through a DataLoader without processes of its own: they are in memory, and turning one takes less time than sending
    it from another process.

    Rotation, elastic deformation, mirrored quarters, schedules and patience are left out: where a study has these, the
    loop does less work than a trial, and ratios to it err on the low side. Images that validate are predicted whole,
    also where a trial predicts tiles.

    Args:
        trainee: What is trained; its first fold alone, and its precision is not heeded.
    """

    def __init__(self, trainee: Trainee) -> None:
        file, self.device = trainee.study_file, trainee.device
        split, dataset = split_params(file, trainee.params), _dataset(trainee)
        training, loss = split.training, LOSSES[file.loss]
        self._seed, self._fold = file.sampler.seed, file.folds[0]
        self._n_classes = len(dataset.class_names)
        self.network = build_network(
            file.network,
            in_channels=dataset.images.shape[1],
            n_classes=self._n_classes,
            seed=self._seed,
            params=split.network,
        ).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self._loss, self._metric = loss.function, METRICS[file.score]
        self._coefficients = {
            name: torch.tensor(value, device=self.device) for name, value in split.coefficients.items()
        }
        rng = generator(self._seed, "plain")
        train, val = (
            part_arrays(dataset, part, fold=self._fold, training=training, needs_border=loss.needs_border)
            for part in ("train", "val")
        )
        n_train = len(train[0])
        batch_size, n_steps = min(training.batch_size, n_train), training.steps_per_epoch
        self.images_per_epoch = n_train if n_steps is None else n_steps * batch_size
        images = PlainImages(train, rng, is_turned=training.augmentation, crop=training.crop)
        self.train_batches = self._loader(images, batch_size=batch_size, n_drawn=self.images_per_epoch)
        self.val_batches = self._loader(PlainImages(val, rng), batch_size=training.batch_size)
        labels = torch.from_numpy(train[1]).to(self.device)
        self._class_weights = balanced_weights(labels, n_classes=self._n_classes)
        self._epoch, self._best = 0, -math.inf
        self.best_weights: dict[str, Tensor] = {}

    def epoch(self) -> float:
        """Train and validate once; return the score."""
        self._epoch += 1
        redraw(self.network, seed=self._seed, fold=self._fold, epoch=self._epoch)
        self.network.train()
        for batch in self.train_batches:
            self.step(*batch)
        score = self.validate()
        if score > self._best:
            self._best, self.best_weights = score, copy.deepcopy(self.network.state_dict())
        return score

    def step(self, image: Tensor, label: Tensor, border: Tensor | None = None) -> float:
        """Train on one batch; return its loss.

        Args:
            image: [b c h w].
            label: [b h w].
            border: Distances to cells [b h w], for a loss that looks at them.
        """
        image, label = image.to(self.device), label.to(self.device)
        border = None if border is None else border.to(self.device)
        self.optimizer.zero_grad()
        batch = Batch(image, label, border, self._class_weights)
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
        self, images: PlainImages, *, batch_size: int, n_drawn: int | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of as many images as are to be drawn, none again before all were; else of all in order."""
        order = torch.Generator()
        order.manual_seed(derive(self._seed, "plain", "order"))
        return DataLoader(
            images,
            batch_size=batch_size,
            sampler=None if n_drawn is None else RandomSampler(images, num_samples=n_drawn, generator=order),
            generator=order,
            pin_memory=self.device.type == "cuda",
        )


def _dataset(trainee: Trainee) -> Dataset:
    """Return the images at the size that is trained; where a study searches sizes, not that of its first trial."""
    file = trainee.study_file
    image_size = split_params(file, trainee.params).training.image_size
    if image_size == first_image_size(file):
        return trainee.dataset
    return load_dataset(file.dataset, image_size=image_size, n_folds=file.n_folds)
