"""Checkpoints, weights and predictions of trials under one URL: a folder, or any storage that fsspec knows."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from frem_search.errors import ArtifactError
from frem_search.system.files import write_atomically
from frem_search.system.home import home

SET_ASIDE = ".unusable"


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
        self._root = f"{root.rstrip('/')}/{prefix}".rstrip("/")
        self._is_local = "file" in self._files.protocol

    def check(self) -> None:
        """Write, read and remove a file, so that a place that cannot be used is told before anything is trained.

        Raises:
            ArtifactError: It cannot be used.
        """
        path, content = self._path(f"probe-{uuid.uuid4().hex}"), uuid.uuid4().bytes
        # Each is told of the folder: nobody knows the file.
        with self._told("", "written"):
            self._write(path, content)
        with self._told("", "read"):
            found = self._files.cat_file(path)
        with self._told("", "cleared of a file"):
            self._files.rm_file(path)
        if found != content:
            message = f"{self._label('')}: what was written is not what is read. Set FREM_SEARCH_ARTIFACTS elsewhere."
            raise ArtifactError(message)

    def url(self, name: str) -> str:
        """Return where a file lies, for messages and other tools; without a password."""
        path = self._path(name)
        return path if self._is_local else masked(str(self._files.unstrip_protocol(path)))

    def write(self, name: str, content: bytes) -> None:
        """Store a file: a reader finds the whole of it, or what was there before.

        Raises:
            ArtifactError: It cannot be written, for example because the disk is full.
        """
        with self._told(name, f"written ({len(content)} bytes)"):
            self._write(self._path(name), content)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or nothing if there is no such file.

        Raises:
            ArtifactError: It is there and cannot be read.
        """
        with self._told(name, "read"), suppress(FileNotFoundError):
            return bytes(self._files.cat_file(self._path(name)))
        return None

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        with self._told(name, "removed"), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def set_aside(self, name: str) -> str:
        """Keep a file that cannot be used under another name, so that it can be looked at; return where."""
        with self._told(name, "renamed"):
            self._files.mv(self._path(name), self._path(name + SET_ASIDE))
        return self.url(name + SET_ASIDE)

    def names(self) -> list[str]:
        """Return the names of all files, from one look at the whole folder.

        Raises:
            ArtifactError: The storage does not list its files.
        """
        with self._told("", "listed"):
            self._files.invalidate_cache()  # other workers write too
            paths = self._files.find(self._root)
        return [path.removeprefix(f"{self._root}/") for path in paths]

    def remove_all(self) -> bool:
        """Remove everything of this study; return whether there was anything."""
        with self._told("", "removed"):
            is_there = bool(self._files.exists(self._root))
            if is_there:
                self._files.rm(self._root, recursive=True)
            return is_there

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _label(self, name: str) -> str:
        return self.url(name).rstrip("/")

    def _write(self, path: str, content: bytes) -> None:
        if self._is_local:
            write_atomically(Path(path), content)
        else:
            self._files.pipe_file(path, content)

    @contextmanager
    def _told(self, name: str, action: str) -> Iterator[None]:
        """Tell every failure by file and remedy; fsspec's drivers raise whatever their own libraries do."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            message = (
                f"{self._label(name)}: cannot be {action}: {masked(reason)}. Free space, mend the permissions or "
                "credentials, or set FREM_SEARCH_ARTIFACTS to another place, and run the same command again."
            )
            raise ArtifactError(message) from error
