"""Files that are there whole or not at all, and files that hold a secret."""

import os
import re
import uuid
from pathlib import Path

from frem_search.errors import UsageError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, and its folder if need be: a reader finds the old content or the whole of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # TEMPORARY; not tempfile's: others must be able to read it.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: str) -> bool:
    """Whether `write_atomically` writes to this file, or was killed as it did.

    >>> is_temporary("3/.weights.pt.0123456789abcdef0123456789abcdef"), is_temporary("3/weights.pt")
    (True, False)
    """
    return TEMPORARY.fullmatch(path.rpartition("/")[2]) is not None


def read_secret(path: Path, *, named_by: str) -> str:
    """Return the one line of a file, without its end: a password or a token.

    Args:
        path: The file.
        named_by: The option or variable that named it, for messages, which never hold the content.

    Raises:
        UsageError: It cannot be read, or is not one line of text.
    """
    remedy = "Give the path of a file that this user may read and that holds the secret alone, on one line."
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        message = f"{named_by}: {path}: cannot be read: {reason}. {remedy}"
        raise UsageError(message) from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret or any(sign in secret for sign in "\n\r\0"):
        n_lines = len(text.splitlines())
        message = f"{named_by}: {path}: expected one line, but got {n_lines if secret else 'an empty file'}. {remedy}"
        raise UsageError(message)
    return secret
