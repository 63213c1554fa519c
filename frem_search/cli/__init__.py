"""The `frem-search` command: parse, call one function, print."""

import logging
import os
import sys

import typer

from frem_search import __version__
from frem_search.cli import bench, dashboard, data, db, doctor, export, model, search, studies
from frem_search.errors import FremSearchError, UsageError
from frem_search.system.cores import let_waiting_threads_sleep
from frem_search.system.signals import interrupt_on_signals

app = typer.Typer(
    name="frem-search",
    help="Search hyperparameters of cell-image segmentation networks with Optuna's TPE.",
    epilog="Start here: frem-search run --study mouse_frem --quick",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
search.add_to(app)
model.add_to(app)
studies.add_to(app)
data.add_to(app)
export.add_to(app)
doctor.add_to(app)
db.add_to(app)
dashboard.add_to(app)
bench.add_to(app)


def _print_version(context: typer.Context, value: bool) -> None:
    if value and not context.resilient_parsing:  # a shell that completes what follows takes all that is printed
        typer.echo(f"frem-search {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main() -> None:
    """Run the command of `sys.argv` and exit with its status."""
    interrupt_on_signals()
    let_waiting_threads_sleep()
    logging.basicConfig()  # warnings alone; else Optuna sets up Alembic's way, which tells each step of an upgrade
    try:
        _require_text()
        status = app(prog_name="frem-search", standalone_mode=False)
        sys.stdout.flush()  # here, and not when Python exits, where a reader that has gone could not be caught
    except FremSearchError as error:
        sys.exit(_explain(f"frem-search: {error}", error.exit_status))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(_explain("frem-search: interrupted.", 130))
    except BrokenPipeError:
        # Who reads our output has gone, as `head` does; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_explain(f"frem-search: {where}{error.strerror or error}.", 1))
    except Exception as error:
        if status := getattr(error, "exit_code", None):  # click's own errors: a wrong option, a missing argument
            error.show()  # type: ignore[attr-defined]
            sys.exit(status)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _require_text() -> None:
    """Refuse arguments and variables that are not UTF-8: neither the database nor stdout takes them."""
    variables = [(name, value) for name, value in os.environ.items() if name.startswith("FREM_SEARCH_")]
    for name, text in [*((f"argument {i}", word) for i, word in enumerate(sys.argv[1:], 1)), *variables]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the text is not repeated: there may be a password in it
            place = f"its character {error.start + 1} is none"
            message = f"{name}: expected text in UTF-8, but {place}. Rename what it stands for."
            raise UsageError(message) from None


def _explain(message: str, status: int) -> int:
    sys.stderr.write(message + "\n")
    return status
