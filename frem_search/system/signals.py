"""Ctrl-C, SIGTERM and SIGHUP: the first asks to stop at the next good moment, the second stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether the user or the scheduler asked for an end; called, it says so."""

    def __init__(self) -> None:
        self._is_requested = False

    def __call__(self) -> bool:
        """Return whether an end was asked for."""
        return self._is_requested

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 a signal handler's arguments
        """Note the first signal; raise KeyboardInterrupt at the second."""
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        name = signal.Signals(number).name
        told = f"\n{name}: stopping after this epoch; once more to stop at once. No trial is lost.\n"
        _tell(told.encode())


def _tell(message: bytes) -> None:
    # Not sys.stderr: a signal may come while that is being written to, and a buffer refuses to be entered twice.
    try:
        os.write(2, message)
    except OSError:
        # The terminal has gone with its session; what is shown during the last epoch must not fail on it.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123 no path
            os.dup2(nowhere.fileno(), 2)


def _handled() -> list[signal.Signals]:
    # nohup ignores SIGHUP so that a command outlives its session.
    return [n for n in STOP_SIGNALS if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle Ctrl-C, SIGTERM and SIGHUP by a `StopRequest` as long as the block runs."""
    stop = StopRequest()
    before = {number: signal.signal(number, stop.handle) for number in _handled()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up: no database is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 a signal handler's arguments
        raise KeyboardInterrupt

    for number in _handled():
        if number != signal.SIGINT:
            signal.signal(number, interrupt)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let signals wait until the block has ended, however it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for came_number in came:
            signal.raise_signal(came_number)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore signals as long as the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
