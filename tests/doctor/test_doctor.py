import json
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa
import torch

from frem_search.data import DATASETS
from frem_search.data.catalogue import check
from frem_search.doctor import database, examine, machine, secrets_of
from frem_search.errors import ChromeNotFoundError, DatasetError, StorageError
from frem_search.storage.database import open_storage
from frem_search.study.file import load_study_file
from frem_search.study.stored import make_contract, open_study

CHECKS = ["python", "packages", "home", "artifacts", "device", "pictures"]
DATABASE_CHECKS = ["server", "session", "clock", "connections", "schema", "rights"]


def look(storage_url, tmp_path, **options):
    options = {"artifacts": str(tmp_path / "artifacts")} | options
    return list(examine(lambda: open_storage(storage_url), **options))


def finding(findings, check):
    (found,) = [each for each in findings if each.check == check]
    return found


def test_a_machine_that_can_search_has_no_failure(storage_url, tmp_path):
    findings = look(storage_url, tmp_path)
    assert [each.line() for each in findings if each.state == "FAIL"] == []
    assert [each.check for each in findings] == [*CHECKS, *["dataset"] * len(DATASETS), "database", *DATABASE_CHECKS]
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_the_command_prints_a_line_for_each(run_cli, storage_url, tiny_study):
    told = run_cli("doctor", "--study", tiny_study, FREM_SEARCH_STORAGE=storage_url)
    assert told.returncode == 0, told.stdout + told.stderr
    lines = told.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert "tiny: not begun yet; 12 images in" in lines[-1]


def test_a_database_that_does_not_answer_is_a_failure_and_not_an_error(run_cli):
    url = "postgresql://me:s%40cret@127.0.0.1:1/frem"
    told = run_cli("doctor", "--json", FREM_SEARCH_STORAGE=url)
    assert told.returncode == 1
    assert told.stderr == ""
    failed = [each for each in json.loads(told.stdout) if each["state"] == "FAIL"]
    assert [each["check"] for each in failed] == ["database"]
    assert "Connection refused" in failed[0]["found"]
    assert "cret" not in told.stdout


def test_a_check_that_breaks_is_a_finding_without_the_password(storage_url, tmp_path, monkeypatch):
    url = "postgresql://me:my%40secret@db/frem"

    def breaks():
        raise RuntimeError(f"no route to {url}: password my@secret")

    monkeypatch.setattr(machine, "device", breaks)
    findings = look(storage_url, tmp_path, secrets=secrets_of(url))
    assert finding(findings, "device").line() == "FAIL  device       no route to ***: password ***"
    assert finding(findings, "rights").state == "ok"


def test_a_short_password_is_not_told_by_what_is_left_out(storage_url, tmp_path, monkeypatch, run_cli):
    def breaks():
        raise RuntimeError("the database cannot be reached")

    monkeypatch.setattr(machine, "device", breaks)
    url = "postgresql://me:b@127.0.0.1:1/database"
    findings = look(storage_url, tmp_path, secrets=secrets_of(url))
    assert finding(findings, "device").line() == "FAIL  device       RuntimeError"
    # Our own messages show none, so that nothing is left out of them.
    told = run_cli("doctor", FREM_SEARCH_STORAGE=url)
    (failed,) = [line for line in told.stdout.splitlines() if line.startswith("FAIL")]
    assert "://me:***@127.0.0.1:1/database: the database cannot be reached" in failed
    assert failed.count("***") == 1


def test_a_database_that_does_not_close_is_a_finding(storage, tmp_path):
    @contextmanager
    def never_closes():
        yield storage
        raise StorageError("the server does not stop")

    findings = list(examine(never_closes, artifacts=str(tmp_path)))
    assert findings[-1].line() == "FAIL  database     the server does not stop"


def test_a_home_that_cannot_be_written_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(tmp_path / "file" / "home"))
    found = machine.home_folder()
    assert found.state == "FAIL"
    assert "Set FREM_SEARCH_HOME" in found.remedy


@pytest.mark.parametrize(("free", "state"), [(10e9, "ok"), (1e9, "warn"), (1e8, "FAIL")])
def test_a_full_disk_is_told(monkeypatch, free, state):
    usage = machine.shutil.disk_usage("/")._replace(free=int(free))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert machine.home_folder().state == state


@pytest.mark.parametrize("url", ["nosuch://bucket/prefix", "{file}/artifacts"])
def test_artifacts_that_cannot_be_written_are_a_failure(storage_url, tmp_path, url):
    (tmp_path / "file").write_text("")
    findings = look(storage_url, tmp_path, artifacts=url.format(file=tmp_path / "file"))
    assert finding(findings, "artifacts").state == "FAIL"


