"""Who may see the dashboard, and what may be asked of it: a WSGI application around another one."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

READING = ("GET", "HEAD")
LOGIN_PATH = "/login"  # none of the dashboard's
LONGEST_LOGIN = 4096  # bytes
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
NO_FRAMES = "frame-ancestors 'none'"
# A file that somebody added may be a page with a script, which would act in the visitor's name.
OF_FILES = f"sandbox; default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; {NO_FRAMES}"
NO_STORE = "private, no-cache"
LOGIN = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>frem-search dashboard</title></head>
<body style="font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em">
<h1>401: a token is needed</h1>
<p>Open the address that <code>frem-search dashboard</code> printed when it was started, or enter the token here:</p>
<form method="post" action="/login"><input name="token" type="password" autofocus required> <button>Open</button></form>
<p>If you came by a link of another site, with the right token: <a href="/">go on</a>. Programs send the header
<code>Authorization: Bearer TOKEN</code>.</p>
</body></html>
"""


class Gate:
    """Lets requests through that know the token, and only reading ones unless writing is allowed.

    Args:
        app: What is behind it.
        token: What a visitor has to know.
        is_writable: Whether requests may change anything.
        hosts: The names by which a browser may call this server, none for any: a foreign page can give its own name
            the address of this machine, and would then be taken for a page of this server.
        url: The address that visitors use where a proxy stands before this server, else nothing.
    """

    def __init__(
        self,
        app: "WSGIApplication",
        token: str,
        *,
        is_writable: bool = False,
        hosts: frozenset[str] = frozenset(),
        url: str = "",
    ) -> None:
        self._app, self._token = app, token.encode()
        self._is_writable, self._hosts, self._proxy = is_writable, hosts, urlsplit(url)
        self._cookie = self._digest("cookie")
        # Cookies of one machine are shared by all its ports: two dashboards must not overwrite each other's.
        self._cookie_name = f"frem_search_{self._digest('name')[:8]}"

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Answer a request, or pass it on."""
        start = self._guarded(environ, start_response)
        method = environ["REQUEST_METHOD"]
        if self._hosts and _host(environ) not in self._hosts:
            return _answer(
                environ, start, "403 Forbidden", f"This server is called {' or '.join(sorted(self._hosts))}.\n"
            )
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if given and method in READING and self._is_token(given[0]):
            return self._enter(environ, start, [pair for pair in query if pair[0] != "token"])
        if method == "POST" and environ.get("PATH_INFO") == LOGIN_PATH and self._is_token(_posted_token(environ)):
            return self._enter({"REQUEST_METHOD": method}, start, [])
        is_program = self._has_bearer(environ)
        if not is_program and not self._has_cookie(environ):
            asked = [("WWW-Authenticate", 'Bearer realm="frem-search"')]
            return _answer(environ, start, "401 Unauthorized", LOGIN, asked, kind="html")
        if method not in READING:
            if not self._is_writable:
                text = "Nothing can be changed here: start `frem-search dashboard --write` to change studies.\n"
                return _answer(environ, start, "405 Method Not Allowed", text, [("Allow", "GET, HEAD")])
            if not is_program and not self._is_own_page(environ):
                return _answer(environ, start, "403 Forbidden", "This request comes from a page of another site.\n")
        return self._app(environ, start)

    def _enter(
        self, environ: "WSGIEnvironment", start: "StartResponse", query: list[tuple[str, str]]
    ) -> Iterable[bytes]:
        """Hand out a cookie for the token, and lead to an address without it."""
        path = "/" + quote(environ.get("PATH_INFO", "").encode("latin-1").lstrip(b"/"))  # `//name` would be a host
        location = path + (f"?{urlencode(query)}" if query else "")
        cookie = f"{self._cookie_name}={self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        cookie += "; Secure" if self._proxy.scheme == "https" else ""
        return _answer(environ, start, "303 See Other", "", [("Location", location), ("Set-Cookie", cookie)])

    def _digest(self, purpose: str) -> str:
        return hmac.new(self._token, f"frem-search dashboard {purpose}".encode(), hashlib.sha256).hexdigest()

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)

    def _has_bearer(self, environ: "WSGIEnvironment") -> bool:
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        return scheme.lower() == "bearer" and self._is_token(given.strip())

    def _has_cookie(self, environ: "WSGIEnvironment") -> bool:
        # Not by http.cookies, which gives up at the first odd one; all servers of this machine share their cookies.
        for each in environ.get("HTTP_COOKIE", "").split(";"):
            name, _, value = each.strip().partition("=")
            if name == self._cookie_name and hmac.compare_digest(value.encode("latin-1"), self._cookie.encode()):
                return True
        return False

    def _is_own_page(self, environ: "WSGIEnvironment") -> bool:
        """Whether a browser says that a page of this server asks: of its name and port, by whatever scheme."""
        try:
            origin = urlsplit(environ.get("HTTP_ORIGIN", "")).netloc.lower()
        except ValueError:
            return False
        return bool(origin) and origin in (environ.get("HTTP_HOST", "").lower(), self._proxy.netloc.lower())

    def _guarded(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> "StartResponse":
        """Return a `start_response` that adds what keeps the answer from being framed, guessed at or kept."""
        policy = OF_FILES if environ.get("PATH_INFO", "").lstrip("/").startswith("artifacts/") else NO_FRAMES

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            # The dashboard lets pages of every site read artifacts.
            kept = [_local(pair) for pair in headers if pair[0].lower() != "access-control-allow-origin"]
            if not any(name.lower() == "cache-control" for name, _ in kept):
                kept.append(("Cache-Control", NO_STORE))
            return start_response(status, [*kept, *HEADERS.items(), ("Content-Security-Policy", policy)], *error)

        return start


def _answer(
    environ: "WSGIEnvironment",
    start: "StartResponse",
    status: str,
    text: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    kind: str = "plain",
) -> Iterable[bytes]:
    body = text.encode()
    start(status, [("Content-Type", f"text/{kind}; charset=utf-8"), ("Content-Length", str(len(body))), *headers])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _local(header: tuple[str, str]) -> tuple[str, str]:
    """Return a header; one that leads elsewhere without the server's name, which is another one before a proxy."""
    name, value = header
    if name.lower() != "location":
        return header
    return name, urlunsplit(urlsplit(value)._replace(scheme="", netloc=""))


def _host(environ: "WSGIEnvironment") -> str:
    """Return the name by which this server was called, without the port, which differs behind a tunnel."""
    try:
        return urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
    except ValueError:
        return ""


def _posted_token(environ: "WSGIEnvironment") -> str:
    """Return the token that was entered on our page."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdecimal() or int(length) > LONGEST_LOGIN:
        return ""
    body = environ["wsgi.input"].read(int(length)).decode("latin-1")
    return dict(parse_qsl(body)).get("token", "")
