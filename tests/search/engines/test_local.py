"""Worker processes of `run --workers`: the budget is exact, the killed are replaced, nobody outlives the command."""

import json
import os
import signal
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import psutil
import pytest

from frem_search.bench.speed import Arrangement
from frem_search.cli import engines
from frem_search.cli.engines import Asked
from frem_search.errors import UsageError, WorkerError
from frem_search.search.engines.local import alone_on, devices_of, local_workers, share_of_cores
from frem_search.search.engines.team import MOST_DEATHS
from frem_search.search.engines.watch import watch
from frem_search.storage.database import open_storage
from frem_search.study.record import read_record
from frem_search.system.device import visible_gpus
from frem_search.system.processes import PARENT, has_lost_parent


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
    from frem_search.search.begin import open_worker
    from frem_search.study.file import load_study_file

    with open_worker(load_study_file(str(study)), storage, device="cpu", artifacts=str(tmp_path / "artifacts")):
        pass
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nexec python3 -c "$SCRIPT"\n')
    program.chmod(0o755)
    monkeypatch.setattr("frem_search.search.engines.local.sys.executable", str(program))
    monkeypatch.setattr("frem_search.search.engines.team.PAUSE_S", 0)

    def events(script, *, n=1, is_stopping=lambda: False):
        team = local_workers(
            [], ["cpu"] * n, storage=storage, study="tiny", environment={"SCRIPT": script}, is_stopping=is_stopping
        )
        with team:
            yield from team.events(team.begun())

    return events