def test_a_missing_browser_is_a_warning(monkeypatch):
    def not_found():
        raise ChromeNotFoundError("none was found")

    monkeypatch.setattr("frem_search.figures.pictures.find_chrome", not_found)
    assert machine.pictures().state == "warn"


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ('echo "Chromium 140"; [ "$1 $2" = "--headless=new --version" ]', "ok", "chrome, Chromium 140"),
        ("exit 127", "warn", "chrome ends with status 127."),
        ("exec sleep 60", "warn", "timed out after 0.5 seconds."),
    ],
)
def test_a_browser_that_does_not_start_is_a_warning(monkeypatch, tmp_path, script, state, found):
    (tmp_path / "chrome").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "chrome").chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    monkeypatch.setattr(machine, "CHROME_TIMEOUT_S", 0.5 if "sleep" in script else 30.0)
    told = machine.pictures()
    assert told.state == state
    assert told.found.endswith(found)
    assert told.remedy == ("" if state == "ok" else "Set BROWSER_PATH to another one; figures as HTML need none.")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine with an NVIDIA driver, and a PyTorch for it that sees no GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("visible", "why", "remedy"),
    [
        (None, "this PyTorch for CUDA 12.8 does not see it.", "Install a PyTorch build for the driver"),
        ("", "CUDA_VISIBLE_DEVICES= hides its GPUs.", "Unset CUDA_VISIBLE_DEVICES."),
        ("-1", "CUDA_VISIBLE_DEVICES=-1 hides its GPUs.", "Unset CUDA_VISIBLE_DEVICES."),
        ("7", "with CUDA_VISIBLE_DEVICES=7 there is no GPU.", "Unset CUDA_VISIBLE_DEVICES, or name GPUs"),
    ],
)
def test_hidden_gpus_are_not_blamed_on_the_build(monkeypatch, visible, why, remedy):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine.device()
    assert found.state == "warn"
    assert found.found.endswith(f": there is an NVIDIA driver, but {why}")
    assert found.remedy.startswith(remedy)
    assert ("Install" in found.remedy) == (visible not in ("", "-1"))
    monkeypatch.setenv("FREM_SEARCH_DEVICE", "cuda:0")
    assert machine.device().state == "FAIL"
    monkeypatch.setenv("FREM_SEARCH_DEVICE", "cpu")
    assert machine.device().state == "ok"
    monkeypatch.delenv("FREM_SEARCH_DEVICE")
    monkeypatch.setattr("torch.version.cuda", None)
    assert "this PyTorch is built without CUDA" in machine.device().found


