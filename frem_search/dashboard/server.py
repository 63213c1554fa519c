"""Serve the dashboard: Optuna's page behind our gate, in one process, so that its cache of trials is one."""

import functools
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from frem_search.dashboard.gate import Gate
from frem_search.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from frem_search.dashboard.tokens import Token
    from frem_search.storage.database import Storage

EXTRA = ("optuna_dashboard", "waitress")
N_THREADS = 8
N_CONNECTIONS = N_THREADS + 1  # to the database: one for each thread, and one to spare
LONGEST_REQUEST = 64 * 2**10  # bytes: it is received before the gate can ask for the token
LONGEST_FILE = 64 * 2**20  # that somebody adds, where that is allowed
MOST_VISITORS, IDLE_S = 1000, 20  # connections at once, and for how long one may say nothing


class Listening(NamedTuple):
    """A socket that waits for visitors.

    Args:
        socket: It is bound already.
        url: Where visitors find it.
        hosts: The names by which it may be called; none for any.
    """

    socket: socket.socket
    url: str
    hosts: frozenset[str]


def require_extra() -> None:
    """Make sure that dashboard and server are installed.

    Raises:
        UsageError: They are not.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"dashboard: expected the packages {' and '.join(EXTRA)}, but {' and '.join(missing)} cannot be imported. "
            'Install them by `pip install "frem-search[dashboard]"`.'
        )
        raise UsageError(message)


def listen(host: str, port: int, *, url: str | None = None) -> Listening:
    """Take a port; the number 0 is any that is free.

    Args:
        host: A name or address of this machine.
        port: The number.
        url: The address that visitors use, if a proxy stands before this server.

    Raises:
        UsageError: The port is taken, the host is none of this machine's, or the URL is none of a server.
    """
    proxy = _server_of(url) if url else ""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError of a name that no network has
        reason = getattr(error, "strerror", None) or error
        message = (
            f"--host {host} --port {port}: cannot be listened on: {reason}. "
            "Choose another --port (0 takes a free one), or an address of this machine."
        )
        raise UsageError(message) from None
    got, number = bound.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    is_loopback = ipaddress.ip_address(got).is_loopback
    hosts = frozenset({"localhost", "127.0.0.1", "::1", got, host.lower(), *filter(None, [proxy])})
    return Listening(bound, url or f"http://{name}:{number}/", hosts if is_loopback else frozenset())


def _server_of(url: str) -> str:
    """Return the name of the server that a URL names, and nothing behind it."""
    try:
        parts = urlsplit(url)
        name = parts.hostname or ""
    except ValueError:
        name = ""
    if not name or parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.query:
        message = (
            f"--url {url}: expected the address of a whole server, such as https://frem.example.org/, but got "
            "something else. The dashboard's pages expect to be at the root of their server."
        )
        raise UsageError(message)
    return name


def make_app(
    storage: "Storage", *, artifacts: str, token: str, is_writable: bool, hosts: frozenset[str], url: str = ""
) -> "WSGIApplication":
    """Return the dashboard of a database, behind the gate.

    Args:
        storage: The database; its Optuna storage keeps finished trials in memory, so that a poll reads only new ones.
        artifacts: The URL of checkpoints, weights and predictions.
        token: What a visitor has to know.
        is_writable: Whether studies may be changed.
        hosts: The names by which the server may be called; none for any.
        url: The address that visitors use where a proxy stands before the server.
    """
    import optuna
    from optuna_dashboard import wsgi

    from frem_search.dashboard.artifact_store import StudyArtifacts

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    page = wsgi(storage.optuna, artifact_store=StudyArtifacts(storage, artifacts))
    page.install(_telling_what_is_missing)
    return Gate(page, token, is_writable=is_writable, hosts=hosts, url=url)


def _telling_what_is_missing(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Let the dashboard answer 404 for a file that is not there, instead of 500 and a traceback for each picture."""
    from bottle import HTTPResponse
    from optuna.artifacts.exceptions import ArtifactNotFound

    @functools.wraps(callback)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return callback(*args, **kwargs)
        except (ArtifactNotFound, ArtifactError) as error:
            return HTTPResponse(f"{error}\n", status=404, headers={"Content-Type": "text/plain; charset=utf-8"})

    return answer


def serve(app: "WSGIApplication", listening: Listening, *, is_writable: bool) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    import waitress

    # Else it warns whenever a page asks for more things at once than there are threads.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = waitress.create_server(
        app,
        map={},
        sockets=[listening.socket],
        threads=N_THREADS,
        ident=None,
        max_request_body_size=LONGEST_FILE if is_writable else LONGEST_REQUEST,
        connection_limit=MOST_VISITORS,
        channel_timeout=IDLE_S,
        cleanup_interval=5,
    )
    try:
        server.run()
    finally:
        server.close()


def greet(listening: Listening, token: "Token", *, is_writable: bool, tell: Callable[[str], None]) -> None:
    """Say where the dashboard is and how to come in; a token that the user gave is not repeated."""
    if not listening.hosts:
        tell(
            "warning: this is plain HTTP on an address that others reach: token and page can be read on the way. "
            "Put it behind a proxy that speaks HTTPS, with --url, or leave --host out and use an SSH tunnel."
        )
    if is_writable:
        tell("warning: --write: whoever knows the token can change and delete studies.")
    if token.is_generated:
        tell(f"dashboard: open {listening.url}?token={token.text}")
    else:
        tell(f"dashboard: open {listening.url} and enter your token.")
    tell("Ctrl-C ends it.")