def test_workers_that_are_killed_again_and_again_are_given_up(scripted):
    events = scripted("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(WorkerError, match=rf"{MOST_DEATHS} workers on cpu were killed \(SIGKILL\)"):
        list(events)


def test_the_last_words_of_a_worker_are_told(scripted):
    with pytest.raises(WorkerError, match=r"a worker on cpu ended with status 1: the disk is full\."):
        list(scripted("import sys; print('more', file=sys.stderr); sys.exit('frem-search: the disk is full.')"))


def test_a_worker_that_heeds_no_signal_is_killed_by_a_second_interrupt(scripted, monkeypatch, tmp_path):
    monkeypatch.setattr("frem_search.search.engines.team.KILL_AFTER_S", 0.5)
    mark = tmp_path / "pid"
    script = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""

    def interrupt():
        if mark.exists() and mark.read_text():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        list(scripted(script, is_stopping=interrupt))
    assert not psutil.pid_exists(int(mark.read_text()))


def test_an_outage_of_the_database_is_no_news(start_cli, study, tcp_server, tcp_database):
    url = tcp_server.url(database=tcp_database)
    command = start_cli("run", "--study", study, "--workers", 2, "--json", FREM_SEARCH_STORAGE=url)
    with open_storage(url) as opened:
        wait_for(lambda: is_training(opened, n=2))
    tcp_server.restart(away_s=4.0)
    told, progress = command.communicate(timeout=120)
    assert command.returncode == 0, progress
    assert json.loads(told)["states"]["complete"] == 4
    assert "[4/4] trial" in progress


def test_devices_are_given_to_workers_in_turn():
    assert devices_of("cpu", 2) == ["cpu", "cpu"]
    assert devices_of("auto", None) == ["auto"]
    assert devices_of("cuda:0, cuda:1", None) == ["cuda:0", "cuda:1"]
    assert devices_of("cuda:0,cuda:1", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(
        UsageError, match=r"--device: expected at most one for each of --workers 2, but got cpu, cpu, cpu"
    ):
        devices_of("cpu,cpu,cpu", 2)


def test_every_gpu_gets_a_worker(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of("auto", None) == ["cuda:0", "cuda:1"]
    assert devices_of("auto", 4) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert devices_of("auto", 1) == ["cuda:0"]


@pytest.mark.parametrize(
    ("visible", "n_seen", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("3,1", 2, ["3", "1"]),
        ("0,1,9,2", 2, ["0", "1"]),  # CUDA sees none behind a number that there is not
        ("GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
        ("MIG-aa, MIG-bb", 1, ["MIG-aa", "MIG-bb"]),  # and of parts only one
        ("MIG-aa", 0, []),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(monkeypatch, visible, n_seen, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected
    assert len(devices_of("auto", None)) == max(1, len(expected))
    for i, name in enumerate(expected):
        assert alone_on(f"cuda:{i}") == ("cuda:0", {"CUDA_VISIBLE_DEVICES": name})
    assert alone_on(f"cuda:{len(expected)}") == (f"cuda:{len(expected)}", {})  # which the worker refuses
    assert [alone_on(device) for device in ("cpu", "auto", "cuda")] == [("cpu", {}), ("auto", {}), ("cuda", {})]


@pytest.mark.parametrize(
    ("devices", "measured", "n"),
    [(["cuda:0", "cuda:1"], 1, 2), (["cuda:0", "cuda:0", "cuda:1"], 2, 3), (["cpu"] * 3, 3, 3), (["auto"], None, 1)],
)
def test_several_processes_are_measured_on_one_device_as_they_share_it(monkeypatch, storage, devices, measured, n):
    seen = {}

    @contextmanager
    def open_worker(*_, **settings):
        seen.update(settings)
        yield None, SimpleNamespace(work=lambda: (each for each in ())), Arrangement(settings["workers"] or 1)

    monkeypatch.setattr(engines, "open_worker", open_worker)
    monkeypatch.setattr("frem_search.study.record.read_record", lambda *_, **__: SimpleNamespace(n_trials=1))
    monkeypatch.setattr("frem_search.cli.progress.show_progress", lambda *_: None)
    file = SimpleNamespace(name="tiny")
    asked = Asked(file, {"n_trials": None}, None, None, "", None, None, "auto", 60.0)
    assert engines._search_alone(asked, storage, devices, is_stopping=lambda: False) == n
    assert (seen["workers"], seen["device"]) == (measured, devices[0])


def test_cores_are_shared_unless_somebody_has_said_otherwise(monkeypatch):
    monkeypatch.setattr("frem_search.search.engines.local.n_cores", lambda: 8)
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
    from frem_search.search.begin import open_worker
    from frem_search.study.file import load_study_file

    monkeypatch.setattr("frem_search.search.engines.watch.POLL_S", 0)
    file = load_study_file(str(study), n_trials=2, n_epochs=3)
    with open_worker(file, storage, device="cpu", artifacts=str(tmp_path)) as (_, worker, _):
        steps = worker.work()
        events = list(
            watch(storage, "tiny", since=read_record(storage, "tiny"), is_over=lambda: next(steps, None) is None)
        )
    told = [(event.kind, event.number) for event in events if event.kind != "epoch"]
    assert told == [("claimed", 0), ("complete", 0), ("claimed", 1), ("complete", 1)]
    assert set(events[0].params) >= {"B", "X"}


@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_trial_that_begins_and_ends_between_two_looks_is_told(storage, study, tmp_path, monkeypatch, is_resumed):
    from frem_search.search.begin import open_worker
    from frem_search.study.file import load_study_file

    monkeypatch.setattr("frem_search.search.engines.watch.POLL_S", 0)
    file = load_study_file(str(study), n_trials=1, n_epochs=3)
    with open_worker(file, storage, device="cpu", artifacts=str(tmp_path)) as (opened, worker, _):
        if is_resumed:
            with closing(worker.work()) as events:
                assert next(events).kind == "claimed"
        else:
            opened.optuna.enqueue_trial({"B": 3, "X": 2.0})
        since = read_record(storage, "tiny")
        assert [trial.state for trial in since.trials] == ["waiting" if is_resumed else "enqueued"]
        looks = iter([lambda: list(worker.work()), lambda: None])
        events = list(watch(storage, "tiny", since=since, is_over=lambda: next(looks)() is None))
    assert [event.kind for event in events] == ["adopted" if is_resumed else "claimed", "complete"]
    assert set(events[0].params) >= {"B", "X"}
