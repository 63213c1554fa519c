"""The command that examines machine, database and images."""

import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import typer

from frem_search.cli.options import (
    ArtifactsOption,
    DatasetOption,
    JsonOption,
    QuickOption,
    StorageOption,
    artifacts_of,
    storage_of,
    stored_name,
    study_names,
)

if TYPE_CHECKING:
    from frem_search.storage.database import Storage
    from frem_search.study.file import StudyFile

OptionalStudy = Annotated[
    str | None,
    typer.Option(
        "--study",
        "-s",
        envvar="FREM_SEARCH_STUDY",
        autocompletion=study_names,
        help="Look also at this study: its file, its images, what it was begun with.",
        show_default=False,
    ),
]
UNFIT = 1


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(doctor)


def doctor(
    study: OptionalStudy = None,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Examine machine, database and images, and say what to do where something is wrong.

    Run it on a new machine before the first search, and whenever a search will not start. It makes no tables. Exit
    status 1 if anything is FAIL; warn does not keep a search from running.

    \b
    $ frem-search doctor --study mouse_frem
    """
    from frem_search.doctor import examine, secrets_of

    def open_storage() -> "AbstractContextManager[Storage]":
        return storage_of(storage, makes_tables=False)

    def load_study() -> "StudyFile | str":
        assert study is not None
        return _study_of(study, quick=quick, dataset=dataset)

    findings = []
    for finding in examine(
        open_storage,
        artifacts=artifacts_of(artifacts),
        load_study=load_study if study is not None else None,
        secrets=secrets_of(storage),
    ):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=2))
    if any(finding.state == "FAIL" for finding in findings):
        raise typer.Exit(UNFIT)


def _study_of(study: str, *, quick: bool, dataset: str | None) -> "StudyFile | str":
    """Return the study's file, or the name of a stored study whose file is not here."""
    from frem_search.errors import StudyFileError
    from frem_search.study.file import find_study_file, load_study_file

    try:
        find_study_file(study)
    except StudyFileError:
        return stored_name(study, quick=quick, dataset=dataset)
    return load_study_file(study, quick=quick, dataset=dataset)
