"""Checks of the database, on a connection as a search has it."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frem_search.doctor.finding import Finding

if TYPE_CHECKING:
    import sqlalchemy as sa

    from frem_search.storage.database import Storage

MOST_SKEW_S = 2.0
CONNECTIONS_PER_WORKER = 2  # as Storage pools them
OLDEST_SERVER = 130000  # older ones are past the end of their makers' support, and were never tried

RESERVED = "SELECT sum(setting::int) FROM pg_settings WHERE name ~ '^(superuser_)?reserved_connections$'"
ROLE = """
    SELECT current_user, current_setting('default_transaction_read_only')::boolean,
           rolsuper AND inet_client_addr() IS NOT NULL,
           coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)
    FROM pg_roles WHERE rolname = current_user
"""
LACKING_RIGHTS = """
    SELECT c.relname AS name, r AS right
    FROM pg_class c, unnest(CASE relkind WHEN 'S' THEN '{USAGE}' ELSE '{SELECT,INSERT,UPDATE,DELETE}'::text[] END) r
    WHERE c.relkind IN ('r', 'S') AND pg_table_is_visible(c.oid)
      AND c.relname ~ '^(studies|trials|(studies|study|trials|trial)_.+|frem_(lease|curve))$'
      AND NOT CASE relkind WHEN 'S' THEN has_sequence_privilege(c.oid, r) ELSE has_table_privilege(c.oid, r) END
    ORDER BY name, r
"""


def connected(storage: "Storage", function: "Callable[[sa.Connection], Finding]") -> Finding:
    """Make a check on a connection of the storage, and leave nothing behind."""
    with storage.engine.connect() as connection:
        try:
            return function(connection)
        finally:
            connection.rollback()


def server(connection: "sa.Connection") -> Finding:
    """Which server it is."""
    version = str(_scalar(connection, "SHOW server_version"))
    if int(_scalar(connection, "SHOW server_version_num")) < OLDEST_SERVER:
        return Finding("server", "warn", f"PostgreSQL {version}: too old to be tried.", "Use PostgreSQL 13 or newer.")
    return Finding("server", "ok", f"PostgreSQL {version}")


def session(connection: "sa.Connection") -> Finding:
    """Whether our connections have the time zone and isolation level that transactions count on."""
    zone, level = _scalar(connection, "SHOW TimeZone"), _scalar(connection, "SHOW transaction_isolation")
    found = f"time zone {zone}, {level}"
    if (zone, level) != ("UTC", "read committed"):
        remedy = "A pooler between us may drop settings: connect to the server itself, or pool by session."
        return Finding("session", "FAIL", f"expected time zone UTC, read committed, but got {found}.", remedy)
    return Finding("session", "ok", found)


def clock(connection: "sa.Connection") -> Finding:
    """How far this machine's clock is from the database's."""
    before = time.time()
    at_server = float(_scalar(connection, "SELECT extract(epoch FROM clock_timestamp())"))
    return judge_clock(before, at_server, time.time())


def judge_clock(before: float, at_server: float, after: float) -> Finding:
    """Judge the server's time, asked for between two times of this machine, all in seconds since 1970.

    >>> judge_clock(100.0, 103.1, 100.2).line()
    'warn  clock        3.0 s behind the database: times in figures will be off. Set both by NTP.'
    """
    skew_s = at_server - (before + after) / 2
    if abs(skew_s) <= MOST_SKEW_S:
        return Finding("clock", "ok", f"{abs(skew_s):.1f} s from the database's")
    side = "behind" if skew_s > 0 else "ahead of"
    return Finding(
        "clock", "warn", f"{abs(skew_s):.1f} s {side} the database: times in figures will be off.", "Set both by NTP."
    )


def connections(connection: "sa.Connection") -> Finding:
    """How many more workers the server takes."""
    most = int(_scalar(connection, "SHOW max_connections")) - int(_scalar(connection, RESERVED))
    used = int(_scalar(connection, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
    room = max(most - used, 0) // CONNECTIONS_PER_WORKER
    found = f"{used} of {most} in use, room for {room} more workers"
    if room < 2:
        return Finding("connections", "warn", f"{found}.", "Raise max_connections, or close other clients.")
    return Finding("connections", "ok", found)


def schema(connection: "sa.Connection") -> Finding:
    """Which version of Optuna's tables there is; opening the database has refused a wrong one."""
    if not _has_tables(connection):
        remedy = "Made by the first search, or by `frem-search db init` as the owner."
        return Finding("schema", "warn", "no tables yet.", remedy)
    version = _scalar(connection, "SELECT version_num FROM alembic_version")
    library = _scalar(connection, "SELECT library_version FROM version_info")
    n_studies = _scalar(connection, "SELECT count(*) FROM studies")
    studies = "study" if n_studies == 1 else "studies"
    return Finding("schema", "ok", f"Optuna's {version}, made by {library}; {n_studies} {studies}")


def rights(connection: "sa.Connection") -> Finding:
    """Whether the role may do what a search does; all of it is rolled back."""
    import sqlalchemy as sa

    lacking = connection.execute(sa.text(LACKING_RIGHTS)).all()
    role, is_only_reading, is_exposed, makes_tables = connection.execute(sa.text(ROLE)).one()
    if lacking or is_only_reading:
        found = f"lacks {_summary(lacking)}" if lacking else "may not write: its transactions only read"
        remedy = (
            "Workers connect as frem_worker, whom `frem-search db init`, run by the owner, grants all of it; for "
            "status, trials, figures and dashboard reading is enough."
        )
        return Finding("rights", "FAIL", f"role {role} {found}.", remedy)
    if _has_tables(connection):
        _scalar(connection, "INSERT INTO studies (study_name) VALUES (:name) RETURNING study_id", name=uuid.uuid4().hex)
    elif not makes_tables:
        remedy = "Run `frem-search db init` as the database's owner."
        return Finding("rights", "FAIL", f"role {role} may not make the tables, and there are none yet.", remedy)
    if is_exposed:
        remedy = "Workers need less: `frem-search db init` sets up frem_worker."
        return Finding("rights", "warn", f"role {role} is a superuser, and the server is reached by network.", remedy)
    tables = "makes tables" if makes_tables else "makes no tables"
    return Finding("rights", "ok", f"role {role} reads, writes and deletes; {tables}")


def _summary(lacking: "Sequence[sa.Row[tuple[str, str]]]") -> str:
    rights, names = sorted({row.right for row in lacking}), sorted({row.name for row in lacking})
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{', '.join(rights)} on {names[0]}{others}"


def _has_tables(connection: "sa.Connection") -> bool:
    from frem_search.storage.schema import stored_version

    return stored_version(connection) > 0


CHECKS: "Mapping[str, Callable[[sa.Connection], Finding]]" = {
    "server": server,
    "session": session,
    "clock": clock,
    "connections": connections,
    "schema": schema,
    "rights": rights,
}


def _scalar(connection: "sa.Connection", query: str, **values: object) -> Any:
    import sqlalchemy as sa

    return connection.execute(sa.text(query), values).scalar()
