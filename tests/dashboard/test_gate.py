"""The gate in front of the dashboard, by requests that nobody sends over a wire."""

import io
from urllib.parse import quote, urlencode
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from frem_search.dashboard.gate import Gate
from frem_search.dashboard.server import listen
from frem_search.dashboard.tokens import find_token
from frem_search.errors import UsageError

TOKEN = "a token's worth of characters"
BEARER = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}
OWN = {"HTTP_ORIGIN": "http://127.0.0.1:8080"}


class Behind:
    """Stands for the dashboard: answers everything, and remembers what reached it."""

    def __init__(self):
        self.reached = []

    def __call__(self, environ, start_response):
        self.reached.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]))
        headers = [("Content-Type", "text/plain"), ("Access-Control-Allow-Origin", "*")]
        headers += [("Location", "http://127.0.0.1:8080/dashboard?a=1")]
        start_response("200 OK", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"behind"]


@pytest.fixture
def behind():
    return Behind()


@pytest.fixture
def ask(behind):
    """One request: status, headers and text of the answer."""

    def ask(path="/", method="GET", query="", body=b"", token=TOKEN, **others):
        settings = {name: value for name, value in others.items() if name.islower()}
        environ = {name: value for name, value in others.items() if name.isupper()}
        gate = validator(Gate(behind, token, **settings))
        of_request = {"PATH_INFO": path, "REQUEST_METHOD": method, "QUERY_STRING": query, "HTTP_HOST": "127.0.0.1:8080"}
        of_request["SCRIPT_NAME"] = ""
        of_request |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)} | environ
        setup_testing_defaults(of_request)
        answer = {}

        def start_response(status, headers, error=None):
            answer.update(status=int(status.split()[0]), headers=headers)
            return lambda _: None

        body = gate(of_request, start_response)
        try:
            answer["text"] = b"".join(body).decode()
        finally:
            body.close()
        return answer

    return ask


def header(answer, name):
    return [value for each, value in answer["headers"] if each.lower() == name.lower()]


def cookie_of(answer):
    (cookie,) = header(answer, "Set-Cookie")
    return {"HTTP_COOKIE": cookie.partition(";")[0]}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"query": "token="},
        {"query": "token=wrong"},
        {"query": "token=%ff%00"},
        {"query": "nothing=1"},
        {"HTTP_AUTHORIZATION": "Bearer wrong"},
        {"HTTP_AUTHORIZATION": "Bearer "},
        {"HTTP_AUTHORIZATION": f"Basic {TOKEN}"},
        {"HTTP_AUTHORIZATION": "Bearer \xff"},
        {"HTTP_COOKIE": "frem_search=1"},
        {"HTTP_COOKIE": "[=;;=,"},
        {"method": "POST"},
        {"method": "DELETE", "query": f"token={TOKEN}"},
    ],
    ids=str,
)
def test_without_the_token_nothing_is_seen_and_the_page_says_what_to_do(ask, behind, wrong):
    answer = ask("/api/studies", **wrong)
    assert answer["status"] == 401
    assert behind.reached == []
    assert "Open the address that <code>frem-search dashboard</code> printed" in answer["text"]
    assert header(answer, "WWW-Authenticate") == ['Bearer realm="frem-search"']
    assert header(answer, "Set-Cookie") == []


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address(ask, behind):
    answer = ask("/dashboard/studies/1", query=f"a=1&token={TOKEN}&b=2")
    assert answer["status"] == 303
    assert header(answer, "Location") == ["/dashboard/studies/1?a=1&b=2"]
    (cookie,) = header(answer, "Set-Cookie")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
    assert TOKEN not in str(answer)
    assert behind.reached == []
    assert ask("/dashboard/studies/1", **cookie_of(answer))["text"] == "behind"
    assert behind.reached == [("GET", "/dashboard/studies/1", "")]


def test_a_cookie_of_another_token_opens_nothing(ask):
    cookie = cookie_of(ask(query=f"token={TOKEN}"))
    assert ask(**cookie, token="another token of some length")["status"] == 401
    name = cookie["HTTP_COOKIE"].partition("=")[0]
    assert ask(HTTP_COOKIE=f"{name}={TOKEN}")["status"] == 401


