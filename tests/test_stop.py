"""Signals: the first asks for an end, the second is one, and what was before comes back."""

import os
import signal

import pytest

from frem_search.stop import interrupt_on_sigterm, stop_on_signals


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(capsys, number):
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        told = f"\n{number.name}: stopping after this epoch; once more to stop at once. No trial is lost.\n"
        assert capsys.readouterr().err == told
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_the_signals_mean_what_they_did(handlers):
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_sigterm_ends_a_command_as_ctrl_c_does():
    interrupt_on_sigterm()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
