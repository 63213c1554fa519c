"""Where the data lie: in the home whatever its modes, or where an earlier version put them, and always found again."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from strangers import modes

from frem_search.errors import StorageError
from frem_search.storage.database import open_storage
from frem_search.storage.embedded import place
from frem_search.storage.embedded.programs import wheel_folders

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")


def keep(number):
    """Store a number in the database of this home."""
    with open_storage() as storage, storage.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE kept AS SELECT {number} AS number")


def kept():
    with open_storage() as storage, storage.engine.begin() as connection:
        return connection.exec_driver_sql("SELECT number FROM kept").scalar(), storage.label


def begin_study(name):
    import optuna

    with open_storage() as storage:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optuna.create_study(storage=storage.optuna, study_name=name)


def test_a_home_in_a_closed_folder_is_found_again_and_no_folder_is_opened(home, monkeypatch, run_cli, tiny_study):
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(closed / "inner"))
    ways = (closed, *wheel_folders(), Path(tempfile.gettempdir()), place.EARLIER.parent)
    before = modes(*ways)
    ended = run_cli("run", "--study", tiny_study)
    assert ended.returncode == 0, ended.stderr
    assert modes(*ways) == before
    for mode in (0o755, 0o700):
        closed.chmod(mode)
        status = run_cli("status", "--study", tiny_study).stdout
        assert f"embedded, in {closed}/inner/postgres" in status
        assert "3 of 3 finished" in status
    assert modes(*ways) == before
    assert sorted(path.name for path in (closed / "inner").glob("postgres*")) == [
        "postgres", "postgres.lock", "postgres.users",
    ]  # fmt: skip


def test_doctor_names_the_folder_of_the_data(home, run_cli):
    told = run_cli("doctor").stdout
    assert f"database     embedded, in {home}/postgres\n" in told


def test_a_home_that_was_moved_has_its_database(home, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "before"))
    keep(7)
    (home / "before").rename(home / "after")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "after"))
    assert kept() == (7, f"embedded, in {home}/after/postgres")


def test_a_home_that_is_moved_under_its_server_has_its_database(home, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "before"))
    with open_storage() as storage:
        keep(7)
        (home / "before").rename(home / "after")
        monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "after"))
        assert kept()[0] == 7
        storage.close()
    assert not (home / "after" / "postgres" / "postmaster.pid").exists()
    assert kept()[0] == 7


@as_root
def test_what_an_earlier_version_put_elsewhere_is_found_and_remembered(home, elsewhere, monkeypatch):
    keep(7)
    assert kept() == (7, f"embedded, in {elsewhere}")
    assert (home / "own" / "postgres.place").read_text() == f"{elsewhere}\n"
    assert not (home / "own" / "postgres").exists()
    (home / "own").rename(home / "moved")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "moved"))
    assert kept() == (7, f"embedded, in {elsewhere}")


@as_root
@pytest.mark.parametrize("has_studies", ["here", "elsewhere"])
def test_of_two_databases_the_one_with_studies_is_taken(home, elsewhere, make_database, caplog, has_studies):
    here = make_database(home / "own" / "postgres")
    taken, other = (here, elsewhere) if has_studies == "here" else (elsewhere, here)
    place.decide(taken)
    begin_study("found")
    (home / "own" / "postgres.place").unlink()
    with open_storage() as storage:
        assert storage.label == f"embedded, in {taken}"
    assert [str(taken) in each.getMessage() and str(other) in each.getMessage() for each in caplog.records] == [True]
    caplog.clear()
    with open_storage() as storage:
        assert storage.label == f"embedded, in {taken}"
    assert caplog.records == []
    assert other.exists()


@as_root
def test_of_two_databases_with_studies_the_one_used_last_is_taken(home, elsewhere, make_database):
    here = make_database(home / "own" / "postgres")
    for data, time_s in ((here, 1e9), (elsewhere, 2e9)):
        place.decide(data)
        begin_study("found")
        os.utime(data / "global" / "pg_control", (time_s, time_s))
    (home / "own" / "postgres.place").unlink()
    with open_storage() as storage:
        assert storage.label == f"embedded, in {elsewhere}"


@as_root
def test_a_remembered_database_that_is_gone_is_not_replaced_by_an_empty_one(home, elsewhere):
    keep(7)
    shutil.rmtree(elsewhere)
    with pytest.raises(StorageError, match=f"lies in {elsewhere}, and that is not there. Bring it back, or remove"):
        kept()
    (home / "own" / "postgres.place").unlink()
    keep(8)
    assert kept() == (8, f"embedded, in {home}/own/postgres")


@pytest.mark.parametrize("text", ["", "/etc", "../x", "/var/lib/frem-search/artifacts", "/var/lib/frem-search/../x"])
def test_a_place_that_is_none_is_told(home, text):
    (home / "postgres.place").write_text(text)
    with pytest.raises(StorageError, match=r"postgres.place: expected postgres, or .* Remove this file"):
        place.folder()
