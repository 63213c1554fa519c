"""The command that copies a study for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from frem_search.cli.options import DatasetOption, QuickOption, StorageOption, StudyOption, storage_of, stored_name


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(export)


def export(
    study: StudyOption,
    sqlite: Annotated[Path, typer.Option(help="New file to write, for tools that read only SQLite.")],
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
) -> None:
    """Copy a stored study into an SQLite file that Optuna and its dashboard open.

    A copy to look at: frem-search itself reads PostgreSQL only. Trials as CSV or JSON: `frem-search trials --format`.

    \b
    $ frem-search export --study mouse_frem --sqlite mouse_frem.db
    """
    from frem_search.study.export import export_sqlite

    name = stored_name(study, quick=quick, dataset=dataset)
    with storage_of(storage) as opened:
        n_trials = export_sqlite(opened, name, sqlite)
    typer.echo(f"{sqlite}: {name}, {n_trials} trials")
