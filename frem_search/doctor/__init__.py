"""What a search needs of this machine and its database, one check each, with the remedy where something is wrong."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from frem_search.doctor import database, images, machine
from frem_search.doctor.finding import Finding
from frem_search.errors import FremSearchError, UsageError
from frem_search.system.files import read_secret

if TYPE_CHECKING:
    from frem_search.data.summary import DatasetSummary
    from frem_search.storage.database import Storage
    from frem_search.study.file import StudyFile

__all__ = ["Finding", "examine", "secrets_of"]

T = TypeVar("T")
SHORT_SECRET = 8  # characters; what is put in place of shorter ones would tell them, as they are parts of words


def examine(
    open_storage: Callable[[], "AbstractContextManager[Storage]"],
    *,
    artifacts: str,
    load_study: "Callable[[], StudyFile | str] | None" = None,
    secrets: tuple[str, ...] = (),
) -> Iterator[Finding]:
    """Look at everything; yield each finding as soon as it is there, and never raise.

    Args:
        open_storage: Opens the database, without making tables: they would belong to whoever looks.
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
    read = cache(images.read)  # each dataset once, however many look at it
    for name in examiner.list_of(images.dataset_names):
        yield examiner.look("dataset", partial(images.dataset, name))
    opened: list[Storage] = []
    stack = ExitStack()

    def open_database() -> Finding:
        opened.append(stack.enter_context(open_storage()))
        return Finding("database", "ok", opened[0].label)

    try:
        yield examiner.look("database", open_database)
        for storage in opened:
            yield from _look_into(storage, examiner, read)
        if load_study is not None:
            stored_in = next((storage for storage in opened if storage.has_tables), None)
            yield examiner.look("study", partial(images.study, load_study, stored_in, read))
    finally:
        closed = examiner.look("database", partial(_close, stack))
    if closed.state == "FAIL":
        yield closed


def _look_into(storage: "Storage", examiner: "_Examiner", read: "Callable[[str], DatasetSummary]") -> Iterator[Finding]:
    for check, function in database.CHECKS.items():
        yield examiner.look(check, partial(database.connected, storage, function))
    if storage.has_tables:
        for name, begun in examiner.list_of(partial(images.begun_with, storage)):
            yield examiner.look("images", partial(images.stored_studies, name, begun, read))


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
    from frem_search.storage.url import PASSWORD_FILE

    file = os.environ.get(PASSWORD_FILE)
    try:
        return read_secret(Path(file), named_by=PASSWORD_FILE) if file else ""
    except UsageError:
        return ""  # which opening the database tells


class _Examiner:
    """Runs checks: whatever one raises becomes a finding. Our own messages show no secret, others' may."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        spellings = {spelling for secret in secrets for spelling in (secret, unquote(secret)) if secret}
        self._secrets = sorted(spellings, key=len, reverse=True)

    def look(self, check: str, function: Callable[[], Finding]) -> Finding:
        try:
            return function()
        except FremSearchError as error:
            return Finding(check, "FAIL", " ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001 a check that breaks is a finding
            return Finding(check, "FAIL", self._without_secrets(error))

    def list_of(self, function: Callable[[], list[T]]) -> list[T]:
        try:
            return function()
        except Exception:  # noqa: BLE001 a broken installation is told by the check of packages
            return []

    def _without_secrets(self, error: Exception) -> str:
        reason = getattr(error, "orig", None) or error  # SQLAlchemy adds the statement and a link
        text = str(reason) or repr(reason)
        for secret in self._secrets:  # longest first
            if len(secret) < SHORT_SECRET and secret in text:
                return type(reason).__name__
            text = text.replace(secret, "***")
        return " ".join(text.split())
