"""Commands that run a search and look at it: run, status, trials, figures."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frem_search.cli.options import (
    ArtifactsOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    OutOption,
    QuickOption,
    StorageOption,
    StudyOption,
    TrialsOption,
    record_of,
    storage_of,
)
from frem_search.errors import UsageError

if TYPE_CHECKING:
    from frem_search.record import StudyRecord

CheckpointOption = Annotated[
    float,
    typer.Option(
        min=0, envvar="FREM_SEARCH_CHECKPOINT_EVERY", help="Seconds after which a checkpoint follows the next epoch."
    ),
]
INTERRUPTED = 130


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (run, status, trials, figures):
        app.command()(command)


def run(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    device: DeviceOption = "auto",
    n_trials: TrialsOption = None,
    n_epochs: EpochsOption = None,
    checkpoint_every: CheckpointOption = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Start a study, or continue it, until its budget of trials is spent.

    Stop it whenever you like: the same command goes on where it was, with the same trials.

    \b
    $ frem-search run --study mouse_frem --quick
    """
    from frem_search.artifacts import artifacts_url
    from frem_search.cli.progress import show_progress
    from frem_search.record import read_record
    from frem_search.status import status_json, status_lines
    from frem_search.stop import stop_on_signals
    from frem_search.study_file import load_study_file
    from frem_search.worker import open_worker

    if math.isnan(checkpoint_every):
        message = "--checkpoint-every: expected seconds of at least 0, but got nan."
        raise UsageError(message)
    study_file = load_study_file(study, quick=quick, dataset=dataset, n_trials=n_trials, n_epochs=n_epochs)
    with stop_on_signals() as stop, storage_of(storage) as opened:
        with open_worker(
            study_file,
            opened,
            device=device,
            artifacts=artifacts_url(artifacts),
            is_stopping=stop,
            checkpoint_every_s=checkpoint_every,
        ) as (_, worker):
            before = read_record(opened, study_file.name, has_curves=False)
            if n_trials is not None and n_trials < before.n_trials:
                note = f"{before.name}: the budget stays {before.n_trials} trials; it can be raised, not lowered."
                typer.echo(note, err=True)
            with closing(worker.work()) as events:  # whatever happens, the trial is let go before the database is
                show_progress(events, before)
        record = read_record(opened, study_file.name, has_curves=False)
    typer.echo(json.dumps(status_json(record), indent=2) if as_json else "\n".join(status_lines(record)))
    if stop():
        raise typer.Exit(INTERRUPTED)


def status(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a study is: budget, states, who trains what, the best trial, time left.

    \b
    $ frem-search status --study mouse_frem --quick
    """
    from frem_search.status import status_json, status_lines

    with record_of(study, quick=quick, dataset=dataset, storage=storage) as (_, record):
        typer.echo(json.dumps(status_json(record), indent=2) if as_json else "\n".join(status_lines(record)))


def trials(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    format: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
) -> None:
    """List every trial: number, state, score, parameters.

    \b
    $ frem-search trials --study mouse_frem --quick --format csv > trials.csv
    """
    from frem_search.cli.table import trials_csv, trials_table
    from frem_search.status import trials_json

    printers: dict[str, Callable[[StudyRecord], str]] = {
        "table": trials_table,
        "csv": trials_csv,
        "json": lambda record: json.dumps(trials_json(record), indent=2) + "\n",
    }
    if format not in printers:
        message = f"--format: expected one of {', '.join(printers)}, but got {format!r}."
        raise UsageError(message)
    with record_of(study, quick=quick, dataset=dataset, storage=storage) as (_, record):
        sys.stdout.write(printers[format](record))


def figures(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    out: OutOption = Path("figures"),
    format: Annotated[
        str, typer.Option("--format", help="Any of html, png, svg, pdf, with commas between.")
    ] = "html,png",
    only: Annotated[str, typer.Option(help="Names of figures with commas between; all without it.")] = "",
) -> None:
    """Draw the papers' figures of a study, each with its numbers as CSV beside it.

    PNG, SVG and PDF need a Chrome or Chromium; without one the HTML is written all the same.

    \b
    $ frem-search figures --study mouse_frem --quick --out figures --format html,svg
    """
    from frem_search.figures.write import write_figures

    with record_of(study, quick=quick, dataset=dataset, storage=storage, has_curves=True) as (_, record):
        pass
    written = write_figures(record, out, formats=_names(format), only=_names(only))
    for note in written.notes:
        typer.echo(note, err=True)
    for path in written.paths:
        typer.echo(path)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
