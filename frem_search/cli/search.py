"""Commands that run a search and look at it: run, worker, status, trials, figures."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frem_search.cli.engines import INTERRUPTED, Asked, check_engine, open_worker, run_here, run_on_ray
from frem_search.cli.options import (
    ArtifactsOption,
    CheckpointOption,
    CohortOption,
    DatasetOption,
    DeviceOption,
    DevicesOption,
    EngineOption,
    EpochsOption,
    GpusOption,
    JsonOption,
    OutOption,
    QuickOption,
    StorageOption,
    StudyOption,
    TrialsOption,
    WorkersOption,
    artifacts_of,
    record_of,
    storage_of,
)
from frem_search.errors import DatabaseAwayError, UsageError

if TYPE_CHECKING:
    from frem_search.storage.database import Storage
    from frem_search.study.record import StudyRecord

STOPPED_PATIENCE_S = 1.0  # with a database that is away, for the last look at a study after a stop


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (run, worker, status, trials, figures):
        app.command()(command)


def run(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    device: DevicesOption = "auto",
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    gpus_per_worker: GpusOption = None,
    cohort: CohortOption = None,
    n_trials: TrialsOption = None,
    n_epochs: EpochsOption = None,
    checkpoint_every: CheckpointOption = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Start a study, or continue it, until its budget of trials is spent.

    Stop it whenever you like: the same command goes on where it was, with the same trials.

    \b
    $ frem-search run --study mouse_frem --quick
    $ frem-search run --study mouse_frem --quick --cohort auto
    $ frem-search run --study mouse_frem --engine ray
    """
    from frem_search.study.file import load_study_file
    from frem_search.study.status import status_json, status_lines
    from frem_search.system.signals import stop_on_signals

    check_engine(engine, gpus_per_worker=gpus_per_worker)
    _check_early(cohort=cohort, artifacts=artifacts)
    which: dict[str, Any] = {
        "study": study,
        "quick": quick,
        "dataset": dataset,
        "n_trials": n_trials,
        "n_epochs": n_epochs,
    }
    study_file = load_study_file(**which)
    asked = Asked(
        study_file,
        which,
        storage_url=storage,
        artifacts=artifacts,
        device=device,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        cohort=cohort,
        checkpoint_every=checkpoint_every,
    )
    with stop_on_signals() as stop, _interrupted_if(stop), storage_of(storage) as opened:
        (run_on_ray if engine == "ray" else run_here)(asked, opened, is_stopping=stop)
        record = _tell_end(opened, study_file.name, has_stopped=stop())
    typer.echo(json.dumps(status_json(record), indent=2) if as_json else "\n".join(status_lines(record)))
    if stop():
        raise typer.Exit(INTERRUPTED)


def worker(
    study: StudyOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    device: DeviceOption = "auto",
    cohort: CohortOption = None,
    n_trials: TrialsOption = None,
    n_epochs: EpochsOption = None,
    checkpoint_every: CheckpointOption = 60.0,
) -> None:
    """Be one worker of a study, for whatever starts workers: a scheduler, another machine, a container.

    It begins the study or joins it, and leaves when the budget is spent or it is told to stop (SIGTERM, SIGINT).

    \b
    $ frem-search worker --study mouse_frem --storage postgresql://worker@db.example.org/frem
    """
    from frem_search.cli.progress import show_progress
    from frem_search.study.file import load_study_file
    from frem_search.study.record import read_record
    from frem_search.system.processes import has_lost_parent
    from frem_search.system.signals import stop_on_signals

    _check_early(cohort=cohort, artifacts=artifacts)
    study_file = load_study_file(study, quick=quick, dataset=dataset, n_trials=n_trials, n_epochs=n_epochs)
    with (
        stop_on_signals() as stop,
        _interrupted_if(stop),
        storage_of(storage) as opened,
        open_worker(
            study_file,
            opened,
            device=device,
            artifacts=artifacts,
            cohort=cohort,
            workers=1,
            checkpoint_every=checkpoint_every,
            is_stopping=lambda: stop() or has_lost_parent(),
        ) as (_, worker, _),
        closing(worker.work()) as events,
    ):
        show_progress(events, read_record(opened, study_file.name, has_curves=False))
        _tell_end(opened, study_file.name, has_stopped=stop())
    if stop():
        raise typer.Exit(INTERRUPTED)


def _check_early(*, cohort: str | None, artifacts: str | None) -> None:
    """Refuse what can be seen to be wrong before images and database are opened."""
    from frem_search.study.stored import parse_cohort

    artifacts_of(artifacts)
    if cohort is not None:
        parse_cohort(cohort)


@contextmanager
def _interrupted_if(stop: Callable[[], bool]) -> Iterator[None]:
    """Let a command that was asked to stop end as one, although the database is away: its trials wait."""
    try:
        yield
    except DatabaseAwayError as error:
        if not stop():
            raise
        typer.echo(f"stopped; {error}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _tell_end(storage: "Storage", study: str, *, has_stopped: bool) -> "StudyRecord":
    """Tell how the work on a study ended, and return the study as it is then."""
    from frem_search.storage.watchdog import answers_within
    from frem_search.study.record import read_record
    from frem_search.study.status import end_line

    patience_s = STOPPED_PATIENCE_S if has_stopped else 10.0
    with answers_within(patience_s):
        record = read_record(storage, study, has_curves=False, patience_s=patience_s)
    typer.echo(end_line(record), err=True)
    return record


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
    from frem_search.study.status import status_json, status_lines

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
    from frem_search.study.status import trials_json

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
