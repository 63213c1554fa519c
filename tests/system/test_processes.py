"""Processes: who still lives, as seen from the same machine, whatever the clock and the kernel's reuse of pids."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from frem_search.system.processes import is_gone, this_process


def test_this_process_lives():
    assert this_process().pid == os.getpid()
    assert not is_gone(this_process())


def test_a_process_that_ended_is_gone():
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert is_gone(replace(this_process(), pid=int(ended.stdout)))


def test_a_pid_that_another_process_has_now_is_not_the_one_that_was():
    assert is_gone(replace(this_process(), pid_started=this_process().pid_started - 1000))
    # Not the parent: what starts a test run may have begun in the same tick.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as another:
        assert is_gone(replace(this_process(), pid=another.pid))
        another.kill()


@pytest.mark.parametrize("other", [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}])
def test_of_another_machine_or_container_nothing_is_known(other):
    assert not is_gone(replace(this_process(), pid=2**22, **other))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere only the clock tells when a process began")
def test_setting_the_clock_kills_nobody(monkeypatch):
    before = this_process()
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)
    this_process.cache_clear()
    assert this_process() == before
    assert not is_gone(before)


def test_a_process_of_another_user_that_cannot_be_looked_at_is_not_gone(monkeypatch):
    def refuse(*_):
        raise PermissionError

    def hide(pid):
        raise psutil.NoSuchProcess(pid)

    unseen = replace(this_process(), pid=2**22 + 1)  # above the kernel's highest: nothing of it stands in /proc
    assert is_gone(unseen)
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(psutil, "Process", hide)
    assert not is_gone(unseen)
