"""Workers on a Ray cluster of real nodes: a lost node, a lost driver, a stop; and what is asked of a cluster."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from places import REPOSITORY

from frem_search.errors import DeviceError, StudyNotFoundError, UsageError
from frem_search.search.engines.nodes import Node, Plan, plan
from frem_search.search.engines.ray import check_storage
from frem_search.study.record import read_record
from frem_search.system.device import find_device

SMALL = {"num_cpus": 1, "object_store_memory": 80_000_000}
PASSWORD = "hush-8d1f"
OPEN = {"RAY_AUTH_MODE": "disabled"}  # the cluster is made in this process, which may have imported Ray before
# Without one, Ray would leave a token in the user's own folder.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
# Ray itself warns and leaves sockets to the collector; what is tested runs in processes of its own.
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("default")]


def short_folder():
    """A folder whose path leaves room for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (folder / "ray").mkdir()  # where Ray notes the address of a cluster
    return folder


@pytest.fixture(scope="module")
def cluster():
    """Three nodes on this machine, each lending one CPU."""
    pytest.importorskip("ray", reason="The extra ray is not installed.")
    from ray.cluster_utils import Cluster

    folder = short_folder()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("FREM_SEARCH_", "PG", "RAY_"))]:
                patch.delenv(name)
            for name, value in OPEN.items():
                patch.setenv(name, value)
            patch.setenv("RAY_TMPDIR", str(folder))
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("PYTHONPATH", str(REPOSITORY))
            made = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
            made.folder = folder
            for _ in range(2):
                made.add_node(**SMALL)
        yield made
        made.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(cluster, start_cli, tiny_study, storage_url):
    url = storage_url.replace("postgres@", f"postgres:{PASSWORD}@")
    settings = {"RAY_ADDRESS": cluster.address, "RAY_TMPDIR": cluster.folder, "FREM_SEARCH_STORAGE": url, **OPEN}
    options = ("--n-trials", 4, "--engine", "ray", "--workers", 2, "--device", "cpu", "--checkpoint-every", 0)
    return lambda *args, epochs: start_cli(
        "run", "--study", tiny_study, "--n-epochs", epochs, *options, *args, **settings
    )


