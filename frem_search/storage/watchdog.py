"""Cuts connections to a server that does not answer: neither libpq nor the kernel gives up for many minutes.

`statement_timeout` is the server's own, and a frozen one does not keep it.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import psycopg2.extensions

ANSWER_S = 75.0  # longer than the server's own limits, which say what was wrong
LOOK_EVERY_S = 0.5

_answer_s = ContextVar("answer_s", default=ANSWER_S)


@contextmanager
def answers_within(seconds: float) -> Iterator[None]:
    """Give up each statement in this block to which there is no answer in time, as if the connection were lost."""
    before = _answer_s.set(seconds)
    try:
        yield
    finally:
        _answer_s.reset(before)


def patience() -> float:
    """Return for how many seconds an answer is waited for here."""
    return _answer_s.get()


class WatchedCursor(psycopg2.extensions.cursor):  # type: ignore[misc] # has no types
    """A cursor whose statements are watched."""

    def execute(self, query: Any, vars: Any = None) -> None:
        """Execute a statement."""
        with _watched(self.connection):
            super().execute(query, vars)


class WatchedConnection(psycopg2.extensions.connection):  # type: ignore[misc]
    """A connection that is cut when a statement has no answer in time."""

    def commit(self) -> None:
        """Commit the transaction."""
        with _watched(self):
            super().commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        with _watched(self):
            super().rollback()


class _Watchdog:
    """One thread that looks after all statements of this process."""

    def __init__(self) -> None:
        self._lock, self._waiting = threading.Lock(), dict[int, tuple[float, psycopg2.extensions.connection]]()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watched(self, connection: psycopg2.extensions.connection) -> Iterator[None]:
        with self._lock:
            self._waiting[id(connection)] = time.monotonic() + _answer_s.get(), connection
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(id(connection), None)

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            with self._lock:  # so long no statement returns, and its socket is the one that it was sent by
                for answer_by, connection in self._waiting.values():
                    if now > answer_by:
                        _cut(connection)


def _cut(connection: psycopg2.extensions.connection) -> None:
    with suppress(psycopg2.Error, OSError):
        copy = socket.socket(fileno=os.dup(connection.fileno()))
        with copy:
            copy.shutdown(socket.SHUT_RDWR)


_watched = _Watchdog().watched
