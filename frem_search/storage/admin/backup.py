"""A database as one file, and back: all studies, trials, curves and leases as they were at one moment."""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from frem_search.errors import StorageError, UsageError
from frem_search.storage.admin.programs import find_program, run_program
from frem_search.storage.admin.roles import grant_again
from frem_search.storage.schema import STEPS, require_owner
from frem_search.system.processes import is_gone

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

COUNTS = sa.text("SELECT (SELECT count(*) FROM studies) AS studies, (SELECT count(*) FROM trials) AS trials")
SERVER = sa.text("SELECT current_setting('server_version_num')::int / 10000")
LIVE = sa.text("""
    SELECT DISTINCT l.host, l.pid, l.boot_id, l.pid_namespace, l.pid_started
    FROM frem_lease l JOIN trials t USING (trial_id)
    WHERE t.state = 'RUNNING' AND l.token IS NOT NULL AND l.expires_at >= now()
    ORDER BY l.host, l.pid
""")
# As a worker lets go that is asked to stop: the attempt does not count.
LET_GO = sa.text("""
    UPDATE frem_lease SET token = NULL, reason = 'restored from a backup', attempts = greatest(attempts - 1, 0)
    WHERE token IS NOT NULL
""")
CHECK_SERVER = "Check the database's role and rights, and the space on disk."


@dataclass(frozen=True)
class Archive:
    """What a backup says about itself.

    Args:
        server: Major version of the server that it was made from.
        program: Major version of the pg_dump that made it.
        tables: Version of our tables in it.
        optuna: Version of Optuna's tables in it.
    """

    server: int
    program: int
    tables: int
    optuna: str


def back_up(storage: "Storage", file: Path) -> tuple[int, int]:
    """Write the database into a new file, there whole or not at all; return how many studies and trials are in it.

    Notes and study files are in it, so that this user alone may read it.

    Everything is read in one snapshot: a search may go on meanwhile, and no trial of the file is a half.

    Args:
        storage: The database; a role that may only read will do.
        file: Which must not be there yet.

    Raises:
        UsageError: The file is there, or its folder is not.
        StorageError: It cannot be read or written.
    """
    if file.exists() or file.is_symlink():
        raise UsageError(_taken(file))
    if not file.parent.is_dir():
        message = f"--out {file}: expected a file in a folder that exists, but {file.parent} is none. Make it first."
        raise UsageError(message)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as beside:
            copy = Path(beside) / "copy"
            counted = _dump(storage, copy)
            read_archive(copy)
            copy.chmod(0o600)
            _move(copy, file)
    except FileExistsError:
        raise UsageError(_taken(file)) from None
    except OSError as error:
        message = f"--out {file}: cannot be written: {error.strerror}. Give a file in a folder of yours."
        raise StorageError(message) from None
    except StorageError as error:
        message = f"storage {storage.label}: no backup was written: {error}"
        raise StorageError(message) from None
    return counted


def _taken(file: Path) -> str:
    return f"--out {file}: expected a new file, but it is there already. Remove it, or give another name."


def _move(copy: Path, file: Path) -> None:
    """Give a file its name, unless somebody was faster: a rename would replace theirs."""
    try:
        os.link(copy, file)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network file systems have no links
        file.touch(exist_ok=False)
        copy.replace(file)


def _dump(storage: "Storage", file: Path) -> tuple[int, int]:
    """Run pg_dump in a snapshot of ours, so that what is counted is what is written."""
    program = find_program("pg_dump", at_least=_server(storage))
    dsn, environment = storage.for_programs()
    with storage.engine.connect() as connection:
        connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        snapshot = connection.execute(sa.text("SELECT pg_export_snapshot()")).scalar_one()
        options = ["--format=custom", "--no-owner", "--no-privileges", "--no-password", f"--snapshot={snapshot}"]
        command: list[str | Path] = [program, *options, f"--file={file}", f"--dbname={dsn}"]
        run_program(command, environment=environment, remedy=CHECK_SERVER)
        counted = connection.execute(COUNTS).one()
    return counted.studies, counted.trials


