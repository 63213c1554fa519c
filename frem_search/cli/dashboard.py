"""The command that shows studies in a browser."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from frem_search.cli.options import ArtifactsOption, StorageOption, artifacts_of, storage_of


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(dashboard)


def dashboard(
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    host: Annotated[
        str, typer.Option(envvar="FREM_SEARCH_DASHBOARD_HOST", help="Address to listen on; others are plain HTTP too.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="FREM_SEARCH_DASHBOARD_PORT", help="0 takes a free one.")
    ] = 8080,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="FREM_SEARCH_DASHBOARD_URL",
            help="Address that visitors use where a proxy stands before this one, such as https://frem.example.org/.",
            show_default=False,
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", envvar="FREM_SEARCH_DASHBOARD_WRITE", help="Let visitors change studies.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="FREM_SEARCH_DASHBOARD_TOKEN_FILE",
            help="File with the token that visitors need; without it FREM_SEARCH_DASHBOARD_TOKEN, without that one is "
            "made and printed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the stored studies in a browser, in Optuna's dashboard, until Ctrl-C.

    Nothing can be changed unless you say --write, and only who knows the token sees anything. Needs
    `pip install "frem-search[dashboard]"`.

    \b
    $ frem-search dashboard --port 8080
    """
    from frem_search.dashboard.server import N_CONNECTIONS, greet, listen, make_app, require_extra, serve
    from frem_search.dashboard.tokens import find_token

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    require_extra()
    token = find_token(token_file)
    listening = listen(host, port, url=url)
    with (
        closing(listening.socket),
        storage_of(storage, is_read_only=not write, n_connections=N_CONNECTIONS) as opened,
    ):
        app = make_app(
            opened,
            artifacts=artifacts_of(artifacts),
            token=token.text,
            is_writable=write,
            hosts=listening.hosts,
            url=url or "",
        )
        greet(listening, token, is_writable=write, tell=tell)
        serve(app, listening, is_writable=write)
