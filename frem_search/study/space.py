"""The search space of a study: a value is fixed, a list is a choice, a table is a range."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from frem_search.errors import StudyFileError

RANGE_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Fixed:
    """A parameter with one value."""

    value: Any

    def bounds(self) -> tuple[Any, ...]:
        """Return the values at the edges: here the only one."""
        return (self.value,)

    def to_json(self) -> dict[str, Any]:
        """Return the form in which the contract holds it."""
        return {"value": self.value}


@dataclass(frozen=True)
class Choice:
    """One of several values; a list among them stands for a list."""

    choices: tuple[Any, ...]

    def bounds(self) -> tuple[Any, ...]:
        """Return the values at the edges: here all of them."""
        return self.choices

    def to_json(self) -> dict[str, Any]:
        """Return the form in which the contract holds it."""
        return {"choices": list(self.choices)}


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; integers if both ends are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether only integers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def bounds(self) -> tuple[Any, ...]:
        """Return the values at the edges."""
        return (self.low, self.high)

    def to_json(self) -> dict[str, Any]:
        """Return the form in which the contract holds it."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


Param = Fixed | Choice | Range
Space = Mapping[str, Param]


def parse_space(table: Mapping[str, Any], *, where: str) -> dict[str, Param]:
    """Read a study file's `[params]`.

    Raises:
        StudyFileError: A range is upside down, has unknown keys or ends that are no numbers, a choice is empty, or a
            number is not finite or needs more than 64 bits.

    >>> parse_space({"B": {"low": 1, "high": 512}, "X": [1, 10], "depth": 4}, where="studies/s.toml: params")
    {'B': Range(low=1, high=512, log=False, step=None), 'X': Choice(choices=(1, 10)), 'depth': Fixed(value=4)}
    """
    for name, value in table.items():
        _check_numbers(value, where=f"{where}.{name}")
    return {name: _parse_param(value, where=f"{where}.{name}") for name, value in table.items()}


def _check_numbers(value: Any, *, where: str) -> None:
    """Refuse numbers that neither the database nor a tensor can hold, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, where=f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, where=where)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        message = f"{where}: expected an integer of at most 64 bits, but got one of {value.bit_length()} bits."
        raise StudyFileError(message)
    elif isinstance(value, float) and not math.isfinite(value):
        message = f"{where}: expected a finite number, but got {value!r}."
        raise StudyFileError(message)


def _parse_param(value: Any, *, where: str) -> Param:
    if isinstance(value, dict) and set(value) == {"value"}:
        return Fixed(value["value"])
    if isinstance(value, dict):
        return _parse_range(value, where=where)
    if isinstance(value, list):
        if not value:
            message = f"{where}: a choice needs at least one value, but got []. Write a value, a list or a range."
            raise StudyFileError(message)
        repeated = [choice for i, choice in enumerate(value) if choice in value[:i]]
        if repeated:
            message = f"{where}: every choice must stand once, but {repeated[0]!r} stands twice. Remove one."
            raise StudyFileError(message)
        return Choice(tuple(value))
    return Fixed(value)


def _parse_range(table: dict[str, Any], *, where: str) -> Range:
    unknown = sorted(set(table) - set(RANGE_KEYS))
    if unknown or "low" not in table or "high" not in table:
        message = (
            f"{where}: a range has the keys low and high, and may have log and step, but got "
            f"{', '.join(table) or '{}'}. Write for example {{ low = 1, high = 512 }}; a fixed value that "
            "is a table is not supported."
        )
        raise StudyFileError(message)
    for key in ("low", "high", "step"):
        number = table.get(key)
        if key == "step" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            message = f"{where}.{key}: expected a number, but got {number!r}."
            raise StudyFileError(message)
    low, high, log, step = table["low"], table["high"], table.get("log", False), table.get("step")
    if low >= high:
        message = f"{where}: low must be below high, but got {low} and {high}. Swap them, or write the value alone."
        raise StudyFileError(message)
    if not isinstance(log, bool):
        message = f"{where}.log: expected true or false, but got {log!r}."
        raise StudyFileError(message)
    _check_steps(low, high, log=log, step=step, where=where)
    return Range(low, high, log, step)


def _check_steps(low: float, high: float, *, log: bool, step: float | None, where: str) -> None:
    if log and low <= 0:
        message = f"{where}: a logarithmic range must begin above 0, but low is {low}. Raise low, or remove log."
        raise StudyFileError(message)
    if step is None:
        return
    is_integer = isinstance(low, int) and isinstance(high, int)
    if log or step <= 0 or step > high - low or (is_integer and not isinstance(step, int)):
        message = (
            f"{where}.step: expected a step above 0 and at most {high - low}"
            f"{', an integer as both ends are' if is_integer else ''}, without log, but got {step}"
            f"{' with log' if log else ''}."
        )
        raise StudyFileError(message)
    # In decimals, as the file spells them: 0.1 divides 1.0 there and not in binary.
    first, last, width = (Decimal(str(number)) for number in (low, high, step))
    if beyond := (last - first) % width:
        message = (
            f"{where}.step: expected a step that leads from {low} to {high}, but got {step}, which ends at "
            f"{last - beyond}. Write that as high, or another step."
        )
        raise StudyFileError(message)


def space_from_json(stored: Mapping[str, Any]) -> dict[str, Param]:
    """Return the space that `to_json` wrote."""

    def param(entry: Mapping[str, Any]) -> Param:
        if "value" in entry:
            return Fixed(entry["value"])
        return Choice(tuple(entry["choices"])) if "choices" in entry else Range(**entry)

    return {name: param(entry) for name, entry in stored.items()}


def space_to_json(space: Space) -> dict[str, Any]:
    """Return the canonical form: sorted by name, so that the order in the file does not matter."""
    return {name: space[name].to_json() for name in sorted(space)}


def searched(space: Space) -> tuple[str, ...]:
    """Return the names of the parameters that are choices or ranges, in the file's order."""
    return tuple(name for name, param in space.items() if not isinstance(param, Fixed))


def corners(space: Space, *, most: int = 1024) -> Iterator[dict[str, Any]]:
    """Yield combinations of the parameters' edges: what fits there fits everywhere between.

    Every edge of every parameter is among them, however many there are; of their combinations, the first `most`.
    """
    names = list(space)
    for values in itertools.islice(itertools.product(*(space[name].bounds() for name in names)), most):
        yield dict(zip(names, values, strict=True))
    if math.prod(len(param.bounds()) for param in space.values()) > most:
        first = {name: space[name].bounds()[0] for name in names}
        yield from (first | {name: value} for name in names for value in space[name].bounds())


def resolve(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the full parameters of a trial: its drawn values as the study file spells them, and the fixed ones."""
    params: dict[str, Any] = {}
    for name, param in space.items():
        if isinstance(param, Fixed):
            params[name] = param.value
        elif isinstance(param, Choice):
            spelled = {to_categorical(choice): choice for choice in param.choices}
            params[name] = spelled[drawn[name]]
        else:
            params[name] = drawn[name]
    return params


def to_categorical(choice: Any) -> Any:
    """Return a choice as a scalar, which Optuna's choices are."""
    # Optuna's categorical choices are scalars; a list is stored as its JSON text.
    return json.dumps(choice) if isinstance(choice, list | tuple | dict) else choice
