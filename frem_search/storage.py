"""A database URL, or none for the embedded PostgreSQL, becomes an engine and Optuna storage that share transactions."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
import psycopg2
import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy import exc, orm

from frem_search.embedded import embedded_postgres
from frem_search.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")

DRIVER = "postgresql+psycopg2"
TABLES_LOCK = 7_236_001  # an advisory lock of our own, held while tables are created

# Rows of ours beside Optuna's tables; deleted with the trial that they belong to.
TABLES = """
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
"""

# A connection that hangs in the middle of a transaction holds up every claim, so the server ends it; clock and
# isolation level must not depend on the role or on PGTZ: see docs/decisions.md.
SESSION = """
SET TIME ZONE 'UTC';
SET statement_timeout = '60s';
SET lock_timeout = '60s';
SET idle_in_transaction_session_timeout = '30s';
"""


def normalise_url(text: str) -> sa.URL:
    """Return the URL with our driver.

    Raises:
        StorageError: It is no PostgreSQL URL.

    >>> normalise_url("postgres://me:p%40ss@db/frem").drivername
    'postgresql+psycopg2'
    """
    try:
        url = sa.make_url(text)
        if text.count("@") > 1:
            raise ValueError  # a password with an @ in it, of which a part would be taken for a host and printed
    except (exc.ArgumentError, ValueError):
        # The text may hold a password that was not percent-encoded: it is not repeated here.
        message = (
            "storage: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, but got something that does not parse "
            "as a URL. Percent-encode special characters in the password (@ is %40, / is %2F), or leave it out and use "
            "PGPASSFILE."
        )
        raise StorageError(message) from None
    if url.drivername.split("+")[0] not in ("postgres", "postgresql"):
        message = (
            f"storage: expected a PostgreSQL URL (postgresql://...), but got one that begins with {url.drivername}://. "
            "Searches need PostgreSQL; leave --storage out to use the embedded one."
        )
        raise StorageError(message)
    if "password" in url.query:  # SQLAlchemy hides a password only where it stands before the host
        given = url.query["password"]
        url = url.difference_update_query(["password"]).set(password=given if isinstance(given, str) else given[-1])
    return url.set(drivername=DRIVER)


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error means that the database was out of reach or stepped in, so that one may try again."""
    while error is not None:
        if isinstance(error, exc.OperationalError | exc.InterfaceError | psycopg2.OperationalError):
            return True
        if isinstance(error, exc.PendingRollbackError | exc.ResourceClosedError):
            return True
        if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__
    return False


@contextmanager
def open_storage(url: str | None = None) -> "Iterator[Storage]":
    """Open the database of a URL, or the embedded one.

    Args:
        url: A PostgreSQL URL; without it FREM_SEARCH_STORAGE, without that the embedded PostgreSQL.

    Raises:
        StorageError: It cannot be reached or refuses.
    """
    given = url or os.environ.get("FREM_SEARCH_STORAGE")
    with ExitStack() as stack:
        storage = Storage(normalise_url(given) if given else stack.enter_context(embedded_postgres()))
        stack.callback(storage.close)
        yield storage


class Storage:
    """One database: transactions for our statements and Optuna's together.

    Args:
        url: A PostgreSQL URL, with the password if there is one.

    Raises:
        StorageError: The database cannot be reached or refuses.
    """

    def __init__(self, url: sa.URL) -> None:
        self.label = url.render_as_string(hide_password=True)
        text = url.render_as_string(hide_password=False)
        self._optuna_url = text.replace("{", "{{").replace("}", "}}")  # RDBStorage fills {SCHEMA_VERSION} into its URL
        dialect = url.get_dialect()()
        self._connect_args = dialect.create_connect_args(url)[1]
        self.engine = sa.create_engine(url, **self._engine_settings())
        try:
            self._create_tables()
            self._open_optuna()
        except exc.SQLAlchemyError as error:
            self.engine.dispose()
            raise StorageError(self._explain(error)) from None
        except optuna.exceptions.StorageInternalError as error:
            self.engine.dispose()
            raise StorageError(self._explain(error.__cause__ or error)) from None
        except RuntimeError as error:  # Optuna's word for tables of another version
            self.engine.dispose()
            message = f"storage {self.label}: {error} Use the version of Optuna that made it, or another database."
            raise StorageError(message) from None

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Run our statements and Optuna's in one transaction: all of it is stored, or nothing.

        Optuna commits many times on its way; inside this block each of its commits only releases a savepoint.
        """
        backend = self._backend
        usual = backend.scoped_session
        try:
            with self.engine.begin() as connection:
                sessions = orm.sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
                backend.scoped_session = orm.scoped_session(sessions)
                yield connection
        except BaseException:
            # Optuna's cache may hold rows that were rolled back.
            self._drop_cache()
            raise
        finally:
            backend.scoped_session = usual

    def retrying(self, action: Callable[[], T], *, patience_s: float = 60.0) -> T:
        """Do something again until the database is there, with growing pauses.

        Raises:
            StorageError: It was not there for `patience_s`.
        """
        give_up_at, pause_s = time.monotonic() + patience_s, 0.05
        while True:
            try:
                return action()
            except Exception as error:
                if not is_lost_connection(error):
                    raise
                if time.monotonic() > give_up_at:
                    raise StorageError(self._explain(error.__cause__ or error)) from None
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def _engine_settings(self) -> dict[str, Any]:
        return {
            "creator": self._connect,
            "isolation_level": "READ COMMITTED",
            "pool_pre_ping": True,
            "pool_recycle": 1800,
            "pool_size": 1,  # the worker's own; the thread that renews leases is the second, by overflow
            "max_overflow": 1,
            "pool_timeout": 30,
        }

    def _connect(self) -> Any:
        connection = psycopg2.connect(
            **{
                "application_name": "frem-search",
                "connect_timeout": 10,
                "keepalives": 1,
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 5,
            }
            | dict(self._connect_args)
        )
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(SESSION)
        connection.autocommit = False
        return connection

    def _create_tables(self) -> None:
        """Create Optuna's tables and ours, by one process at a time."""
        with self.engine.connect() as connection:
            found = connection.execute(
                sa.text("SELECT to_regclass('alembic_version'), to_regclass('frem_curve')")
            ).one()
            if all(found):
                return
            connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": TABLES_LOCK})
            connection.commit()
            try:
                RDBStorage(self._optuna_url, engine_kwargs=self._engine_settings()).engine.dispose()
                connection.execute(sa.text(TABLES))
                connection.commit()
            finally:
                connection.rollback()  # after an error nothing else is taken, and the error is the one to tell
                connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": TABLES_LOCK})
                connection.commit()

    def _open_optuna(self) -> None:
        backend = RDBStorage(self._optuna_url, engine_kwargs=self._engine_settings(), skip_table_creation=True)
        backend.engine.dispose()
        backend.engine = self.engine  # one pool for Optuna's statements and ours
        backend.scoped_session = orm.scoped_session(orm.sessionmaker(bind=self.engine))
        self._backend = backend
        self.optuna: BaseStorage = optuna.storages.get_storage(backend)

    def _drop_cache(self) -> None:
        fresh = optuna.storages.get_storage(self._backend)
        self.optuna.__dict__.update(fresh.__dict__)

    def _explain(self, error: BaseException) -> str:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()
        first = reason[0].rstrip(".") if reason else type(error).__name__
        return (
            f"storage {self.label}: the database cannot be reached or refuses: {first}. "
            "Check that it runs, the URL, the role and its password, or leave --storage out to use the embedded one."
        )