@pytest.fixture
def two_gpus(monkeypatch):
    """What PyTorch says of two GPUs; what is computed on them is computed on the CPU, and listed."""
    used, ones = [], torch.ones

    def on_cpu(*size, device):
        used.append(str(device))
        return ones(*size)

    class Properties:
        total_memory = 80e9

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Properties)
    monkeypatch.setattr("torch.ones", on_cpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return used


@pytest.mark.parametrize(
    ("settings", "used", "names"),
    [
        ({}, ["cuda:0"], ["cuda:0 NVIDIA H100, PyTorch", "bf16, 80 GB, visible GPUs: 0, 1"]),
        ({"FREM_SEARCH_DEVICE": "cuda:1, cuda:0"}, ["cuda:1", "cuda:0"], ["FREM_SEARCH_DEVICE=cuda:1, cuda:0"]),
        ({"FREM_SEARCH_DEVICE": "cpu"}, ["cpu"], ["cpu, ", "visible GPUs: 0, 1, FREM_SEARCH_DEVICE=cpu"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a1,MIG-b2"}, ["cuda:0"], ["visible GPUs: MIG-a1, MIG-b2"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-c3,5"}, ["cuda:0"], ["visible GPUs: GPU-c3, 5"]),
    ],
)
def test_the_device_is_the_one_that_a_search_would_take(two_gpus, monkeypatch, settings, used, names):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = machine.device()
    assert found.state == "ok"
    assert [name for name in names if name not in found.found] == []
    assert two_gpus == used


def test_a_build_without_kernels_for_the_gpu_is_a_failure(two_gpus, monkeypatch):
    def no_kernel(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr("torch.ones", no_kernel)
    found = machine.device()
    assert found.state == "FAIL"
    assert found.found.endswith(
        "cuda:0 computes nothing: CUDA error: no kernel image is available for execution on the device."
    )
    assert found.remedy.startswith("Install a PyTorch build for this GPU")


def test_a_device_that_is_not_there_is_a_failure(storage_url, tmp_path, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_DEVICE", "cuda:31")
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    assert "--device cuda:31: this machine has" in finding(look(storage_url, tmp_path), "device").found


@pytest.mark.parametrize(
    ("needed", "state", "expected"),
    [
        (["numpy>=2.0", "optuna<6,>=5"], "ok", "optuna 5."),
        (["numpy>=99"], "FAIL", "expected numpy>=99, but got "),
        (["no-such-package>=1"], "FAIL", "no-such-package>=1 is missing"),
        (["no-such-package>=1; python_version < '3'"], "ok", ""),
    ],
)
def test_packages_are_compared_with_what_is_needed(monkeypatch, needed, state, expected):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    found = machine.packages()
    assert found.state == state
    assert expected in found.found


def test_missing_real_images_are_a_warning_and_generated_ones_are_not(storage_url, tmp_path):
    states = {each.found.split(":")[0]: each.state for each in look(storage_url, tmp_path) if each.check == "dataset"}
    real = dict.fromkeys(("mouse", "drosophila", "isbi2012", "h1299"), "warn")
    assert states == real | {"mouse_synthetic": "ok", "drosophila_synthetic": "ok"}


@pytest.mark.parametrize("setting", ["SET TIME ZONE 'Asia/Tokyo'", "SET transaction_isolation = 'serializable'"])
def test_other_session_settings_are_a_failure(storage, setting):
    with storage.engine.connect() as connection:
        assert database.session(connection).state == "ok"
        connection.rollback()
        connection.execute(sa.text(setting))
        assert database.session(connection).state == "FAIL"


@pytest.mark.parametrize(("at_server", "state"), [(101.9, "ok"), (102.2, "warn"), (98.1, "ok"), (97.8, "warn")])
def test_a_clock_may_be_two_seconds_off(at_server, state):
    assert database.judge_clock(99.9, at_server, 100.1).state == state


def test_a_role_that_may_only_read_is_a_failure(postgres, storage_url, tmp_path):
    name = storage_url.partition("/frem_")[2].partition("?")[0]
    role = f"reader_{name}"
    grants = (
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA public TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
    )
    postgres.execute(*grants, database=f"frem_{name}")
    try:
        findings = look(storage_url.replace("postgres@", f"{role}@"), tmp_path)
    finally:
        postgres.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}", database=f"frem_{name}")
    found = finding(findings, "rights")
    assert found.state == "FAIL"
    assert found.found.endswith("lacks DELETE, INSERT, UPDATE, USAGE on frem_curve and 23 more.")
    assert finding(findings, "schema").state == "ok"


def test_the_check_of_rights_leaves_nothing_behind(storage):
    assert database.connected(storage, database.rights).state == "ok"
    with storage.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM studies")).scalar() == 0


def test_images_that_changed_since_the_study_began_are_a_failure(storage, storage_url, tiny_study, tmp_path):
    study_file = load_study_file(str(tiny_study))
    contract = make_contract(
        study_file, precision="fp32", dataset="tiny", dataset_fingerprint="0" * 64, class_names=["ground", "disc"]
    )
    open_study(storage, study_file, contract)
    found = finding(look(storage_url, tmp_path, load_study=lambda: study_file), "study")
    assert found.state == "FAIL"
    assert "fingerprint 000000000000" in found.found


@pytest.fixture
def prepared(storage, tiny_study, tiny_dataset, home):
    """Images that lie where prepared ones do, and what stores a study as begun with such images."""
    (home / "datasets").mkdir()
    (home / "datasets" / "tiny").symlink_to(tiny_dataset)

    def begin(name, fingerprint):
        study_file = replace(load_study_file(str(tiny_study)), name=name)
        contract = make_contract(
            study_file, precision="fp32", dataset="tiny", dataset_fingerprint=fingerprint, class_names=["ground"]
        )
        open_study(storage, study_file, contract)

    return begin


def test_images_are_compared_with_those_of_all_stored_studies(prepared, storage_url, tmp_path, monkeypatch):
    read, names = check, []
    monkeypatch.setattr("frem_search.data.catalogue.check", lambda name: names.append(name) or read(name))
    now = check("tiny").fingerprint
    prepared("one", now)
    found = finding(look(storage_url, tmp_path), "images")
    assert found.line().endswith("datasets/tiny holds those that 1 stored study was begun with")
    prepared("two", now)
    prepared("former", "0" * 64)
    names.clear()
    findings = look(storage_url, tmp_path, load_study=lambda: "former")
    found = finding(findings, "images")
    assert found.state == "warn"
    assert found.found.endswith("datasets/tiny holds other images than those that former began with.")
    assert "give them with --dataset" in found.remedy
    assert finding(findings, "study").state == "FAIL"
    assert names == ["tiny"]  # once for all


def test_images_that_cannot_be_read_are_a_failure(prepared, storage_url, tmp_path, monkeypatch):
    def breaks(name):
        raise DatasetError(f"{name}: an image is missing")

    prepared("one", "0" * 64)
    monkeypatch.setattr("frem_search.data.catalogue.check", breaks)
    assert finding(look(storage_url, tmp_path), "images").line() == "FAIL  images       tiny: an image is missing"


def test_a_wrong_study_file_is_a_failure(run_cli, storage_url, tiny_study):
    tiny_study.write_text(tiny_study.read_text().replace("high = 16", "high = 17"))
    for study, expected in ((tiny_study, "params.B"), ("mouse_from", "Did you mean 'mouse_frem'?")):
        told = run_cli("doctor", "--study", study, "--json", FREM_SEARCH_STORAGE=storage_url)
        assert told.returncode == 1
        (failed,) = [each for each in json.loads(told.stdout) if each["state"] == "FAIL"]
        assert failed["check"] == "study"
        assert expected in failed["found"]


def test_secrets_of_finds_every_spelling_of_a_password(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "from-the-environment")
    assert secrets_of("postgresql://me@db/frem") == ("from-the-environment",)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("FREM_SEARCH_STORAGE", "postgresql://me:pass@word@db/frem")
    assert "pass@word" in secrets_of(None)
    assert os.environ["FREM_SEARCH_STORAGE"] in secrets_of(None)
