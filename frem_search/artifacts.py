"""Checkpoints, weights and predictions of trials under one URL: a folder, or any storage that fsspec knows."""

import os
from pathlib import Path

import fsspec

from frem_search.errors import ArtifactError
from frem_search.files import write_atomically
from frem_search.home import home


def artifacts_url(given: str | None = None) -> str:
    """Return the URL asked for, by option or FREM_SEARCH_ARTIFACTS, or a folder under FREM_SEARCH_HOME."""
    return given or os.environ.get("FREM_SEARCH_ARTIFACTS") or str(home() / "artifacts")


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
            message = f"{url}: cannot be used for artifacts: {error}. Give a folder, or install the fsspec driver."
            raise ArtifactError(message) from None
        self._root = f"{root.rstrip('/')}/{prefix}"
        self._is_local = "file" in self._files.protocol

    def url(self, name: str) -> str:
        """Return where a file lies, for messages and other tools."""
        return (
            str(self._files.unstrip_protocol(f"{self._root}/{name}")) if not self._is_local else f"{self._root}/{name}"
        )

    def write(self, name: str, content: bytes) -> None:
        """Store a file: a reader finds the whole of it, or what was there before.

        Raises:
            ArtifactError: It cannot be written, for example because the disk is full.
        """
        path = f"{self._root}/{name}"
        try:
            if self._is_local:
                write_atomically(Path(path), content)
            else:
                self._files.pipe_file(path, content)
        except OSError as error:
            reason = error.strerror or str(error)
            message = (
                f"{self.url(name)}: cannot be written ({len(content)} bytes): {reason}. "
                "Free space, or set FREM_SEARCH_ARTIFACTS to another folder, and run the same command again."
            )
            raise ArtifactError(message) from None

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or nothing if there is no such file.

        Raises:
            ArtifactError: It is there and cannot be read.
        """
        try:
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None
        except OSError as error:
            message = f"{self.url(name)}: cannot be read: {error.strerror or error}."
            raise ArtifactError(message) from None

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        try:
            self._files.rm_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return
        except OSError as error:
            message = f"{self.url(name)}: cannot be removed: {error.strerror or error}."
            raise ArtifactError(message) from None

    def set_aside(self, name: str) -> None:
        """Keep a file that cannot be used under another name, so that it can be looked at."""
        self._files.mv(f"{self._root}/{name}", f"{self._root}/{name}.unusable")

    def remove_all(self) -> None:
        """Remove everything of this study."""
        if self._files.exists(self._root):
            self._files.rm(self._root, recursive=True)
