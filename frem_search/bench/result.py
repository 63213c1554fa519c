"""What a bench came to, and the numbers that follow from what was measured."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from frem_search.bench.speed import Arrangement


@dataclass(frozen=True)
class Entrant:
    """Who trains in a row of the table.

    Args:
        arrangement: In how many processes, how many side by side, in which layout.
        precision: `fp32`, `tf32` or `bf16`.
        is_plain: Whether by the plain loop.
    """

    arrangement: Arrangement
    precision: str
    is_plain: bool = False

    def __str__(self) -> str:
        n = self.arrangement.workers
        return str(self.arrangement) if not self.is_plain else "plain loop" if n == 1 else f"{n} plain loops"


@dataclass(frozen=True)
class Row:
    """What was measured of an entrant.

    Args:
        entrant: Who.
        images_per_s: Training images a second in each round, all processes and members together.
        peak_memory: Bytes of the device, of one member; 0 where it is not measured.
        error: Why it could not be run.
    """

    entrant: Entrant
    images_per_s: tuple[float, ...]
    peak_memory: int = 0
    error: str = ""


class Spread(NamedTuple):
    """The middle of some numbers and their two ends."""

    median: float
    low: float
    high: float

    def times(self, factor: float) -> "Spread":
        """Return all three multiplied.

        >>> Spread(2.0, 1.0, 4.0).times(3)
        Spread(median=6.0, low=3.0, high=12.0)
        """
        return Spread(*(value * factor for value in self))


def spread(values: Iterable[float]) -> Spread | None:
    """Return median and range; None of nothing.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0)
    """
    known = list(values)
    return Spread(statistics.median(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Bench:
    """A table of rows measured in turn, and what it takes to read it.

    Args:
        study: The study's name.
        dataset: The dataset's name.
        device: As its vendor calls it.
        cores: Processor cores that may be used.
        n_train: Training images.
        n_val: Validation images.
        image_size: Rows and columns of an image.
        batch_size: Images in a step.
        n_epochs: Of a trial.
        images_per_trial: Training images of all its epochs and folds.
        n_rounds: How often each row was measured.
        seconds: How long at least in each round.
        image_flops: Floating-point operations for one training image, validation included.
        matmul_rates: Floating-point operations a second of a matrix product, by precision.
        rows: The first is the plain loop.
    """

    study: str
    dataset: str
    device: str
    cores: int
    n_train: int
    n_val: int
    image_size: tuple[int, int]
    batch_size: int
    n_epochs: int
    images_per_trial: int
    n_rounds: int
    seconds: float
    image_flops: float
    matmul_rates: dict[str, float]
    rows: tuple[Row, ...]

    def images_per_s(self, row: Row) -> Spread | None:
        """Return the training images a second of a row over its rounds."""
        return spread(row.images_per_s)

    def trials_per_hour(self, row: Row) -> Spread | None:
        """Return how many trials a row trains in an hour, if nothing but training and validation took time."""
        speeds = self.images_per_s(row)
        return speeds and speeds.times(3600 / self.images_per_trial)

    def ratio_to_plain(self, row: Row) -> Spread | None:
        """Return the ratios to the plain loop of the same round: what slowed the machine slowed both."""
        plain = self.rows[0]
        if not row.images_per_s or not plain.images_per_s:
            return None
        return spread(own / other for own, other in zip(row.images_per_s, plain.images_per_s, strict=True))

    def flops_per_s(self, row: Row) -> float | None:
        """Return the useful floating-point operations a second, in the median round."""
        speeds = self.images_per_s(row)
        return None if speeds is None else speeds.median * self.image_flops

    def matmul_share(self, row: Row) -> float | None:
        """Return these as a fraction of what a matrix product reaches in the row's precision."""
        rate = self.flops_per_s(row)
        return None if rate is None else rate / self.matmul_rates[row.entrant.precision]