def restore(storage: "Storage", file: Path, *, force: bool = False) -> tuple[int, int]:
    """Replace the database by a backup, in one transaction; return how many studies and trials it has now.

    Trials that were in training when the backup was made are held by nobody in it.

    Args:
        storage: The database, opened as its owner.
        file: That `back_up` wrote.
        force: Replace studies that are there.

    Raises:
        UsageError: The file is no backup of frem-search, or the database has studies.
        StorageError: The backup is of a newer version, workers train trials of the database, its tables are somebody
            else's, or the server refuses; then nothing was changed.
    """
    archive = read_archive(file)
    _refuse_newer(archive, file, storage)
    _refuse_studies(storage, force=force)
    dsn, environment = storage.for_programs()
    options = ["--clean", "--if-exists", "--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
    program = find_program("pg_restore", at_least=archive.program)
    command: list[str | Path] = [program, *options, "--no-password", f"--dbname={dsn}", file]
    try:
        run_program(command, environment=environment, remedy=CHECK_SERVER)
    except StorageError as error:
        message = f"storage {storage.label}: {file} was not restored, and nothing was changed: {error}"
        raise StorageError(message) from None
    storage.engine.dispose()  # what a connection knew of the tables that were replaced
    storage.prepare(upgrades=True)
    with storage.engine.begin() as connection:
        connection.execute(LET_GO)
    grant_again(storage)
    return count_studies(storage)


def read_archive(file: Path) -> Archive:
    """Return what a backup says about itself.

    Raises:
        UsageError: It is no backup of frem-search.
    """
    program = find_program("pg_restore")
    wanted = ("--data-only", "--table=frem_schema", "--table=alembic_version", "--file=-")
    remedy = "Give the path of one that you may read."
    try:
        listed = run_program([program, "--list", file], environment={}, remedy=remedy)
        versions = run_program([program, *wanted, file], environment={}, remedy=remedy)
    except StorageError as error:
        message = f"{file}: expected a backup by `frem-search db backup`, but got something else: {error}"
        raise UsageError(message) from None
    server = re.search(r"^; +Dumped from database version: (\d+)", listed, re.MULTILINE)
    dump = re.search(r"^; +Dumped by pg_dump version: (\d+)", listed, re.MULTILINE)
    tables = re.search(r"^COPY \S*frem_schema .*\n(\d+)$", versions, re.MULTILINE)
    optuna = re.search(r"^COPY \S*alembic_version .*\n(\S+)$", versions, re.MULTILINE)
    if not (server and dump and tables and optuna):
        message = f"{file}: expected a backup by `frem-search db backup`, but got one of another program's tables."
        raise UsageError(message)
    return Archive(int(server[1]), int(dump[1]), int(tables[1]), optuna[1])


def count_studies(storage: "Storage") -> tuple[int, int]:
    """Return how many studies and trials a database has."""
    with storage.engine.connect() as connection:
        row = connection.execute(COUNTS).one()
    return row.studies, row.trials


def _server(storage: "Storage") -> int:
    with storage.engine.connect() as connection:
        return int(connection.execute(SERVER).scalar_one())


def _refuse_studies(storage: "Storage", *, force: bool) -> None:
    n_studies, _ = count_studies(storage)
    if n_studies and not force:
        message = (
            f"storage {storage.label}: expected a database without studies, but got {n_studies}. Restore into a new "
            "database, or stop all workers and add --force, which replaces every study by those of the backup."
        )
        raise UsageError(message)
    with storage.engine.connect() as connection:
        require_owner(connection, label=storage.label)
        live = [f"{row.host}:{row.pid}" for row in connection.execute(LIVE) if not is_gone(row)]
    if live:
        message = (
            f"storage {storage.label}: expected a database that nobody works on, but got {len(live)} at work. Stop "
            f"these workers first, by Ctrl-C or SIGTERM: {', '.join(live)}."
        )
        raise StorageError(message)


def _refuse_newer(archive: Archive, file: Path, storage: "Storage") -> None:
    server = _server(storage)
    if archive.server > server:
        message = (
            f"{file}: made from PostgreSQL {archive.server}, but the server is PostgreSQL {server}, and PostgreSQL "
            f"promises that only to newer ones. Restore into PostgreSQL {archive.server} or newer."
        )
        raise StorageError(message)
    remedy = "Install the frem-search that made the backup, or a newer one."
    if archive.tables > len(STEPS):
        message = f"{file}: expected tables of version {len(STEPS)} or older, but got {archive.tables}. {remedy}"
        raise StorageError(message)
    if archive.optuna not in (known := storage.optuna_versions):
        message = f"{file}: expected Optuna's tables {known[0]} or older, but got {archive.optuna}. {remedy}"
        raise StorageError(message)
