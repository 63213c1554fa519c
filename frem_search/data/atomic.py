"""Build a folder beside its place and move it there when it is whole, so that nobody ever sees half of one."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from frem_search.errors import DatasetError


def build_folder(folder: Path, write: Callable[[Path], None], *, force: bool = False) -> bool:
    """Let `write` fill a new folder that then takes the place of `folder`; return whether it did.

    A folder that meanwhile appeared with something in it stays, and the new one is dropped, unless `force` is set.

    Args:
        folder: The final place.
        write: Fills the empty folder that it is given.
        force: Replace what is there.
    """
    # A name of its own for each process, and on the same file system, without which a rename would be a copy.
    beside = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        write(beside)
        return _move(beside, folder, force=force)
    except OSError as error:
        message = (
            f"{folder}: expected a place to write to, but got: {error}. Free space there or mend the permissions, "
            "or set FREM_SEARCH_HOME to another folder."
        )
        raise DatasetError(message) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def build_prepared(folder: Path, write: Callable[[Path], None], *, force: bool) -> Path:
    """Build a folder from images that the user brought; what is there already is an error unless `force` is set.

    Args:
        folder: The final place.
        write: Fills the empty folder that it is given.
        force: Replace what is there.
    """
    if (is_filled(folder) and not force) or not build_folder(folder, write, force=force):
        message = (
            f"{folder}: expected an empty or a new folder, but got one with files in it. "
            "Prepare with --force to replace it."
        )
        raise DatasetError(message)
    return folder


def is_filled(folder: Path) -> bool:
    """Whether there is a folder with something in it."""
    return folder.is_dir() and any(folder.iterdir())


def _move(beside: Path, folder: Path, *, force: bool) -> bool:
    old = beside.with_name(f"{beside.name}-old")
    if force and is_filled(folder):
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if is_filled(folder) and not force:
            return False
        raise
    shutil.rmtree(old, ignore_errors=True)
    return True
