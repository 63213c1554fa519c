"""The tables of a database, Optuna's and ours: which version they are, how they are made and brought up to date."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from optuna.storages import RDBStorage

from frem_search.errors import StorageError

TABLES_LOCK = 7_236_001  # an advisory lock of our own, held while tables are made or changed

# Rows of ours beside Optuna's tables; deleted with the trial that they belong to.
FIRST = """
CREATE TABLE IF NOT EXISTS frem_lease (
    trial_id integer PRIMARY KEY REFERENCES trials (trial_id) ON DELETE CASCADE,
    study_id integer NOT NULL,
    token text,                         -- NULL: nobody holds the trial
    told_token text,                    -- the token under which the trial was finished
    worker text NOT NULL,               -- who holds it, or held it last: an id of the process
    host text NOT NULL,
    boot_id text NOT NULL,
    pid_namespace text NOT NULL,
    pid integer NOT NULL,
    pid_started double precision NOT NULL,
    device text NOT NULL,
    attempts integer NOT NULL,          -- since a checkpoint advanced
    total_attempts integer NOT NULL,
    epoch integer NOT NULL,
    checkpoint_epoch integer NOT NULL,
    reason text,                        -- why it was let go of last
    taken_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS frem_lease_study ON frem_lease (study_id);
CREATE TABLE IF NOT EXISTS frem_curve (
    trial_id integer PRIMARY KEY REFERENCES trials (trial_id) ON DELETE CASCADE,
    curve json NOT NULL
);
CREATE TABLE IF NOT EXISTS frem_schema (version integer NOT NULL);
"""
# What leads to version 1, 2, ...: a change of our tables is one more entry, and no entry is ever changed.
STEPS: tuple[str, ...] = (FIRST,)

STORED = "SELECT to_regclass('alembic_version'), to_regclass('frem_schema')"
MAY_CREATE = "SELECT current_user, current_schema(), coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)"
MAY_READ = "SELECT coalesce(has_table_privilege(to_regclass('frem_schema'), 'SELECT'), true)"
OURS = "^(studies|trials|(study|trial)_.+|alembic_version|version_info|frem_(lease|curve|schema))$"
OTHER_OWNERS = f"""
    SELECT string_agg(DISTINCT relowner::regrole::text, ' and ') FROM pg_class
    WHERE relkind = 'r' AND relname ~ '{OURS}' AND pg_table_is_visible(oid) AND NOT pg_has_role(relowner, 'USAGE')
"""


def prepare(engine: sa.Engine, open_optuna: Callable[..., RDBStorage], *, label: str, upgrades: bool = False) -> None:
    """Make the tables where they are missing; refuse those of another version, or bring older ones up to date.

    One process at a time does this. A role that may not make tables finds them there, or is told who makes them.

    Args:
        engine: Of the database.
        open_optuna: Makes an `RDBStorage` with the settings that it is given.
        label: The database, without the password.
        upgrades: Whether older tables are brought up to date.

    Raises:
        StorageError: The tables are missing or of another version, and nothing was changed.
    """
    with engine.connect() as connection:
        is_current = is_prepared(connection, label=label, refuses_older=not upgrades)
        if is_current and (not upgrades or _is_optuna_current(open_optuna)):
            return
        if stored_version(connection) == 0:
            _require_rights(connection, label)
        require_owner(connection, label=label)
        with _locked(connection):
            _prepare_optuna(connection, open_optuna, label=label, upgrades=upgrades)
            # Looked at again: another process may have made them while this one waited for the lock.
            is_prepared(connection, label=label, refuses_older=not upgrades)
            stored = stored_version(connection)
            for number, step in enumerate(STEPS[stored:], start=stored + 1):
                connection.execute(sa.text(step))
                connection.execute(sa.text("DELETE FROM frem_schema"))
                connection.execute(sa.text("INSERT INTO frem_schema VALUES (:number)"), {"number": number})
            connection.commit()


def require(engine: sa.Engine, *, label: str) -> None:
    """Make sure that the tables are there, without a right to write.

    Raises:
        StorageError: They are missing or of another version.
    """
    with engine.connect() as connection:
        if not is_prepared(connection, label=label):
            message = (
                f"storage {label}: expected the tables of a search, but got a database without them. Begin one with "
                "`frem-search run`, or give --storage as it was started with."
            )
            raise StorageError(message)


def require_owner(connection: sa.Connection, *, label: str) -> None:
    """Make sure that nobody else owns the tables: PostgreSQL answers others who grant with a warning, and does nothing.

    Raises:
        StorageError: This role neither owns them nor belongs to a role that does.
    """
    owners = other_owners(connection)
    if owners is None:
        return
    role, _, may_create = connection.execute(sa.text(MAY_CREATE)).one()
    remedy = f"Run `frem-search db` as {owners}, and all else as frem_worker or frem_reader."
    if may_create:  # such a role was to make them itself
        remedy += (
            f" Or have an administrator give each table to {role}: ALTER TABLE ... OWNER TO {role} "
            "(docs/containers.md has the statement for all)."
        )
    message = f"storage {label}: role {role} does not own the tables; {owners} does. {remedy}"
    raise StorageError(message)


def other_owners(connection: sa.Connection) -> str | None:
    """Return who owns the tables, if it is neither this role nor one that it belongs to."""
    owners: str | None = connection.execute(sa.text(OTHER_OWNERS)).scalar()
    return owners


def is_prepared(connection: sa.Connection, *, label: str, refuses_older: bool = True) -> bool:
    """Whether the tables are there in this program's version.

    Args:
        connection: To the database.
        label: The database, without the password.
        refuses_older: Whether older ones are an error, like newer ones.

    Raises:
        StorageError: They are of another version, or this role may not read which one.
    """
    if not connection.execute(sa.text(MAY_READ)).scalar():
        require_owner(connection, label=label)
    stored = stored_version(connection)
    if stored > len(STEPS) or (0 < stored < len(STEPS) and refuses_older):
        got, expected = f"tables of version {stored}", f"version {len(STEPS)}"
        raise StorageError(_other_version(label, got, expected, is_older=stored < len(STEPS)))
    return stored == len(STEPS)


def stored_version(connection: sa.Connection) -> int:
    """Return the version of our tables; 0 if they are missing, or were made before versions were stored."""
    if not all(connection.execute(sa.text(STORED)).one()):
        return 0
    return connection.execute(sa.text("SELECT max(version) FROM frem_schema")).scalar() or 0


def refuse_other_optuna(backend: RDBStorage, *, label: str) -> None:
    """Compare the version of Optuna's tables with the one that this Optuna works with.

    Raises:
        StorageError: They differ.
    """
    stored, head = backend.get_current_version(), backend.get_head_version()
    if stored != head:
        is_older = stored in backend.get_all_versions()
        raise StorageError(_other_version(label, f"Optuna's tables {stored}", head, is_older=is_older))


def _is_optuna_current(open_optuna: Callable[..., RDBStorage]) -> bool:
    backend = open_optuna(skip_compatibility_check=True, skip_table_creation=True)
    try:
        return backend.get_current_version() == backend.get_head_version()
    finally:
        backend.engine.dispose()


def _other_version(label: str, got: str, expected: str, *, is_older: bool) -> str:
    remedy = (
        "Make a backup and run `frem-search db upgrade` as its owner." if is_older else "Install a newer frem-search."
    )
    return f"storage {label}: expected {expected}, but got {got}. {remedy}"


def _require_rights(connection: sa.Connection, label: str) -> None:
    role, schema, may_create = connection.execute(sa.text(MAY_CREATE)).one()
    if not may_create:
        message = (
            f"storage {label}: its tables are missing or unfinished, and role {role} may not make them: permission "
            f"denied for schema {schema or 'public'}. Run `frem-search db init` as the database's owner first."
        )
        raise StorageError(message)


@contextmanager
def _locked(connection: sa.Connection) -> Iterator[None]:
    connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": TABLES_LOCK})
    connection.commit()
    try:
        yield
    finally:
        connection.rollback()  # after an error nothing else is taken, and the error is the one to tell
        connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": TABLES_LOCK})
        connection.commit()


def _prepare_optuna(
    connection: sa.Connection, open_optuna: Callable[..., RDBStorage], *, label: str, upgrades: bool
) -> None:
    is_there = connection.execute(sa.text("SELECT to_regclass('alembic_version')")).scalar()
    connection.rollback()
    if not is_there:
        open_optuna().engine.dispose()
    if not upgrades:
        return
    backend = open_optuna(skip_compatibility_check=True, skip_table_creation=True)
    try:
        if backend.get_current_version() in backend.get_all_versions():
            backend.upgrade()
        refuse_other_optuna(backend, label=label)
    finally:
        backend.engine.dispose()
