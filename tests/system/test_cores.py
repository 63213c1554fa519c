"""Cores of a container: a share of processor time counts as that many cores, wherever the limit stands."""

import os

import pytest
import torch

from frem_search.system import cores as cgroup
from frem_search.system.cores import let_waiting_threads_sleep, n_cores
from frem_search.training.side_by_side import layouts as layouts_module
from frem_search.training.side_by_side.layouts import use_cores


@pytest.fixture
def limited(tmp_path, monkeypatch):
    """What writes a stand-in for /proc/self/cgroup and /sys/fs/cgroup, on a machine of eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "root")

    def write(own, files):
        (tmp_path / "own").write_text(own + "\n")
        for name, text in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return write


PERIOD = {"cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2),  # a container with a namespace of its own
        ("0::/system.slice/docker-1f.scope", {"cpu.max": "50000 10000"}, 5),  # and without one
        ("0::/a.slice/b", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "max 100000"}, 3),
        ("0::/a.slice/b", {"a.slice/cpu.max": "300000 100000", "a.slice/b/cpu.max": "400000 100000"}, 3),
        ("0::/a.slice/b", {"a.slice/c/cpu.max": "100000 100000"}, 8),  # another's
        ("0::/", {"cpu.max": "250000 100000"}, 2),  # a third thread would stand still half of the time
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("4:cpu,cpuacct:/\n3:memory:/docker", {"cpu/cpu.cfs_quota_us": "-1"} | PERIOD, 8),
        ("4:cpu,cpuacct:/docker/1f\n0::/", {"cpu/cpu.cfs_quota_us": "300000"} | PERIOD, 3),
        ("4:cpuset:/docker/1f", {"cpu/cpu.cfs_quota_us": "300000"} | PERIOD, 8),
        ("0::/", {}, 8),
    ],
)
def test_a_limit_of_processor_time_counts_as_cores(limited, own, files, expected):
    limited(own, files)
    assert n_cores() == expected


def test_without_control_groups_all_cores_count(limited):
    assert n_cores() == 8


def test_kernels_of_a_limited_container_take_no_more_threads(limited, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    limited("0::/", {"cpu.max": "max 100000"})
    use_cores(layouts_module.ALONE)
    assert taken == []
    limited("0::/", {"cpu.max": "200000 100000"})
    use_cores(layouts_module.ALONE)
    assert taken == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "6")  # said by somebody
    use_cores(layouts_module.ALONE)
    assert taken == [2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_waiting_threads_sleep_soon_unless_something_is_set(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
