"""One database: transactions that Optuna's statements and ours share."""

import copy
import os
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
import psycopg2
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from psycopg2.extensions import make_dsn
from sqlalchemy import exc, orm

from frem_search.errors import DatabaseAwayError, StorageError
from frem_search.storage import schema
from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.place import folder
from frem_search.storage.url import normalise_url, with_password
from frem_search.storage.watchdog import WatchedConnection, WatchedCursor, patience

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")
States = Container[TrialState]

READ_ONLY = "25006"  # PostgreSQL's code for writing in a transaction that may only read
REFUSALS = ("42501", READ_ONLY)  # the first for a lack of rights
FULL = "53100"
BUSY = ("40P01", "55P03", "57014", "25P03")  # deadlock, lock_timeout, statement_timeout, idle in a transaction

# A connection that hangs in the middle of a transaction holds up every claim, so the server ends it; clock and
# isolation level must not depend on the role or on PGTZ: see docs/decisions.md.
SESSION = """
SET TIME ZONE 'UTC';
SET statement_timeout = '60s';
SET lock_timeout = '60s';
SET idle_in_transaction_session_timeout = '30s';
"""


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


def code_of(error: BaseException | None) -> str | None:
    """Return the server's code for an error, if it has one."""
    while error is not None:
        if code := getattr(getattr(error, "orig", error), "pgcode", None):
            return str(code)
        error = error.__cause__
    return None


def is_refused(error: BaseException | None) -> bool:
    """Whether an error means that the role may not do what was asked for."""
    return code_of(error) in REFUSALS


@contextmanager
def open_storage(
    url: str | None = None,
    *,
    upgrades: bool = False,
    is_read_only: bool = False,
    makes_tables: bool = True,
    n_connections: int = 2,
) -> "Iterator[Storage]":
    """Open the database of a URL, or the embedded one.

    Args:
        url: A PostgreSQL URL; without it FREM_SEARCH_STORAGE, without that the embedded PostgreSQL.
        upgrades: As `Storage` takes it.
        is_read_only: As `Storage` takes it.
        makes_tables: As `Storage` takes it.
        n_connections: As `Storage` takes it.

    Raises:
        StorageError: It cannot be reached or refuses.
        UsageError: It is no PostgreSQL URL, or FREM_SEARCH_PASSWORD_FILE cannot be read.
    """
    given = url or os.environ.get("FREM_SEARCH_STORAGE")
    with ExitStack() as stack:
        address = with_password(normalise_url(given)) if given else stack.enter_context(embedded_postgres())
        storage = Storage(
            address,
            label=None if given else f"embedded, in {folder()}",
            upgrades=upgrades,
            is_read_only=is_read_only,
            makes_tables=makes_tables,
            n_connections=n_connections,
        )
        stack.callback(storage.close)
        yield storage


