"""A bench as JSON and as a table to read."""

import math
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from frem_search import __version__
from frem_search.bench.result import Bench, Row, Spread

LEFT_OUT = "claims, start-up and test scoring are left out"


def bench_json(bench: Bench) -> dict[str, Any]:
    """Return all that was measured and what follows from it; None where there is no number."""
    values = {
        name: value for name, value in asdict(bench).items() if name not in ("rows", "image_flops", "matmul_rates")
    }
    return {
        **values,
        "image_size": list(bench.image_size),
        "versions": {"frem_search": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "flop_per_image": round(bench.image_flops),
        "matmul_flop_per_s": {name: round(rate) for name, rate in bench.matmul_rates.items()},
        "note": f"trials_per_hour = 3600 * images_per_s / images_per_trial; {LEFT_OUT}",
        "rows": [_row_json(bench, row) for row in bench.rows],
    }


def _row_json(bench: Bench, row: Row) -> dict[str, Any]:
    rate, share = bench.flops_per_s(row), bench.matmul_share(row)
    return {
        "name": str(row.entrant),
        "is_plain": row.entrant.is_plain,
        **asdict(row.entrant.arrangement),
        "layout": None if row.entrant.is_plain else row.entrant.arrangement.layout,
        "precision": row.entrant.precision,
        "rounds": [round(speed, 2) for speed in row.images_per_s],
        "images_per_s": _spread_json(bench.images_per_s(row), digits=2),
        "trials_per_hour": _spread_json(bench.trials_per_hour(row), digits=3),
        "ratio_to_plain": _spread_json(bench.ratio_to_plain(row), digits=3),
        "flop_per_s": None if rate is None else round(rate),
        "matmul_share": None if share is None else round(share, 4),
        "peak_memory_mb_per_member": round(row.peak_memory / 2**20) if row.peak_memory else None,
        "error": row.error or None,
    }


def _spread_json(numbers: Spread | None, *, digits: int) -> dict[str, float] | None:
    if numbers is None:
        return None
    return {
        "median": round(numbers.median, digits), "min": round(numbers.low, digits), "max": round(numbers.high, digits),
    }  # fmt: skip


def bench_lines(bench: Bench) -> list[str]:
    """Return a head, a line per row, and how to read them."""
    rows, columns = bench.image_size
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in bench.matmul_rates.items())
    failed = [row for row in bench.rows if row.error]
    return [
        f"{bench.study}: {bench.dataset}, {bench.n_train} training and {bench.n_val} validation images of {rows} x "
        f"{columns}, batch {bench.batch_size}, {bench.n_epochs} epochs a trial",
        f"{bench.device}, {bench.cores} cores; torch {torch.__version__}; n = {bench.n_rounds} rounds of at least "
        f"{bench.seconds:g} s a row, in turn; median (range)",
        "",
        *_table(bench),
        "",
        f"trials/h: 3600 * images/s / {bench.images_per_trial}, a trial's images in all epochs and folds; {LEFT_OUT}.",
        f"GFLOP/s: {bench.image_flops / 1e9:.3g} GFLOP a training image, validation included; of product: the share "
        f"of a matrix product's, {rates} GFLOP/s.",
        *(f"{row.entrant}, {row.entrant.precision}: could not be run: {row.error}" for row in failed),
    ]


def _table(bench: Bench) -> list[str]:
    head = ["", "precision", "images/s", "trials/h", "ratio to plain", "GFLOP/s", "of product", "MB a member"]
    rows = [head, *(_cells(bench, row) for row in bench.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _cells(bench: Bench, row: Row) -> list[str]:
    rate, share = bench.flops_per_s(row), bench.matmul_share(row)
    return [
        str(row.entrant),
        row.entrant.precision,
        "failed" if row.error else _with_range(bench.images_per_s(row)),
        _with_range(bench.trials_per_hour(row)),
        _with_range(bench.ratio_to_plain(row), digits=2),
        "" if rate is None else f"{rate / 1e9:.1f}",
        "" if share is None else f"{share:.1%}",
        f"{row.peak_memory / 2**20:.0f}" if row.peak_memory else "",
    ]


def _with_range(numbers: Spread | None, *, digits: int | None = None) -> str:
    """Return a cell; without a number of digits, as many as the median needs to have three.

    >>> _with_range(Spread(144.2, 121.0, 166.04)), _with_range(Spread(1.5, 1.25, 2.0), digits=2)
    ('144 (121 to 166)', '1.50 (1.25 to 2.00)')
    >>> _with_range(Spread(0.0512, 0.05, 0.06))
    '0.0512 (0.0500 to 0.0600)'
    """
    if numbers is None:
        return ""
    if digits is None:
        digits = decimals(numbers.median)
    median, low, high = (f"{value:.{digits}f}" for value in numbers)
    return f"{median} ({low} to {high})"


def decimals(value: float) -> int:
    """Return how many decimals show at least three digits of a positive number.

    >>> decimals(23456.0), decimals(2.5), decimals(0.025)
    (0, 2, 4)
    """
    return max(0, 2 - math.floor(math.log10(value)))


def _aligned(cells: list[str], widths: list[int]) -> Iterator[str]:
    """Give names their left edge and numbers their right one."""
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if i < 2 else cell.rjust(width)
