"""What a search needs of this machine and its database, one check each, with the remedy where something is wrong."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from frem_search.doctor import database, images, machine
from frem_search.doctor.finding import Finding
from frem_search.errors import UsageError
from frem_search.files import read_secret

if TYPE_CHECKING:
    from frem_search.storage import Storage
    from frem_search.study_file import StudyFile

__all__ = ["Finding", "examine", "secrets_of"]


def examine(
    open_storage: Callable[[], "AbstractContextManager[Storage]"],
    *,
    artifacts: str,
    load_study: "Callable[[], StudyFile | str] | None" = None,
    secrets: tuple[str, ...] = (),
) -> Iterator[Finding]:
    """Look at everything; yield each finding as soon as it is there, and never raise.

    Args:
        open_storage: Opens the database.
        artifacts: The URL of checkpoints, weights and predictions.
        load_study: Returns the study that is to run, or its name if it is stored and its file is not here.
        secrets: Texts that no finding may show, such as a database URL with its password.
    """
    examiner = _Examiner(secrets)
    yield examiner.look("python", machine.python)
    yield examiner.look("packages", machine.packages)
    yield examiner.look("home", machine.home_folder)
    yield examiner.look("artifacts", lambda: machine.artifacts_store(artifacts))
    yield examiner.look("device", machine.device)
    yield examiner.look("pictures", machine.pictures)
    for name in examiner.names(images.dataset_names):
        yield examiner.look("dataset", partial(images.dataset, name))
    opened: list[Storage] = []
    stack = ExitStack()

    def open_database() -> Finding:
        opened.append(stack.enter_context(open_storage()))
        return Finding("database", "ok", opened[0].label)

    try:
        yield examiner.look("database", open_database)
        for storage in opened:
            for check, function in database.CHECKS.items():
                yield examiner.look(check, partial(database.connected, storage, function))
        if load_study is not None:
            yield examiner.look("study", partial(images.study, load_study, opened[0] if opened else None))
    finally:
        closed = examiner.look("database", partial(_close, stack))
    if closed.state == "FAIL":
        yield closed


def _close(stack: ExitStack) -> Finding:
    stack.close()
    return Finding("database", "ok", "closed")


def secrets_of(url: str | None) -> tuple[str, ...]:
    """Return what of a database URL, and of libpq's environment, must not be shown.

    >>> secrets_of("postgresql://me:s%40cret@db/frem")[1]
    's%40cret'
    """
    given = url or os.environ.get("FREM_SEARCH_STORAGE") or ""
    _, _, password = given.rpartition("@")[0].partition("://")[2].partition(":")
    found = (given if password else "", password, os.environ.get("PGPASSWORD", ""), _in_password_file())
    return tuple(text for text in found if text)


def _in_password_file() -> str:
    from frem_search.database_url import PASSWORD_FILE

    file = os.environ.get(PASSWORD_FILE)
    try:
        return read_secret(Path(file), named_by=PASSWORD_FILE) if file else ""
    except UsageError:
        return ""  # which opening the database tells


class _Examiner:
    """Runs checks: whatever one raises becomes a finding, without secrets."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        spellings = {spelling for secret in secrets for spelling in (secret, unquote(secret)) if secret}
        self._secrets = sorted(spellings, key=len, reverse=True)

    def look(self, check: str, function: Callable[[], Finding]) -> Finding:
        try:
            return function()
        except Exception as error:  # noqa: BLE001 a check that breaks is a finding
            reason = getattr(error, "orig", None) or error  # SQLAlchemy adds the statement and a link
            text = str(reason) or repr(reason)
            for secret in self._secrets:
                text = text.replace(secret, "***")
            return Finding(check, "FAIL", " ".join(text.split()))

    def names(self, function: Callable[[], list[str]]) -> list[str]:
        try:
            return function()
        except Exception:  # noqa: BLE001 a broken installation is told by the check of packages
            return []
