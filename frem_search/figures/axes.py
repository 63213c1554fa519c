"""A searched parameter as an axis: its range is the search space's, not the trials'."""

import math
from typing import Any, NamedTuple

from frem_search.study.record import StudyRecord


class Axis(NamedTuple):
    """A parameter's axis.

    Args:
        name: The parameter, as the study file spells it.
        low: The lower end of the search space; 0 for an axis of categories.
        high: The upper end of the search space; 1 for an axis of categories.
        is_log: Whether the space is searched on a logarithmic scale.
        categories: The choices of a parameter that is no number.
    """

    name: str
    low: float
    high: float
    is_log: bool
    categories: tuple[str, ...]

    def can_show(self, value: Any) -> bool:
        """Say whether a value has a place: 0 has none on a logarithmic axis."""
        return value is not None and not (self.is_log and value <= 0)

    def place(self, value: Any) -> Any:
        """Return where plotly draws a value that a trial has."""
        return str(value) if self.categories else value

    def place_note(self, value: Any) -> Any:
        """Return where plotly puts an annotation, which it counts in powers of ten on a logarithmic axis."""
        return math.log10(value) if self.is_log else self.place(value)

    def fraction(self, value: Any) -> float:
        """Return where a value lies between the two ends, from 0 to 1."""
        if self.categories:
            return (self.categories.index(str(value)) + 0.5) / len(self.categories)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def layout(self) -> dict[str, Any]:
        """Return the axis as plotly takes it."""
        if self.categories:
            return {"title": {"text": self.name}, "type": "category", "categoryarray": list(self.categories)}
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            shown = {"title": {"text": f"{self.name} (log scale)"}, "type": "log", "range": with_margin(low, high)}
            return shown | log_ticks(low, high)
        return {"title": {"text": self.name}, "type": "linear", "range": with_margin(self.low, self.high)}


def with_margin(low: float, high: float) -> list[float]:
    """Return the ends with a little to spare, so that the frame does not cut through a point on the bound."""
    margin = 0.03 * (high - low)
    return [low - margin, high + margin]


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks for an axis between two powers of ten: 1, 10, 100, or 1, 2, 5, 10 where it is short.

    >>> log_ticks(0, 3)["ticktext"], log_ticks(-5, -3)["ticktext"], log_ticks(0.3, 1.4)["ticktext"]
    (['1', '10', '100', '1000'], ['1e-5', '1e-4', '0.001'], ['2', '5', '10', '20'])
    """
    digits = (1, 2, 5) if high - low <= 1.5 else (1,)
    tens = range(math.floor(low), math.ceil(high) + 1)
    ticks = [(digit, ten) for ten in tens for digit in digits if low - 1e-9 <= math.log10(digit) + ten <= high + 1e-9]
    if len(ticks) < 2:  # plotly finds some in a range that is narrower still
        return {}
    texts = [f"{digit * 10.0**ten:g}" if -3 <= ten <= 5 else f"{digit}e{ten}" for digit, ten in ticks]
    return {
        "tickvals": [digit * 10.0**ten for digit, ten in ticks],
        "ticktext": texts,
        "minor": {"dtick": "D1", "ticks": "outside", "ticklen": 3},
    }


def parameter_axis(record: StudyRecord, name: str) -> Axis:
    """Return the axis of a searched parameter, wide enough for a trial that was enqueued outside its space."""
    entry = record.contract["space"][name]
    if not is_numeric(entry):
        tried = [trial.params[name] for trial in record.trials if name in trial.params]
        categories = tuple(dict.fromkeys(str(choice) for choice in [*entry["choices"], *tried]))
        return Axis(name, 0.0, 1.0, is_log=False, categories=categories)
    ends = entry.get("choices") or [entry["low"], entry["high"]]
    is_log = bool(entry.get("log", False))
    tried = [trial.params[name] for trial in record.trials if trial.params.get(name) is not None]
    # Zero has no place on a logarithmic axis.
    shown = [value for value in [*ends, *tried] if value > 0 or not is_log]
    low, high = min(shown), max(shown)
    if low == high:
        low, high = (low / 2, high * 2) if is_log else (low - 1, high + 1)
    return Axis(name, low, high, is_log=is_log, categories=())


def is_numeric(entry: dict[str, Any]) -> bool:
    """Say whether an entry of the search space is a range, or a choice among numbers."""
    choices = entry.get("choices", [])
    return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)
