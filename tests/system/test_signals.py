"""Signals: the first asks for an end, the second is one, and what was before comes back."""

import os
import signal

import pytest

from frem_search.system.signals import STOP_SIGNALS, interrupt_on_signals, stop_on_signals


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_asks_and_the_second_interrupts(capfd, number):
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        told = f"\n{number.name}: stopping after this epoch; once more to stop at once. No trial is lost.\n"
        assert capfd.readouterr().err == told
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_the_signals_mean_what_they_did(handlers):
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_command_as_ctrl_c_does(number):
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_under_nohup_a_closed_session_changes_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt_on_signals()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop()


def test_a_terminal_that_has_gone_does_not_end_the_last_epoch():
    kept = os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 2)
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop()
            assert os.write(2, b"progress") == 8
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)
