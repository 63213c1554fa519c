"""The roles of a server's database: workers write rows and nothing else, readers only read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import encrypt_password

from frem_search.errors import StorageError
from frem_search.storage.schema import TABLES_LOCK, other_owners, require_owner

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

WORKER, READER = "frem_worker", "frem_reader"
VERSIONS = ("alembic_version", "version_info", "frem_schema")  # which tables there are is the owner's to say

# Two databases of one server may be set up at the same time, and roles belong to both.
CREATE = """
DO $$ BEGIN CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$
"""
# Everybody of the server may enter a new database and make temporary tables there, and before PostgreSQL 15, and in
# databases that were upgraded to it, others too.
FOR_NOBODY_ELSE = ("REVOKE ALL ON DATABASE {database} FROM PUBLIC", "REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC")
FOR_BOTH = (
    "GRANT CONNECT ON DATABASE {database} TO {role}",
    "GRANT USAGE ON SCHEMA {schema} TO {role}",
)
# The rights on tables of later versions too: who makes those is whoever runs this.
FOR_WORKERS = (
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}",
    "GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role}",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE ON SEQUENCES TO {role}",
    "REVOKE INSERT, UPDATE, DELETE ON {versions} FROM {role}",
)
FOR_READERS = (
    "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}",
    "GRANT SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role}",  # for backups
    "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT ON TABLES TO {role}",
    "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT ON SEQUENCES TO {role}",
)
RIGHTS = {WORKER: (*FOR_BOTH, *FOR_WORKERS), READER: (*FOR_BOTH, *FOR_READERS)}
# What PostgreSQL grants with a warning, and not at all, where the database or the schema is somebody else's.
LACKING = """
    SELECT string_agg(name, ' and ') FROM pg_class, LATERAL (VALUES
        ('CONNECT on the database', has_database_privilege(%(role)s, current_database(), 'CONNECT')),
        ('USAGE of schema ' || relnamespace::regnamespace, has_schema_privilege(%(role)s, relnamespace, 'USAGE')),
        ('SELECT on its tables', has_table_privilege(%(role)s, oid, 'SELECT'))
    ) AS needed (name, is_there) WHERE oid = 'studies'::regclass AND NOT is_there
"""


@dataclass(frozen=True)
class MadeRole:
    """What became of a role.

    Args:
        name: Of the role.
        is_new: Whether it was made now.
        has_new_password: Whether its password was set.
    """

    name: str
    is_new: bool
    has_new_password: bool


def make_roles(storage: "Storage", passwords: Mapping[str, str]) -> list[MadeRole]:
    """Make the roles or keep them, set the passwords that are given, and grant what each needs on the tables.

    No other role may enter the database then, unless it was let in by name. Done twice, it changes nothing. A password
    leaves this process as a SCRAM verifier only, so that neither the network nor the server's log can show it.

    Args:
        storage: The database, opened as its owner.
        passwords: By role.

    Raises:
        StorageError: The server refuses, or somebody else owns the tables; then no role and no right was changed.
    """
    with storage.engine.connect() as connection:
        require_owner(connection, label=storage.label)
    with _cursor(storage) as cursor:
        for statement in FOR_NOBODY_ELSE:
            cursor.execute(_filled(cursor, statement))
        made = [_make(cursor, role, passwords.get(role)) for role in RIGHTS]
        if any(role.name == READER and (role.is_new or role.has_new_password) for role in made):
            cursor.execute(_filled(cursor, "ALTER ROLE {role} SET default_transaction_read_only = on", role=READER))
        for role in RIGHTS:
            _grant(cursor, role)
            _require_rights(cursor, role, storage.label)
        return made


def grant_again(storage: "Storage") -> None:
    """Grant the rights on tables that were made anew, to those of the roles that the server has.

    Default privileges too: they are of the role that makes tables, which may be another one this time. Whoever does
    not own the tables has made none, and changes nothing.

    Raises:
        StorageError: The server refuses.
    """
    with storage.engine.connect() as connection:
        if other_owners(connection):
            return
    with _cursor(storage) as cursor:
        for role in RIGHTS:
            if _exists(cursor, role):
                _grant(cursor, role)


@contextmanager
def _cursor(storage: "Storage") -> Iterator[Any]:
    """Yield a cursor of one transaction, in which psycopg2 itself quotes names and values."""
    with storage.engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        try:
            with raw.cursor() as cursor:
                # Two of these at once would change the same rows of the catalogue, which PostgreSQL refuses.
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (TABLES_LOCK,))
                yield cursor
            raw.commit()
        except psycopg2.Error as error:
            raw.rollback()
            reason = str(error).strip().splitlines()[0]
            message = (
                f"storage {storage.label}: its tables are there, but the roles {WORKER} and {READER} cannot be set up: "
                f"{reason}. Run this as the database's owner with CREATEROLE, or have an administrator make both roles "
                "with LOGIN and their passwords, and run it again without password files."
            )
            raise StorageError(message) from None


def _filled(cursor: Any, statement: str, *, role: str = "") -> sql.Composed:
    cursor.execute("SELECT current_database(), relnamespace::regnamespace::text FROM pg_class WHERE oid = %s::regclass",
                   ("studies",))  # fmt: skip
    database, schema = cursor.fetchone()
    versions = sql.SQL(", ").join(map(sql.Identifier, VERSIONS))
    return sql.SQL(statement).format(
        role=sql.Identifier(role), database=sql.Identifier(database), schema=sql.SQL(schema), versions=versions
    )


def _exists(cursor: Any, role: str) -> bool:
    cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,))
    return cursor.fetchone() is not None


def _make(cursor: Any, role: str, password: str | None) -> MadeRole:
    is_new = not _exists(cursor, role)
    if is_new:
        cursor.execute(sql.SQL(CREATE).format(role=sql.Identifier(role)))
    if password is not None:
        verifier = encrypt_password(password, role, cursor.connection, "scram-sha-256")
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
        cursor.execute(statement.format(sql.Identifier(role), sql.Literal(verifier)))
    return MadeRole(role, is_new, password is not None)


def _grant(cursor: Any, role: str) -> None:
    for statement in RIGHTS[role]:
        cursor.execute(_filled(cursor, statement, role=role))


def _require_rights(cursor: Any, role: str, label: str) -> None:
    cursor.execute(LACKING, {"role": role})
    (lacking,) = cursor.fetchone()
    if lacking:
        message = (
            f"storage {label}: role {role} still lacks {lacking}, which is not this role's to grant. Run this as the "
            "database's owner."
        )
        raise StorageError(message)
