"""Commands for the owner of a database: db init, upgrade, backup, restore."""

from pathlib import Path
from typing import Annotated

import typer

from frem_search.cli.options import StorageOption, storage_of

WORKER_FILE, READER_FILE = "--worker-password-file", "--reader-password-file"


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    for command in (init, upgrade, backup, restore):
        group.command()(command)
    app.add_typer(group, name="db", help="Set up, upgrade, back up and restore a database.")


def init(
    storage: StorageOption = None,
    worker_password_file: Annotated[
        Path | None,
        typer.Option(
            WORKER_FILE,
            envvar="FREM_SEARCH_WORKER_PASSWORD_FILE",
            help="File with the password that frem_worker gets.",
            show_default=False,
        ),
    ] = None,
    reader_password_file: Annotated[
        Path | None,
        typer.Option(
            READER_FILE,
            envvar="FREM_SEARCH_READER_PASSWORD_FILE",
            help="File with the password that frem_reader gets.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the tables, and on a server the roles frem_worker and frem_reader.

    Workers that connect as frem_worker write trials and can neither drop nor alter a table; frem_reader reads; other
    roles of the server may not enter the database. Call it as its owner, as often as you like: it completes what is
    missing, and changes a password if you give one.

    \b
    $ frem-search db init --storage postgresql://owner@db.example.org/frem --worker-password-file worker.txt
    """
    from frem_search.errors import UsageError
    from frem_search.storage.admin.roles import READER, WORKER, make_roles
    from frem_search.system.files import read_secret

    files = {WORKER: (WORKER_FILE, worker_password_file), READER: (READER_FILE, reader_password_file)}
    passwords = {role: read_secret(file, named_by=option) for role, (option, file) in files.items() if file}
    if storage is None and passwords:
        message = (
            "--storage: expected the URL of a server to make roles in, but got none. The embedded database has no "
            "roles: only processes of this machine reach it. Leave the password files out, or give --storage."
        )
        raise UsageError(message)
    with storage_of(storage) as opened:
        typer.echo(f"{opened.label}: the tables are there")
        for role in make_roles(opened, passwords) if storage is not None else ():
            password = "password as before" if not role.is_new else "no password: it cannot log in yet"
            password = "password set" if role.has_new_password else password
            typer.echo(f"role {role.name}: {'made' if role.is_new else 'was there'}, {password}")


def upgrade(storage: StorageOption = None) -> None:
    """Bring the tables of an older version up to date, Optuna's and ours.

    Stop the workers and make a backup first. Tables that are up to date stay as they are.

    \b
    $ frem-search db upgrade
    """
    from frem_search.storage.admin.roles import grant_again

    with storage_of(storage, upgrades=True) as opened:
        grant_again(opened)
        typer.echo(f"{opened.label}: the tables are up to date")


def backup(
    out: Annotated[Path, typer.Option("--out", help="New file to write.", show_default=False)],
    storage: StorageOption = None,
) -> None:
    """Write the whole database into a file: studies, trials, curves and leases, as they are at this moment.

    A search may go on meanwhile. Checkpoints and weights are files of their own and are not in it.

    \b
    $ frem-search db backup --out frem-2026-11-20.dump
    """
    from frem_search.storage.admin.backup import back_up

    with storage_of(storage, is_read_only=True) as opened:
        counted = back_up(opened, out)
    typer.echo(f"{out}: {_told(*counted)}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That `frem-search db backup` wrote.")],
    storage: StorageOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the studies that are there.")] = False,
) -> None:
    """Fill a database from a backup, in one transaction: all of it, or nothing is changed.

    A database that has studies is refused; with --force they are replaced, unless workers train them. Trials that were
    in training then are waiting now, and go on from their checkpoints if the artifacts are there.

    \b
    $ frem-search db restore frem-2026-11-20.dump
    """
    from frem_search.storage.admin.backup import restore as restore_database

    with storage_of(storage) as opened:
        counted = restore_database(opened, file, force=force)
        typer.echo(f"{opened.label}: {_told(*counted)}")


def _told(n_studies: int, n_trials: int) -> str:
    studies, trials = "study" if n_studies == 1 else "studies", "trial" if n_trials == 1 else "trials"
    return f"{n_studies} {studies}, {n_trials} {trials}"