def workers_of(raylets, command, *, n=2, timeout_s=60.0):
    """The worker processes on nodes, once there are n, each with its node's number."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = {}
        for number, raylet in enumerate(raylets):
            for process in raylet.children(recursive=True) if raylet.is_running() else []:
                try:
                    if process.cmdline()[1:4] == ["-m", "frem_search", "worker"]:
                        found[process] = number
                except psutil.Error:
                    pass
        if len(found) == n:
            return found
        assert command.poll() is None, command.communicate()
        time.sleep(0.1)
    raise AssertionError(f"expected {n} workers")


def raylets_of(cluster):
    nodes = [cluster.head_node, *sorted(cluster.worker_nodes, key=lambda node: node.unique_id)]
    return [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]


def trials_of(storage):
    try:
        return read_record(storage, "tiny", has_curves=False).trials
    except StudyNotFoundError:
        return ()


def wait_until_training(storage, command, *, n=2):
    until = time.monotonic() + 60
    while sum(trial.state == "running" for trial in trials_of(storage)) < n:
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_trial_of_a_lost_node_is_adopted_and_its_worker_started_elsewhere(run, cluster, storage):
    raylets = raylets_of(cluster)
    command = run("--json", epochs=120)
    workers = workers_of(raylets, command)
    wait_until_training(storage, command)
    lost = next(number for number in workers.values() if number > 0)  # the head is the cluster itself
    victim = next(
        node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylets[lost].pid
    )
    cluster.remove_node(victim, allow_graceful=False)
    again = workers_of([each for each in raylets if each.pid != raylets[lost].pid], command)
    assert len(set(again) - set(workers)) == 1
    told, progress = command.communicate(timeout=120)
    assert command.returncode == 0, progress
    assert json.loads(told)["states"]["complete"] == 4
    assert [trial.number for trial in trials_of(storage)] == [0, 1, 2, 3]
    assert "[4/4] trial" in progress
    cluster.add_node(**SMALL)


def test_a_stop_lets_the_workers_store_their_trials_and_no_password_is_seen(run, cluster, storage):
    command = run(epochs=5000)
    workers = workers_of(raylets_of(cluster), command)
    wait_until_training(storage, command)
    assert all(PASSWORD not in " ".join(worker.cmdline()) for worker in workers)
    command.terminate()
    _, progress = command.communicate(timeout=60)
    assert command.returncode == 130, progress
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert {trial.state for trial in trials_of(storage)} == {"waiting"}
    files = [path for path in (cluster.folder / "ray").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []


def test_workers_store_their_trials_when_their_command_is_killed(run, cluster, storage):
    command = run(epochs=5000)
    workers = workers_of(raylets_of(cluster), command)
    wait_until_training(storage, command)
    command.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    trials = trials_of(storage)
    assert {trial.state for trial in trials} == {"waiting"}
    assert {trial.reason for trial in trials} == {"stopped"}


def test_without_a_cluster_one_of_this_machine_is_started_and_ended(start_cli, tiny_study):
    pytest.importorskip("ray", reason="The extra ray is not installed.")
    folder = short_folder()
    options = ("--engine", "ray", "--device", "cpu", "--json")
    command = start_cli("run", "--study", tiny_study, *options, RAY_TMPDIR=folder, **TOKEN)
    told, progress = command.communicate(timeout=120)
    assert command.returncode == 0, progress
    assert json.loads(told)["states"]["complete"] == 3
    left = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or ())]
    assert psutil.wait_procs(left, timeout=10)[1] == []
    shutil.rmtree(folder, ignore_errors=True)


SEE_GPUS = """
import json, sys, ray
from frem_search.search.engines.ray_actor import Runner
ray.init(address="auto", log_to_driver=False)
actors = [ray.remote(Runner).options(num_gpus=0.5, num_cpus=0).remote() for _ in range(4)]
print(json.dumps(ray.get([actor.place.remote() for actor in actors])))
"""


def test_actors_see_their_part_of_a_divided_gpu_alone(cluster, monkeypatch):
    """Ray counts MIG slices as GPUs and names them by what CUDA_VISIBLE_DEVICES names them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1111,MIG-2222")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RAY_TMPDIR", str(cluster.folder))
    node = cluster.add_node(num_cpus=0, num_gpus=2, object_store_memory=SMALL["object_store_memory"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen = subprocess.run(
        [sys.executable, "-c", SEE_GPUS],
        env=os.environ | OPEN | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    cluster.remove_node(node, allow_graceful=False)
    assert seen.returncode == 0, seen.stderr
    gpus = sorted(place.split("GPU ")[1] for place in json.loads(seen.stdout))
    assert gpus == ["MIG-1111", "MIG-1111", "MIG-2222", "MIG-2222"]


@pytest.mark.parametrize("visible", ["MIG-1111", "GPU-2222", "3"])
def test_the_first_visible_gpu_is_cuda_0_whatever_it_is_called(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    assert str(find_device(Plan(1, 1, 0.5).device)) == "cuda:0"
    with pytest.raises(DeviceError, match=r"--device cuda:3: this machine has 1 CUDA device"):
        find_device("cuda:3")


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([Node("a", 8, 2), Node("b", 8, 1)], {}, Plan(3, 1, 1.0)),
        ([Node("a", 8, 2), Node("b", 8, 1)], {"gpus_per_worker": 0.5}, Plan(6, 1, 0.5)),
        ([Node("a", 8, 2)], {"gpus_per_worker": 0.75}, Plan(2, 1, 0.75)),
        ([Node("a", 8, 2)], {"device": "cpu"}, Plan(1, 8, 0.0)),
        ([Node("a", 8), Node("b", 4)], {}, Plan(2, 4, 0.0)),
        ([Node("a", 8), Node("b", 4)], {"workers": 5}, Plan(5, 2, 0.0)),
        ([Node("a", 1)], {"workers": 3}, Plan(3, 1, 0.0)),
        ([Node("a", 4)], {"workers": 3, "device": "cuda"}, Plan(3, 1, 1.0)),
    ],
)
def test_a_cluster_is_asked_for_what_it_has_or_for_what_is_wanted(nodes, settings, expected):
    assert plan(nodes, **{"device": "auto", "workers": None, "gpus_per_worker": None} | settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:1"}, r"--device: with --engine ray expected auto, cpu or cuda, .* but got 'cuda:1'"),
        ({"gpus_per_worker": 0.0}, r"--gpus-per-worker: expected more than 0 and at most 1, but got 0"),
        ({"gpus_per_worker": 2.0}, r"--gpus-per-worker: expected more than 0 and at most 1, but got 2"),
        ({"device": "cuda"}, r"the cluster has no GPU to lend now\. Give --workers N"),
    ],
)
def test_what_a_cluster_cannot_be_asked_for_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        plan([Node("a", 4)], **{"device": "auto", "workers": None, "gpus_per_worker": None} | settings)


def test_the_embedded_database_is_refused_to_other_machines():
    ray = pytest.importorskip("ray", reason="The extra ray is not installed.")
    here = ray.util.get_node_ip_address()
    check_storage([Node(here, 1), Node(here, 1)], None)
    with pytest.raises(UsageError, match=r"has 203\.0\.113\.7 too\. Set FREM_SEARCH_STORAGE to a PostgreSQL"):
        check_storage([Node(here, 1), Node("203.0.113.7", 1)], None)


def test_a_password_travels_to_other_machines_by_tls_alone(monkeypatch):
    ray = pytest.importorskip("ray", reason="The extra ray is not installed.")
    here, elsewhere = Node(ray.util.get_node_ip_address(), 1), Node("203.0.113.7", 1)
    without, url = "postgresql://me@db/frem", "postgresql://me:secret@db/frem"
    check_storage([here], url)
    check_storage([here, elsewhere], without)
    with pytest.raises(UsageError, match=r"would travel to 203\.0\.113\.7 for everybody") as told:
        check_storage([here, elsewhere], url)
    assert "secret" not in str(told.value)
    monkeypatch.setenv("PGPASSWORD", "secret")
    with pytest.raises(UsageError, match="FREM_SEARCH_PASSWORD_FILE or PGPASSFILE"):
        check_storage([here, elsewhere], without)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_storage([here, elsewhere], url)
