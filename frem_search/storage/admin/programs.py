"""PostgreSQL's own programs, pg_dump and pg_restore: where they are, and how one is run without showing a password."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from frem_search.errors import StorageError
from frem_search.storage.embedded.programs import wheel_folders


def find_program(name: str, *, at_least: int | None = None) -> Path:
    """Return the oldest such program that is new enough: a newer one writes for newer servers.

    Args:
        name: Of the program.
        at_least: Major version of PostgreSQL; without it the newest program, which reads all files.

    Raises:
        StorageError: There is none.
    """
    found = {path: version for path in _candidates(name) if (version := _major(path)) is not None}
    fitting = {path: version for path, version in found.items() if version >= (at_least or 0)}
    if not fitting:
        versions = ", ".join(str(version) for version in sorted(set(found.values()))) or "none"
        wanted = f"PostgreSQL {at_least} or newer" if at_least else "PostgreSQL"
        message = (
            f"{name}: expected the program of {wanted}, but got {versions}. Install PostgreSQL's client programs, and "
            f"have {name} in PATH."
        )
        raise StorageError(message)
    choose = max if at_least is None else min
    return choose(fitting, key=lambda path: fitting[path])


def run_program(command: Sequence[str | Path], *, environment: Mapping[str, str], remedy: str) -> str:
    """Run a program to its end and return what it printed.

    Args:
        command: The program and its arguments.
        environment: Variables for it beside those of this process.
        remedy: What to do if it fails.

    Raises:
        StorageError: It failed; the message is its own.
    """
    ended = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "LC_ALL": "C", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if "error:" in line] or ended.stderr.splitlines()
        reason = " ".join(lines[:2]) or f"exit status {ended.returncode}"
        message = f"{reason.rstrip('.')}. {remedy}"
        raise StorageError(message)
    return ended.stdout


def _candidates(name: str) -> list[Path]:
    in_path = shutil.which(name)
    paths = [folder / name for folder in wheel_folders()] + ([Path(in_path)] if in_path else [])
    return [path for path in paths if path.is_file()]


def _major(path: Path) -> int | None:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\(PostgreSQL\) (\d+)", told)
    return int(found[1]) if found else None
