"""Ctrl-C and SIGTERM: the first asks to stop at the next good moment, the second stops at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
        sys.stderr.write(f"\n{name}: stopping after this epoch; once more to stop at once. No trial is lost.\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handle Ctrl-C and SIGTERM by a `StopRequest` as long as the block runs."""
    stop = StopRequest()
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does, so that it cleans up: an embedded database is not left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 a signal handler's arguments
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
