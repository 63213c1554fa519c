"""Artifacts: whole or not at all, on a folder and on a storage that is none, and told when the disk is full."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from frem_search.errors import ArtifactError
from frem_search.storage.artifacts import Artifacts, artifacts_url
from frem_search.system.files import is_temporary


@pytest.fixture(params=["folder", "memory"])
def artifacts(request, tmp_path):
    made = Artifacts(str(tmp_path / "artifacts") if request.param == "folder" else f"memory://{tmp_path}", "study-1")
    yield made
    made.remove_all()


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(artifacts):
    assert artifacts.read("0/weights.pt") is None
    for content in (b"first", b"", b"second" * 1000):
        artifacts.write("0/weights.pt", content)
        assert artifacts.read("0/weights.pt") == content


def test_removing_is_idempotent(artifacts):
    artifacts.write("0/weights.pt", b"1")
    artifacts.remove("0/weights.pt")
    artifacts.remove("0/weights.pt")
    artifacts.remove("9/never.pt")
    assert artifacts.read("0/weights.pt") is None


def test_what_is_set_aside_can_be_looked_at(artifacts):
    for content in (b"torn", b"torn again"):
        artifacts.write("0/checkpoint.pt", content)
        assert artifacts.set_aside("0/checkpoint.pt") == artifacts.url("0/checkpoint.pt.unusable")
        assert artifacts.read("0/checkpoint.pt") is None
        assert artifacts.read("0/checkpoint.pt.unusable") == content


def test_all_files_of_a_study_are_listed_by_name(artifacts):
    assert artifacts.names() == []
    names = ["0/weights.pt", "12/fold1/.weights.pt.0", "notes"]
    for name in names:
        artifacts.write(name, b"1")
    assert sorted(artifacts.names()) == names
    assert [artifacts.read(name) for name in artifacts.names()] == [b"1"] * 3


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path):
    Artifacts(str(tmp_path / "new"), "").check()
    assert files_under(tmp_path) == []
    Artifacts("memory://looked-at", "").check()
    assert Artifacts("memory://looked-at", "").names() == []


@pytest.mark.parametrize(
    ("fails", "says"), [("pipe_file", "written"), ("cat_file", "read"), ("rm_file", "cleared of a file")]
)
def test_a_place_that_cannot_be_used_is_told_by_its_own_name(monkeypatch, fails, says):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    artifacts = Artifacts("memory://bucket/prefix", "")
    monkeypatch.setattr(artifacts._files, fails, refuse)
    with pytest.raises(ArtifactError) as raised:
        artifacts.check()
    assert str(raised.value).startswith(f"memory:///bucket/prefix: cannot be {says}: Permission denied. Free space,")
    monkeypatch.undo()
    artifacts.remove_all()


def test_a_folder_below_a_file_is_told_by_its_own_name(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=rf"^{tmp_path}/file/artifacts: cannot be written: Not a directory\. "):
        Artifacts(f"{tmp_path}/file/artifacts/", "").check()


def test_a_place_that_gives_back_something_else_is_told(monkeypatch):
    artifacts = Artifacts("memory://bucket/prefix", "")
    monkeypatch.setattr(artifacts._files, "cat_file", lambda _: b"another")
    with pytest.raises(ArtifactError, match=r"^memory:///bucket/prefix: what was written is not what is read\. Set "):
        artifacts.check()


def test_removing_a_study_leaves_the_others(tmp_path):
    for url in (str(tmp_path / "artifacts"), f"memory://{tmp_path}"):
        first, second = Artifacts(url, "study-1"), Artifacts(url, "study-2")
        first.write("0/weights.pt", b"1")
        second.write("0/weights.pt", b"2")
        assert first.remove_all()
        assert not first.remove_all()
        assert first.read("0/weights.pt") is None
        assert second.read("0/weights.pt") == b"2"


def test_the_url_says_where_a_file_lies(tmp_path):
    assert Artifacts(str(tmp_path), "s").url("0/a") == f"{tmp_path}/s/0/a"
    assert Artifacts(str(tmp_path), "").url("a") == f"{tmp_path}/a"
    assert Artifacts("memory://bucket/", "s").url("0/a") == "memory:///bucket/s/0/a"


def test_which_url_is_used(home, monkeypatch):
    assert artifacts_url() == f"{home}/artifacts"
    monkeypatch.setenv("FREM_SEARCH_ARTIFACTS", "memory://x")
    assert artifacts_url() == "memory://x"
    assert artifacts_url("given") == "given"


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ArtifactError, match="nothing://x: cannot be used for artifacts"):
        Artifacts("nothing://x", "s")


def test_files_are_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        Artifacts(str(tmp_path), "s").write("0/a", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s/0/a").stat().st_mode) == 0o644


def test_a_reader_finds_the_old_or_the_new_never_a_part(tmp_path):
    artifacts = Artifacts(str(tmp_path), "s")
    contents = [bytes([i]) * 300_000 for i in range(2)]
    artifacts.write("0/a", contents[0])
    is_over = threading.Event()

    def write():
        while not is_over.is_set():
            for content in contents:
                artifacts.write("0/a", content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {artifacts.read("0/a") for _ in range(300)}
    finally:
        is_over.set()
        writer.join()
    assert seen <= set(contents)


WRITE = """
import sys
from frem_search.storage.artifacts import Artifacts
artifacts = Artifacts(sys.argv[1], "s")
content = b"new" * 1_000_000
print("ready", flush=True)
while True:
    artifacts.write("0/a", content)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    artifacts = Artifacts(str(tmp_path), "s")
    for delay_s in (0.0, 0.003, 0.01, 0.02):
        artifacts.write("0/a", b"old")
        writer = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert artifacts.read("0/a") in (b"old", b"new" * 1_000_000)
    left = [name for name in artifacts.names() if name != "0/a"]
    assert left, "the test needs a writer that is killed while it writes"
    assert all(map(is_temporary, left))


FILL = """
import resource, signal, sys
from frem_search.storage.artifacts import Artifacts
from frem_search.errors import ArtifactError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
artifacts = Artifacts(sys.argv[1], "s")
artifacts.write("0/a", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    artifacts.write("0/a", b"x" * 200_000)
except ArtifactError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path):
    told = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith(f"{tmp_path}/s/0/a: cannot be written (200000 bytes): File too large. Free space, ")
    assert files_under(tmp_path) == ["s/0/a"]
    assert (tmp_path / "s/0/a").read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_leaves_the_old_file(small_disk):
    artifacts = Artifacts(str(small_disk), "s")
    artifacts.write("0/a", b"old")
    with pytest.raises(ArtifactError, match=r"0/a: cannot be written \(1000000 bytes\): No space left on device"):
        artifacts.write("0/a", b"x" * 1_000_000)
    assert files_under(small_disk) == ["s/0/a"]
    assert artifacts.read("0/a") == b"old"
    artifacts.write("0/a", b"new")
    assert artifacts.read("0/a") == b"new"


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "s").write_text("in the way")
    artifacts = Artifacts(str(tmp_path), "s")
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifacts.write("0/a", b"1")
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifacts.read("0/a")
