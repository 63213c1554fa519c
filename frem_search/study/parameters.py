"""What a study may set about training, and what each of these may be."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from frem_search.errors import ParameterError


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: object) -> bool:
    sides = value if isinstance(value, list | tuple) else (value, value)
    return len(sides) == 2 and all(_is_count(side) for side in sides)


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_schedule(value: object) -> bool:
    """Whether it is a list of epochs, each later than the one before, with a factor above 0 each."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, list | tuple) for each in value):
        return False
    are_pairs = all(len(each) == 2 and _is_count(each[0]) and _is_number(each[1]) and each[1] > 0 for each in value)
    return are_pairs and all(one[0] < other[0] for one, other in pairwise(value))


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


# What a study may say, in words and as a test.
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": ("a finite number above 0", lambda value: _is_number(value) and value > 0),
    "batch_size": ("an integer of at least 1", _is_count),
    "augmentation": ("true or false", _is_flag),
    "image_size": ("pixels, or [rows, columns]", lambda value: value is None or _is_size(value)),
    "rotation": ("true or false", _is_flag),
    "alpha": ("a finite number of at least 0", lambda value: _is_number(value) and value >= 0),
    "fixed_alpha": ("true or false", _is_flag),
    "elastic_share": ("a share from 0 to 1", _is_share),
    "sigma_elastic": ("pixels from 0.1 to 1000", lambda value: _is_number(value) and 0.1 <= value <= 1000),
    "elastic_from": ("a score from 0 to 1", _is_share),
    "mirror_quarters": ("a share from 0 to 1", _is_share),
    "crop_size": ("pixels, or [rows, columns]", lambda value: value is None or _is_size(value)),
    "weight_decay": ("a finite number of at least 0", lambda value: _is_number(value) and value >= 0),
    "schedule": ("{ value = [[epoch, factor], ...] } with rising epochs from 1 on and factors above 0", _is_schedule),
    "patience": ("an integer of at least 1", lambda value: value is None or _is_count(value)),
    "steps_per_epoch": ("an integer of at least 1", lambda value: value is None or _is_count(value)),
    "tiles": ("an integer of at least 1", _is_count),
    "eightfold": ("true or false", _is_flag),
    "seed": ("an integer of at least 0", _is_seed),
    "recalibrate": ("true or false", _is_flag),
}


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """What a study may set about training; the meaning of each is in docs/studies.md, the reasons in docs/decisions.md.

    Raises:
        ParameterError: One has a wrong value.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    image_size: int | tuple[int, int] | None = None
    augmentation: bool = True
    rotation: bool = False
    alpha: float = 0.0
    fixed_alpha: bool = False
    elastic_share: float = 1.0
    sigma_elastic: float = 4.0
    elastic_from: float = 0.0
    mirror_quarters: float = 0.0
    crop_size: int | tuple[int, int] | None = None
    weight_decay: float = 0.0
    schedule: tuple[tuple[int, float], ...] = ()
    patience: int | None = None
    steps_per_epoch: int | None = None
    tiles: int = 1
    eightfold: bool = False
    seed: int = 0
    recalibrate: bool = False

    def __post_init__(self) -> None:
        for name, (expected, is_allowed) in ALLOWED.items():
            if not is_allowed(getattr(self, name)):
                raise ParameterError(name, expected, getattr(self, name))

    @property
    def crop(self) -> tuple[int, int] | None:
        """Rows and columns of a crop."""
        return (self.crop_size, self.crop_size) if isinstance(self.crop_size, int) else self.crop_size

    def check_size(self, height: int, width: int) -> None:
        """Raise if images of a size cannot be turned, cut and cropped as they should.

        Raises:
            ParameterError: It says at which size they could.
        """
        size = f"images of {height} x {width} pixels"
        if self.eightfold and height != width:
            raise ParameterError(
                name="eightfold", expected=f"false, or a square image_size, for {size}", got=self.eightfold
            )
        if height % self.tiles or width % self.tiles:
            raise ParameterError(name="tiles", expected=f"a divisor of height and width of {size}", got=self.tiles)
        if self.crop is not None and (self.crop[0] * self.tiles > height or self.crop[1] * self.tiles > width):
            of_tiles = f" cut into {self.tiles} x {self.tiles}" if self.tiles > 1 else ""
            raise ParameterError(name="crop_size", expected=f"at most the size of {size}{of_tiles}", got=self.crop_size)


TRAINING_PARAMS = tuple(inspect.signature(TrainingParams).parameters)


@dataclass(frozen=True)
class SplitParams:
    """The parameters of one trial, by whom they concern."""

    training: TrainingParams
    network: dict[str, Any]
    coefficients: dict[str, float]
