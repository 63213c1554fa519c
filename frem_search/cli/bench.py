"""The command bench: how many trials an hour a study trains on this machine."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from frem_search.cli.options import DatasetOption, DeviceOption, JsonOption, QuickOption, StudyOption
from frem_search.errors import UsageError

PrecisionOption = Annotated[
    str,
    typer.Option(
        envvar="FREM_SEARCH_PRECISION", help="fp32, bf16, or auto: what a search of the study would train in here."
    ),
]
CohortsOption = Annotated[
    str, typer.Option(envvar="FREM_SEARCH_COHORTS", help="How many trials side by side, with commas between.")
]
LayoutsOption = Annotated[
    str,
    typer.Option(
        envvar="FREM_SEARCH_LAYOUTS",
        help="How trials share the device, with commas between; every way that this device allows without it.",
        show_default=False,
    ),
]
ProcessesOption = Annotated[
    str,
    typer.Option(
        envvar="FREM_SEARCH_PROCESSES",
        help="How many processes, with commas between; without it, on the CPU one for each core, on a GPU 1,2,4.",
        show_default=False,
    ),
]
RepeatsOption = Annotated[
    int, typer.Option(min=1, envvar="FREM_SEARCH_REPEATS", help="Rounds in which all are measured.")
]
SecondsOption = Annotated[
    float,
    typer.Option(min=0, envvar="FREM_SEARCH_SECONDS", help="Seconds at least for each measurement; whole epochs."),
]
FigureOutOption = Annotated[
    Path | None,
    typer.Option("--out", envvar="FREM_SEARCH_OUT", help="Folder to write the figure into.", show_default=False),
]
PRECISIONS = ("auto", "fp32", "bf16")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(bench)


def bench(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cohorts: CohortsOption = "2,4,8",
    layouts: LayoutsOption = "",
    processes: ProcessesOption = "",
    repeats: RepeatsOption = 3,
    seconds: SecondsOption = 3.0,
    out: FigureOutOption = None,
    format: Annotated[
        str, typer.Option("--format", help="Any of html, png, svg, pdf, with commas between.")
    ] = "html,png",
    as_json: JsonOption = False,
) -> None:
    """Measure how many trials of a study this machine trains in an hour, against a plain PyTorch loop.

    All rows are measured in turn in one run, so that their ratios can be read also where speeds drift. Nothing is
    stored, and no database is needed.

    \b
    $ frem-search bench --study mouse_frem --quick --out figures
    """
    from frem_search.bench import Choice, bench_json, bench_lines, entrants, run_bench
    from frem_search.bench.figure import write_bench
    from frem_search.bench.speed import Trainee
    from frem_search.figures.write import FORMATS, check_names
    from frem_search.study.file import load_study_file
    from frem_search.system.device import best_precision, find_device
    from frem_search.training.recipe import check, load_images

    if not math.isfinite(seconds):
        message = f"--seconds: expected a number of at least 0, but got {seconds}."
        raise UsageError(message)
    formats = _names(format)
    check_names("format", formats, known=FORMATS)
    check_names("precision", [precision], known=PRECISIONS)
    choice = Choice(_counts("--cohorts", cohorts), _names(layouts), _counts("--processes", processes))
    study_file = load_study_file(study, quick=quick, dataset=dataset)
    check(study_file)
    chosen = find_device(device)
    settled = next(name for name in (precision, study_file.precision, best_precision(chosen)) if name != "auto")
    rows = list(entrants(chosen, precision=settled, choice=choice))
    images = load_images(study_file)
    trainee = Trainee(study_file, images, chosen, settled)
    result = run_bench(
        trainee, rows, n_rounds=repeats, seconds=seconds, tell=lambda line: typer.echo(f"bench: {line}", err=True)
    )
    typer.echo(json.dumps(bench_json(result), indent=2) if as_json else "\n".join(bench_lines(result)))
    if out is None:
        return
    written = write_bench(result, out, formats=formats)
    for line in (*written.notes, *map(str, written.paths)):
        typer.echo(line, err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _counts(option: str, text: str) -> tuple[int, ...]:
    counts = _names(text)
    for count in counts:
        if not (count.isascii() and count.isdecimal() and int(count) > 0):
            message = f"{option}: expected numbers of at least 1 with commas between, such as 2,4,8, but got {text!r}."
            raise UsageError(message)
    return tuple(dict.fromkeys(map(int, counts)))