class Storage:
    """One database: transactions for our statements and Optuna's together.

    Args:
        url: A PostgreSQL URL, with the password if there is one.
        label: What messages call it; the URL without the password if that is None.
        upgrades: Whether tables of an older version are brought up to date, instead of refused.
        is_read_only: Whether nothing is written, not even tables that are missing: a role that may only read will do.
        makes_tables: Whether tables that are missing are made; if not, `has_tables` says whether there are any, and
            `optuna` is missing like them.
        n_connections: How many there may be at once: the worker's own, and one for the thread that renews its leases.

    Raises:
        StorageError: The database cannot be reached or refuses.
    """

    def __init__(
        self,
        url: sa.URL,
        *,
        label: str | None = None,
        upgrades: bool = False,
        is_read_only: bool = False,
        makes_tables: bool = True,
        n_connections: int = 2,
    ) -> None:
        self._is_read_only, self._n_connections = is_read_only, n_connections
        self._known = set[int]()  # studies whose trials Optuna's cache holds
        self.label = label or url.set(drivername="postgresql").render_as_string(hide_password=True)
        text = url.render_as_string(hide_password=False)
        self._optuna_url = text.replace("{", "{{").replace("}", "}}")  # RDBStorage fills {SCHEMA_VERSION} into its URL
        dialect = url.get_dialect()()
        self._connect_args = dialect.create_connect_args(url)[1]
        self.engine = sa.create_engine(url, **self._engine_settings())
        try:
            if makes_tables:
                self.prepare(upgrades=upgrades)
            self.has_tables = makes_tables or self._finds_tables()
            if self.has_tables:
                self._open_optuna()
        except StorageError:
            self.engine.dispose()
            raise
        except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            self.engine.dispose()
            raise StorageError(self._explain(error)) from None

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def prepare(self, *, upgrades: bool = False) -> None:
        """Make the tables that are missing; refuse those of another version, or bring older ones up to date.

        Raises:
            StorageError: They are of another version, or this role may not make them.
        """
        if self._is_read_only:
            schema.require(self.engine, label=self.label)
            return
        schema.prepare(self.engine, self._rdb, label=self.label, upgrades=upgrades)

    @property
    def optuna_versions(self) -> list[str]:
        """The versions of Optuna's tables that can be brought up to date, the current one among them."""
        return self._backend.get_all_versions()

    def for_programs(self) -> tuple[str, dict[str, str]]:
        """Return the connection for PostgreSQL's own programs: an argument without the password, and environment."""
        settings = dict(self._connect_args)
        password = settings.pop("password", None)
        return make_dsn(**settings), {} if password is None else {"PGPASSWORD": password}

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Run our statements and Optuna's in one transaction: all of it is stored, or nothing.

        Optuna commits many times on its way; inside this block each of its commits only releases a savepoint.
        """
        backend = self._backend
        usual = backend.scoped_session
        try:
            with self.engine.begin() as connection:
                # Not a sessionmaker, which makes a class each time.
                session = partial(orm.Session, bind=connection, join_transaction_mode="create_savepoint")
                backend.scoped_session = orm.scoped_session(session)  # type: ignore[arg-type] # any maker will do
                yield connection
        except BaseException:
            # Optuna's cache may hold rows that were rolled back.
            self._drop_cache()
            raise
        finally:
            backend.scoped_session = usual

    @contextmanager
    def reading_once(self) -> Iterator[None]:
        """Let Optuna read the trials of a study once in this block, however often it looks at them.

        It looks for enqueued trials first, and the sampler looks again for itself; each time all running ones are read.
        """
        usual, known = self.optuna.get_all_trials, dict[int, list[FrozenTrial]]()

        def read(study_id: int, deepcopy: bool = True, states: States | None = None) -> list[FrozenTrial]:  # noqa: FBT001, FBT002 Optuna's signature
            if study_id not in known:
                known[study_id] = usual(study_id, deepcopy=False)
            trials = [trial for trial in known[study_id] if states is None or trial.state in states]
            return copy.deepcopy(trials) if deepcopy else trials

        self.optuna.get_all_trials = read  # type: ignore[method-assign] # Optuna has no such setting
        try:
            yield
        finally:
            del self.optuna.get_all_trials

    def get_to_know(self, study_id: int) -> None:
        """Read the trials of a study, unless they were read before; later only those are read that have changed.

        Thousands of them take seconds: whoever reads them first under the study's lock holds up all other workers.
        """
        if study_id in self._known:
            return
        with suppress(KeyError):  # deleted meanwhile: whoever locks it tells so
            self.optuna.get_all_trials(study_id, deepcopy=False)
            self._known.add(study_id)

    def retrying(self, action: Callable[[], T], *, patience_s: float = 60.0) -> T:
        """Do something again until the database is there, with growing pauses.

        Args:
            action: What is done; a transaction, so that it is done once.
            patience_s: For how long the database is waited for.

        Raises:
            DatabaseAwayError: It was not there.
            StorageError: It refuses.
        """
        give_up_at, pause_s = time.monotonic() + patience_s, 0.05
        while True:
            try:
                return action()
            except Exception as error:
                is_away = is_lost_connection(error) or (code_of(error) == READ_ONLY and self._is_standby())
                if is_refused(error) and not is_away:
                    raise StorageError(self._explain(error)) from None
                if not is_away:
                    raise
                if time.monotonic() > give_up_at:
                    raise DatabaseAwayError(self._explain(error)) from None
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def _is_standby(self) -> bool:
        """Whether the server only reads because it is a copy that has not been promoted yet."""
        try:
            with self.engine.connect() as connection:
                return bool(connection.execute(sa.text("SELECT pg_is_in_recovery()")).scalar())
        except exc.SQLAlchemyError:
            return True  # it goes down this very moment

    def _engine_settings(self) -> dict[str, Any]:
        return {
            "creator": self._connect,
            "isolation_level": "READ COMMITTED",
            "pool_pre_ping": True,
            "pool_recycle": 1800,
            "pool_size": max(1, self._n_connections - 1),  # a worker's second, which renews leases, is by overflow
            "max_overflow": 1,
            "pool_timeout": 30,
        }

    def _connect(self) -> Any:
        connection = psycopg2.connect(
            **{
                "connection_factory": WatchedConnection,
                "cursor_factory": WatchedCursor,
                "application_name": "frem-search",
                "client_encoding": "utf8",  # a database of another encoding would refuse a name with an umlaut
                "connect_timeout": round(min(max(patience(), 2.0), 10.0)),  # libpq takes no less than 2 s
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
            if self._is_read_only:
                cursor.execute("SET default_transaction_read_only = on")
        connection.autocommit = False
        return connection

    def _rdb(self, **settings: Any) -> RDBStorage:
        return RDBStorage(self._optuna_url, engine_kwargs=self._engine_settings(), **settings)

    def _finds_tables(self) -> bool:
        with self.engine.connect() as connection:
            return schema.is_prepared(connection, label=self.label)

    def _open_optuna(self) -> None:
        backend = self._rdb(skip_table_creation=True, skip_compatibility_check=True)
        try:
            schema.refuse_other_optuna(backend, label=self.label)
        finally:
            backend.engine.dispose()
        backend.engine = self.engine  # one pool for Optuna's statements and ours
        backend.scoped_session = orm.scoped_session(orm.sessionmaker(bind=self.engine))
        self._backend = backend
        self.optuna: BaseStorage = optuna.storages.get_storage(backend)

    def _drop_cache(self) -> None:
        fresh = optuna.storages.get_storage(self._backend)
        self.optuna.__dict__.update(fresh.__dict__)
        self._known.clear()

    def _explain(self, error: BaseException) -> str:
        cause = error if isinstance(error, exc.DBAPIError) else error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()
        first = reason[0].rstrip(".") if reason else type(cause).__name__
        if is_refused(error):
            remedy = "Workers need the role frem_worker, and `frem-search db` the owner; `frem-search db init` grants."
        elif code_of(error) == FULL:
            remedy = "Free space on the server's disk."
        elif code_of(error) in BUSY:
            remedy = "The server is overloaded, or somebody holds a lock: look at pg_stat_activity."
        else:
            remedy = (
                "Check that it runs, the URL, the role and its password, or leave --storage out to use the embedded "
                "one."
            )
        return f"storage {self.label}: the database cannot be reached or refuses: {first}. {remedy}"
