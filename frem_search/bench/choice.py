"""Who enters a bench: the plain loop, and every arrangement of trials that can be used on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from frem_search.bench.plain_speed import plain_precision
from frem_search.bench.result import Entrant
from frem_search.bench.speed import Arrangement
from frem_search.errors import UsageError, did_you_mean
from frem_search.system.cores import n_cores
from frem_search.training.side_by_side.layouts import ALONE, LAYOUTS

COHORTS = (2, 4, 8)


@dataclass(frozen=True)
class Choice:
    """What is compared.

    Args:
        cohorts: How many trials side by side in one process.
        layouts: Names of `LAYOUTS`; all that share the device where this is empty.
        processes: How many processes side by side; what suits the device where this is empty.
    """

    cohorts: Sequence[int] = COHORTS
    layouts: Sequence[str] = ()
    processes: Sequence[int] = ()


def entrants(device: torch.device, *, precision: str, choice: Choice) -> Iterator[Entrant]:
    """Yield the plain loop first, then what is compared with it, the simplest first.

    Args:
        device: Where all train.
        precision: In which frem-search trains.
        choice: What is compared.

    Raises:
        UsageError: A layout is unknown, or cannot be used on this device.
    """
    layouts = _layouts(device, choice.layouts)
    processes = choice.processes or ([n_cores()] if device.type == "cpu" else [1, 2, 4])
    several = [n for n in processes if n > 1]
    plain = partial(Entrant, precision=plain_precision(device), is_plain=True)
    ours = partial(Entrant, precision=precision)
    yield plain(Arrangement())
    yield from (plain(Arrangement(workers=n)) for n in several)
    if precision != "fp32":  # so that it can be told what precision gains and what the rest
        yield Entrant(Arrangement(), "fp32")
    yield ours(Arrangement())
    yield from (ours(Arrangement(workers=n)) for n in several)
    for layout in layouts:
        if layout != ALONE and LAYOUTS[layout].is_for_one:
            yield ours(Arrangement(layout=layout))
        yield from (ours(Arrangement(1, cohort, layout)) for cohort in choice.cohorts if cohort > 1)


def _layouts(device: torch.device, asked: Sequence[str]) -> list[str]:
    usable = [name for name, layout in LAYOUTS.items() if device.type in layout.devices]
    for name in asked:
        if name not in usable:
            message = (
                f"--layouts: expected some of {', '.join(usable)} on {device.type}, but got {name!r}."
                f"{did_you_mean(name, usable)}"
            )
            raise UsageError(message)
    # Members in turn are one trial after another: side by side they gain nothing that a row could show.
    return list(dict.fromkeys(asked)) or [name for name in usable if name != ALONE]
