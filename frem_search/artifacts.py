"""Checkpoints, weights and predictions of trials under one URL: a folder, or any storage that fsspec knows."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from frem_search.errors import ArtifactError
from frem_search.files import write_atomically
from frem_search.home import home


def artifacts_url(given: str | None = None) -> str:
    """Return the URL asked for, by option or FREM_SEARCH_ARTIFACTS, or a folder under FREM_SEARCH_HOME."""
    return given or os.environ.get("FREM_SEARCH_ARTIFACTS") or str(home() / "artifacts")


def masked(url: str) -> str:
    """Return a URL as it may be shown: without user and password.

    >>> masked("sftp://me:secret@example.org/frem"), masked("s3://bucket/a@b")
    ('sftp://***@example.org/frem', 's3://bucket/a@b')
    """
    return re.sub(r"://[^@/]*:.*@", "://***@", url)


class Artifacts:
    """The artifacts of one study.

    Args:
        url: A folder, or a URL such as `s3://bucket/prefix`.
        prefix: The study's folder in it.
    """

    def __init__(self, url: str, prefix: str) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            reason = masked(str(error).replace(url, masked(url)))
            message = (
                f"{masked(url)}: cannot be used for artifacts: {reason}. Give a folder, or install the fsspec driver."
            )
            raise ArtifactError(message) from None
        self._root = f"{root.rstrip('/')}/{prefix}"
        self._is_local = "file" in self._files.protocol

    def check(self) -> None:
        """Write, read and remove a file, so that a place that cannot be used is told before anything is trained.

        Raises:
            ArtifactError: It cannot be used.
        """
        name, content = f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        self.write(name, content)
        found = self.read(name)
        self.remove(name)
        if found != content:
            message = f"{self.url(name)}: what was written is not what is read. Set FREM_SEARCH_ARTIFACTS elsewhere."
            raise ArtifactError(message)

    def url(self, name: str) -> str:
        """Return where a file lies, for messages and other tools; without a password."""
        path = f"{self._root}/{name}"
        return path if self._is_local else masked(str(self._files.unstrip_protocol(path)))

    def write(self, name: str, content: bytes) -> None:
        """Store a file: a reader finds the whole of it, or what was there before.

        Raises:
            ArtifactError: It cannot be written, for example because the disk is full.
        """
        path = f"{self._root}/{name}"
        with self._told(name, f"written ({len(content)} bytes)"):
            if self._is_local:
                write_atomically(Path(path), content)
            else:
                self._files.pipe_file(path, content)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or nothing if there is no such file.

        Raises:
            ArtifactError: It is there and cannot be read.
        """
        with self._told(name, "read"), suppress(FileNotFoundError):
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        return None

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        with self._told(name, "removed"), suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def set_aside(self, name: str) -> None:
        """Keep a file that cannot be used under another name, so that it can be looked at."""
        with self._told(name, "renamed"):
            self._files.mv(f"{self._root}/{name}", f"{self._root}/{name}.unusable")

    def remove_all(self) -> None:
        """Remove everything of this study."""
        with self._told("", "removed"):
            if self._files.exists(self._root):
                self._files.rm(self._root, recursive=True)

    @contextmanager
    def _told(self, name: str, action: str) -> Iterator[None]:
        """Tell every failure by file and remedy; fsspec's drivers raise whatever their own libraries do."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            message = (
                f"{self.url(name)}: cannot be {action}: {masked(reason)}. Free space, mend the permissions or "
                "credentials, or set FREM_SEARCH_ARTIFACTS to another place, and run the same command again."
            )
            raise ArtifactError(message) from error
