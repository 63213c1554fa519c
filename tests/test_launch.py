"""Worker processes of `run --workers`: the budget is exact, the killed are replaced, nobody outlives the command."""

import json
import os
import signal
import time

import psutil
import pytest

from frem_search.errors import WorkerError
from frem_search.launch.local import devices_of, local_workers, share_of_cores
from frem_search.launch.team import MOST_DEATHS_IN_A_ROW
from frem_search.launch.watch import watch
from frem_search.processes import PARENT, has_lost_parent
from frem_search.record import read_record


@pytest.fixture
def study(tiny_study, home):
    """Four trials that take a few seconds each."""
    text = tiny_study.read_text()
    tiny_study.write_text(text.replace("n_trials = 3", "n_trials = 4").replace("n_epochs = 3", "n_epochs = 40"))
    return tiny_study


@pytest.fixture
def run(start_cli, study, storage_url):
    def run(*args, **settings):
        return start_cli("run", "--study", study, "--workers", 2, *args, FREM_SEARCH_STORAGE=storage_url, **settings)

    return run


def workers_of(process, *, n=2, timeout_s=60.0):
    """Return the worker processes that a command has started, once there are n."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = [each for each in psutil.Process(process.pid).children() if "worker" in each.cmdline()]
        if len(found) == n:
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"expected {n} workers")


def wait_for(condition, *, timeout_s=60.0):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def trials_of(storage):
    try:
        return read_record(storage, "tiny", has_curves=False).trials
    except Exception:  # noqa: BLE001 not begun yet
        return ()


def is_training(storage, *, n):
    return sum(trial.state == "running" for trial in trials_of(storage)) >= n


def test_workers_share_the_budget_and_a_killed_one_is_replaced(run, storage):
    command = run("--json", "--checkpoint-every", 0)
    victim = workers_of(command)[0]
    wait_for(lambda: is_training(storage, n=2))
    victim.send_signal(signal.SIGKILL)
    told, progress = command.communicate(timeout=120)
    assert command.returncode == 0, progress
    assert json.loads(told)["states"]["complete"] == 4
    trials = trials_of(storage)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert len({trial.worker for trial in trials}) >= 2
    assert "[4/4] trial" in progress


def test_a_password_reaches_the_workers_by_their_environment_alone(run):
    command = run()
    for worker in workers_of(command):
        shown = " ".join(worker.cmdline())
        assert "--study" in shown
        assert "postgres" not in shown
        assert int(worker.environ()[PARENT]) == command.pid
    command.terminate()
    command.communicate(timeout=60)


def test_a_stop_lets_the_workers_store_their_trials_and_leaves_none(run, storage):
    command = run()
    workers = workers_of(command)
    wait_for(lambda: is_training(storage, n=2))
    command.send_signal(signal.SIGINT)
    _, progress = command.communicate(timeout=60)
    assert command.returncode == 130, progress
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert {trial.state for trial in trials_of(storage)} <= {"waiting", "complete"}
    assert "waiting" in {trial.state for trial in trials_of(storage)}


def test_workers_leave_when_their_command_is_killed(run, storage):
    command = run()
    workers = workers_of(command)
    wait_for(lambda: is_training(storage, n=2))
    command.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert "running" not in {trial.state for trial in trials_of(storage)}


@pytest.fixture
def scripted(monkeypatch, storage, study, tmp_path):
    """Begin the study, and return what tells of workers that run a line of Python instead."""
    from frem_search.join import open_worker
    from frem_search.study_file import load_study_file

    with open_worker(load_study_file(str(study)), storage, device="cpu", artifacts=str(tmp_path / "artifacts")):
        pass
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nexec python3 -c "$SCRIPT"\n')
    program.chmod(0o755)
    monkeypatch.setattr("frem_search.launch.local.sys.executable", str(program))

    def events(script, *, n=1, is_stopping=lambda: False):
        team = local_workers(
            [], ["cpu"] * n, storage=storage, study="tiny", environment={"SCRIPT": script}, is_stopping=is_stopping
        )
        with team:
            yield from team.events()

    return events


def test_workers_that_are_killed_again_and_again_are_given_up(scripted):
    events = scripted("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(WorkerError, match=rf"{MOST_DEATHS_IN_A_ROW} workers were killed \(SIGKILL\)"):
        list(events)


def test_a_worker_that_ends_with_an_error_ends_all_with_its_words(scripted, tmp_path):
    mark = tmp_path / "stopped"
    script = f"""
import os, pathlib, signal, sys, time
mine = pathlib.Path({str(tmp_path / "first")!r})
try:
    mine.touch(exist_ok=False)
except FileExistsError:
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(130)))
    time.sleep(60)
time.sleep(1)
sys.exit('frem-search: the disk is full.')
"""
    with pytest.raises(WorkerError, match=r"a worker on cpu ended with status 1: the disk is full\."):
        list(scripted(script, n=2))
    assert mark.exists()


def test_devices_are_given_to_workers_in_turn():
    assert devices_of("cpu", 2) == ["cpu", "cpu"]
    assert devices_of("auto", None) == ["auto"]
    assert devices_of("cuda:0, cuda:1", None) == ["cuda:0", "cuda:1"]
    assert devices_of("cuda:0,cuda:1", 3) == ["cuda:0", "cuda:1", "cuda:0"]


def test_every_gpu_gets_a_worker(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of("auto", None) == ["cuda:0", "cuda:1"]
    assert devices_of("auto", 4) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_cores_are_shared_unless_somebody_has_said_otherwise(monkeypatch):
    monkeypatch.setattr("frem_search.launch.local.n_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [share_of_cores(n)["OMP_NUM_THREADS"] for n in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert share_of_cores(2) == {"OMP_NUM_THREADS": "5"}


def test_a_worker_knows_whether_its_parent_is_gone(monkeypatch):
    assert not has_lost_parent()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert not has_lost_parent()
    monkeypatch.setenv(PARENT, "1" if os.getppid() != 1 else "2")
    assert has_lost_parent()


def test_watching_tells_what_other_workers_do(storage, study, tmp_path, monkeypatch):
    """A worker makes one step between two looks at its database."""
    from frem_search.join import open_worker
    from frem_search.study_file import load_study_file

    monkeypatch.setattr("frem_search.launch.watch.POLL_S", 0)
    file = load_study_file(str(study), n_trials=2, n_epochs=3)
    with open_worker(file, storage, device="cpu", artifacts=str(tmp_path)) as (_, worker, _):
        steps = worker.work()
        events = list(watch(storage, "tiny", is_over=lambda: next(steps, None) is None))
    told = [(event.kind, event.number) for event in events if event.kind != "epoch"]
    assert told == [("claimed", 0), ("complete", 0), ("claimed", 1), ("complete", 1)]
    assert set(events[0].params) >= {"B", "X"}
