"""The word that opens the dashboard: of the environment, of a file or made up, never an argument, which others see."""

import os
import secrets
from pathlib import Path
from typing import NamedTuple

from frem_search.errors import UsageError
from frem_search.system.files import read_secret

VARIABLE = "FREM_SEARCH_DASHBOARD_TOKEN"
SHORTEST = 16  # characters: nobody counts wrong guesses


class Token(NamedTuple):
    """What a visitor has to know.

    Args:
        text: The token.
        is_generated: Whether it was made up just now, so that it must be shown to the user.
    """

    text: str
    is_generated: bool


def find_token(file: Path | None) -> Token:
    """Return the token of a file, of the environment, or a new one.

    Raises:
        UsageError: The file cannot be read, or the token is short or has characters that no address takes.
    """
    if file is not None:
        secret = read_secret(file, named_by="--token-file")
        return Token(_checked(secret, where=f"--token-file {file}"), is_generated=False)
    if (given := os.environ.get(VARIABLE)) is not None:
        return Token(_checked(given.strip(), where=VARIABLE), is_generated=False)
    return Token(secrets.token_urlsafe(24), is_generated=True)


def _checked(text: str, *, where: str) -> str:
    if len(text) < SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        message = (
            f"{where}: expected a token of at least {SHORTEST} printable ASCII characters without spaces, but got "
            f"{len(text)} characters that are not that. Make one by "
            '`python -c "import secrets; print(secrets.token_urlsafe())"`, or leave it out.'
        )
        raise UsageError(message)
    return text