def test_the_token_entered_on_the_page_becomes_a_cookie_and_stands_in_no_address(ask, behind):
    assert '<form method="post" action="/login">' in ask()["text"]
    answer = ask("/login", method="POST", body=urlencode({"token": TOKEN}).encode())
    assert (answer["status"], header(answer, "Location")) == (303, ["/"])
    assert ask(**cookie_of(answer))["text"] == "behind"
    for wrong in (b"", b"token=wrong", b"token=", f"token={quote(TOKEN)}&x={'x' * 5000}".encode()):
        assert ask("/login", method="POST", body=wrong)["status"] == 401
    assert ask("/other", method="POST", body=urlencode({"token": TOKEN}).encode())["status"] == 401
    assert len(behind.reached) == 1


@pytest.mark.parametrize("odd", ['x={"theme":"dark"}', "a=b c", "[x]=1", "a=\xe9", "a@b=1", "flag", "path=/", "", "="])
def test_odd_cookies_of_other_servers_of_this_machine_are_passed_over(ask, odd):
    cookie = cookie_of(ask(query=f"token={TOKEN}"))["HTTP_COOKIE"]
    assert ask(HTTP_COOKIE=f"{odd}; {cookie}")["text"] == "behind"
    assert ask(HTTP_COOKIE=f"{cookie};{odd}")["text"] == "behind"
    assert ask(HTTP_COOKIE=odd)["status"] == 401


@pytest.mark.parametrize("host", ["dash.example.org", "127.0.0.1:8080"])
def test_behind_a_proxy_pages_of_its_address_may_write_and_cookies_are_secure(ask, host):
    """Some proxies pass on the name that they were called by, others name the server behind them."""
    to_proxy = {"hosts": frozenset({"127.0.0.1", "dash.example.org"}), "url": "https://dash.example.org/"}
    to_proxy |= {"is_writable": True, "HTTP_HOST": host}
    answer = ask(query=f"token={TOKEN}", **to_proxy)
    assert header(answer, "Set-Cookie")[0].endswith("; SameSite=Strict; Secure")
    cookie = cookie_of(answer)
    assert ask(method="DELETE", **to_proxy, **cookie, HTTP_ORIGIN="https://dash.example.org")["status"] == 200
    assert ask(method="DELETE", **to_proxy, **cookie, HTTP_ORIGIN="https://evil.example.org")["status"] == 403


def test_no_answer_leads_to_the_address_behind_a_proxy(ask):
    assert header(ask(**BEARER), "Location") == ["/dashboard?a=1"]


@pytest.mark.parametrize(
    "url", ["dash.example.org", "ftp://dash.example.org", "https://", "https://a/b", "https://[", "https://a/?b"]
)
def test_an_address_that_is_no_server_is_refused(url):
    with pytest.raises(UsageError, match="expected the address of a whole server, such as https"):
        listen("127.0.0.1", 0, url=url)


def test_a_login_leads_to_no_other_site(ask):
    for path in ("//evil.example/x", "///evil.example/x", "/\\evil.example/x", "/a\r\nSet-Cookie: b=1"):
        (location,) = header(ask(path, query=f"token={TOKEN}"), "Location")
        assert location.startswith("/")
        assert location[1:2] not in ("/", "\\")
        assert not set(location) & set("\\\r\n")


