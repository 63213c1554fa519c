"""Options that several commands share, each with its environment variable."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frem_search.errors import UsageError

if TYPE_CHECKING:
    from frem_search.storage.database import Storage
    from frem_search.study.record import StudyRecord


def study_names() -> list[str]:
    """Return the names of study files, for a shell that completes a word.

    Names with other signs are left out: bash puts a name into the line as it is, and then runs what `$(...)` says.
    """
    from frem_search.study.file import list_study_files

    return [path.stem for path in list_study_files() if re.fullmatch(r"\w[\w.+@-]*", path.stem)]


StudyOption = Annotated[
    str,
    typer.Option(
        "--study",
        "-s",
        envvar="FREM_SEARCH_STUDY",
        autocompletion=study_names,
        help="Name of a study, or path of its .toml file.",
        show_default=False,
    ),
]
QuickOption = Annotated[
    bool,
    typer.Option(
        "--quick", envvar="FREM_SEARCH_QUICK", help="The study as its [quick] table has it: minutes on a CPU."
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        envvar="FREM_SEARCH_DATASET", help="Another dataset than the study's: a name or a folder.", show_default=False
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        envvar="FREM_SEARCH_STORAGE",
        help="URL of a PostgreSQL database; without it the embedded one is used. No password here: others see it.",
        show_default=False,
    ),
]
ArtifactsOption = Annotated[
    str | None,
    typer.Option(
        envvar="FREM_SEARCH_ARTIFACTS",
        help="Folder or fsspec URL for checkpoints, weights and predictions.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(envvar="FREM_SEARCH_DEVICE", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
]
DevicesOption = Annotated[
    str,
    typer.Option(
        envvar="FREM_SEARCH_DEVICE",
        help="auto, cpu, cuda or cuda:N, or several with commas between; auto takes every GPU that there is.",
    ),
]
CohortOption = Annotated[
    str | None,
    typer.Option(
        envvar="FREM_SEARCH_COHORT",
        help="Trials side by side in a worker: a number, or auto for the fastest, which is measured once. Without it: "
        "what the study was begun with; for a new one auto on a GPU and 1 on the CPU, where only then every run makes "
        "the same suggestions.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="FREM_SEARCH_WORKERS",
        help="Worker processes. Without it: one for each device; on the CPU 1, or with --cohort auto as many as are "
        "the fastest. On Ray one for each GPU, or on the CPU for each node.",
        show_default=False,
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        envvar="FREM_SEARCH_ENGINE",
        help="Where workers run: local, on this machine, or ray, on the cluster of RAY_ADDRESS.",
    ),
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        envvar="FREM_SEARCH_GPUS_PER_WORKER",
        help="On Ray: the part of a GPU that each worker gets; 1 without it.",
        show_default=False,
    ),
]
CheckpointOption = Annotated[
    float,
    typer.Option(
        min=0, envvar="FREM_SEARCH_CHECKPOINT_EVERY", help="Seconds after which a checkpoint follows the next epoch."
    ),
]
TrialsOption = Annotated[
    int | None,
    typer.Option(
        min=1, envvar="FREM_SEARCH_N_TRIALS", help="Another budget than the study file's.", show_default=False
    ),
]
EpochsOption = Annotated[
    int | None,
    typer.Option(min=1, envvar="FREM_SEARCH_N_EPOCHS", help="Other epochs than the study file's.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OutOption = Annotated[Path, typer.Option("--out", envvar="FREM_SEARCH_OUT", help="Folder to write into.")]


def artifacts_of(url: str | None) -> str:
    """Return where artifacts go, for what --artifacts gave.

    Raises:
        UsageError: The URL stands on the command line with a password in it.
    """
    from frem_search.storage.artifacts import artifacts_url, masked

    if url and masked(url) != url:
        refuse_as_argument(url, option="--artifacts", remedy="Set FREM_SEARCH_ARTIFACTS to the whole URL.")
    return artifacts_url(url)


def refuse_as_argument(secret: str, *, option: str, remedy: str) -> None:
    """Refuse a secret that stands on the command line, even if the environment holds the same.

    Raises:
        UsageError: It does.
    """
    if any(secret in argument for argument in sys.argv[1:]):
        message = f"{option}: a password on the command line can be read by every user of this machine. {remedy}"
        raise UsageError(message)


@contextmanager
def storage_of(
    url: str | None,
    *,
    upgrades: bool = False,
    is_read_only: bool = False,
    makes_tables: bool = True,
    n_connections: int = 2,
) -> "Iterator[Storage]":
    """Open the storage of a command.

    Args:
        url: What --storage gave.
        upgrades: As `Storage` takes it.
        is_read_only: As `Storage` takes it.
        makes_tables: As `Storage` takes it.
        n_connections: As `Storage` takes it.

    Raises:
        UsageError: The URL stands on the command line with a password in it.
    """
    from frem_search.storage.database import open_storage
    from frem_search.storage.url import normalise_url

    if url and normalise_url(url).password:
        remedy = (
            "Set FREM_SEARCH_STORAGE to the whole URL, or leave the password out and use FREM_SEARCH_PASSWORD_FILE or "
            "PGPASSFILE."
        )
        refuse_as_argument(url, option="--storage", remedy=remedy)
    with open_storage(
        url, upgrades=upgrades, is_read_only=is_read_only, makes_tables=makes_tables, n_connections=n_connections
    ) as storage:
        yield storage


def stored_name(study: str, *, quick: bool, dataset: str | None) -> str:
    """Return the name under which a study is stored; without a file of that name, the name as it was given."""
    from frem_search.study.file import load_study_file

    if is_stored_alone(study, quick=quick, dataset=dataset):
        return study
    return load_study_file(study, quick=quick, dataset=dataset).name


def is_stored_alone(study: str, *, quick: bool, dataset: str | None) -> bool:
    """Whether no file has the name that was given, so that it can only be that of a stored study.

    Raises:
        StudyFileError: There is no file, but the options need one.
    """
    from frem_search.errors import StudyFileError
    from frem_search.study.file import find_study_file

    try:
        find_study_file(study)
    except StudyFileError:
        if quick or dataset or study.endswith(".toml"):
            raise
        return True
    return False


@contextmanager
def record_of(
    study: str, *, quick: bool, dataset: str | None, storage: str | None, has_curves: bool = False
) -> "Iterator[tuple[Storage, StudyRecord]]":
    """Open the storage and read a study back from it."""
    from frem_search.study.record import read_record

    name = stored_name(study, quick=quick, dataset=dataset)
    with storage_of(storage) as opened:
        yield opened, read_record(opened, name, has_curves=has_curves)
