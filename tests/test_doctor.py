import json
import os
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from frem_search.data import DATASETS
from frem_search.doctor import database, examine, machine, secrets_of
from frem_search.errors import ChromeNotFoundError, StorageError
from frem_search.storage import open_storage
from frem_search.study import make_contract, open_study
from frem_search.study_file import load_study_file

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
    url = "postgresql://me:s%40cret@db/frem"

    def breaks():
        raise RuntimeError(f"no route to {url}: password s@cret")

    monkeypatch.setattr(machine, "device", breaks)
    findings = look(storage_url, tmp_path, secrets=secrets_of(url))
    assert finding(findings, "device").line() == "FAIL  device       no route to ***: password ***"
    assert finding(findings, "rights").state == "ok"


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
    assert "may not DELETE on frem_curve" in found.found
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