def test_programs_send_the_token_as_a_header(ask):
    assert ask(**BEARER)["text"] == "behind"
    head = ask(method="HEAD", **BEARER)
    assert (head["status"], head["text"]) == (200, "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_without_write_only_reading_requests_pass(ask, behind, method):
    answer = ask("/api/studies/1", method=method, **BEARER, **OWN)
    assert answer["status"] == 405
    assert header(answer, "Allow") == ["GET, HEAD"]
    assert "--write" in answer["text"]
    assert behind.reached == []


def test_with_write_only_own_pages_and_programs_change_anything(ask, behind):
    cookie = cookie_of(ask(query=f"token={TOKEN}"))

    def status(**environ):
        return ask("/api/studies/1", method="DELETE", is_writable=True, **environ)["status"]

    foreign = ("http://evil.example", "http://127.0.0.1:9999", "http://127.0.0.1:8080.evil.example", "null", "http://[")
    assert [status(**cookie, HTTP_ORIGIN=origin) for origin in foreign] == [403] * len(foreign)
    assert status(**cookie) == 403
    assert status(**OWN) == 401
    assert behind.reached == []
    assert status(**cookie, **OWN) == 200
    assert status(**BEARER) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8080", "", "[", "evil.example@127.0.0.1x"])
def test_a_foreign_name_for_this_machine_is_refused(ask, behind, host):
    hosts = frozenset({"localhost", "127.0.0.1", "::1"})
    assert ask(hosts=hosts, HTTP_HOST=host, query=f"token={TOKEN}")["status"] == 403
    assert ask(hosts=hosts, HTTP_HOST=host, **BEARER)["status"] == 403
    assert behind.reached == []


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:9000", "LOCALHOST:1"])
def test_this_machine_is_called_by_its_names_at_any_port(ask, host):
    assert ask(hosts=frozenset({"localhost", "127.0.0.1", "::1"}), HTTP_HOST=host, **BEARER)["status"] == 200


def test_every_answer_has_the_headers_that_protect_it(ask):
    answers = [ask(), ask(**BEARER), ask(query=f"token={TOKEN}"), ask(method="POST", **BEARER), ask("/artifacts/1/2/3")]
    for answer in answers:
        assert header(answer, "X-Content-Type-Options") == ["nosniff"]
        assert header(answer, "Referrer-Policy") == ["no-referrer"]
        assert header(answer, "X-Frame-Options") == ["DENY"]
        assert header(answer, "Cache-Control") == ["private, no-cache"]
        assert header(answer, "Access-Control-Allow-Origin") == []
        assert "frame-ancestors 'none'" in header(answer, "Content-Security-Policy")[-1]


def test_a_file_that_somebody_added_runs_no_script(ask):
    for path in ("/artifacts/1/2/3", "//artifacts/1/2"):
        (policy,) = header(ask(path, **BEARER), "Content-Security-Policy")
        assert policy.startswith("sandbox; default-src 'none'")


def test_a_token_is_made_up_anew_each_time():
    tokens = [find_token(None) for _ in range(3)]
    assert len({token.text for token in tokens}) == 3
    assert all(token.is_generated and len(token.text) >= 32 for token in tokens)


def test_a_file_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_DASHBOARD_TOKEN", "of-the-environment")
    assert find_token(None) == ("of-the-environment", False)
    (tmp_path / "token").write_text("of-the-file-that-was-given\n")
    assert find_token(tmp_path / "token") == ("of-the-file-that-was-given", False)


@pytest.mark.parametrize("text", ["", "short", "fifteen-letters", "with a space in between", "mit-Umlauten-äöü-darin"])
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused_and_not_repeated(tmp_path, monkeypatch, text):
    monkeypatch.setenv("FREM_SEARCH_DASHBOARD_TOKEN", text)
    (tmp_path / "token").write_text(text)
    for file, place in ((None, "FREM_SEARCH_DASHBOARD_TOKEN"), (tmp_path / "token", "--token-file")):
        with pytest.raises(UsageError) as raised:
            find_token(file)
        assert str(raised.value).startswith(place)
        assert not text or text not in str(raised.value)


def test_a_token_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"--token-file: .*nothing: cannot be read: No such file"):
        find_token(tmp_path / "nothing")


def test_a_port_that_is_taken_is_told():
    first = listen("127.0.0.1", 0)
    with first.socket:
        port = first.socket.getsockname()[1]
        assert first.url == f"http://127.0.0.1:{port}/"
        with pytest.raises(UsageError, match=f"--port {port}: cannot be listened on: .*in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"--host nobody.invalid --port 0: cannot be listened on"):
        listen("nobody.invalid", 0)


@pytest.mark.parametrize("host", ["x" * 300, "a..b", "256.256.256.256"])
def test_a_host_that_no_network_has_is_told(host):
    with pytest.raises(UsageError, match=rf"^--host {host} --port 0: cannot be listened on: "):
        listen(host, 0)


def test_names_are_checked_on_loopback_alone():
    for host, is_checked in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        listening = listen(host, 0)
        listening.socket.close()
        assert bool(listening.hosts) == is_checked
