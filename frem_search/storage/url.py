"""From the text of a database URL to an address that shows no secret, whatever is printed of it."""

import os
from pathlib import Path
from urllib.parse import unquote

import sqlalchemy as sa
from sqlalchemy import exc

from frem_search.errors import UsageError
from frem_search.system.files import read_secret

DRIVER = "postgresql+psycopg2"
PASSWORD_FILE = "FREM_SEARCH_PASSWORD_FILE"
HIGHEST_PORT = 65535
# Of libpq's settings those that hold no secret and are not said before the `?`.
SETTINGS = {
    "application_name", "channel_binding", "client_encoding", "connect_timeout", "gssdelegation", "gssencmode",
    "gsslib", "host", "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval",
    "krbsrvname", "load_balance_hosts", "options", "passfile", "port", "require_auth", "requirepeer", "service",
    "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcertmode", "sslcrl", "sslcrldir", "sslkey",
    "sslmode", "sslnegotiation", "sslrootcert", "sslsni", "target_session_attrs", "tcp_user_timeout", "user",
}  # fmt: skip


def normalise_url(text: str) -> sa.URL:
    """Return the URL with our driver, and a password where it is hidden when the URL is printed.

    Raises:
        UsageError: It is no URL of a PostgreSQL database, or has settings that are not libpq's.

    >>> normalise_url("postgres://me:p%40ss@db/frem").drivername
    'postgresql+psycopg2'
    """
    url = _parse(text)
    if url.drivername.split("+")[0] not in ("postgres", "postgresql"):
        message = (
            f"storage: expected a PostgreSQL URL (postgresql://...), but got one that begins with {url.drivername}://. "
            "Searches need PostgreSQL; leave --storage out to use the embedded one."
        )
        raise UsageError(message)
    if "password" in url.query:  # SQLAlchemy hides a password only where it stands before the host
        given = url.query["password"]
        url = url.difference_update_query(["password"]).set(password=given if isinstance(given, str) else given[-1])
    if others := sorted(set(url.query) - SETTINGS):
        message = (
            f"storage: expected libpq's settings after the ? of the URL, such as sslmode, but got {', '.join(others)}. "
            "A password stands before the host, or in a file; a key with a passphrase (sslpassword) cannot be used."
        )
        raise UsageError(message)
    return url.set(drivername=DRIVER)


def _parse(text: str) -> sa.URL:
    try:
        url = sa.make_url(text)
        # A part of a password that was not percent-encoded would be taken for host, port or database, and be printed.
        is_torn = text.count("@") > 1 or "#" in (url.database or "") or (url.port or 0) > HIGHEST_PORT
        if is_torn or "\0" in unquote(text):
            raise ValueError
    except (exc.ArgumentError, ValueError):
        # The text may hold a password: it is not repeated here.
        message = (
            "storage: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, but got something that does not parse "
            "as a URL. Percent-encode special characters in the password (@ is %40, / is %2F), or leave it out and use "
            f"{PASSWORD_FILE} or PGPASSFILE."
        )
        raise UsageError(message) from None
    return url


def with_password(url: sa.URL) -> sa.URL:
    """Return the URL with the password of FREM_SEARCH_PASSWORD_FILE, unless it has one.

    Raises:
        UsageError: The file cannot be read.
    """
    file = os.environ.get(PASSWORD_FILE)
    return url if url.password or not file else url.set(password=read_secret(Path(file), named_by=PASSWORD_FILE))
