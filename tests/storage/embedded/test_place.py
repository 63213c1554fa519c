"""Where the data lie: in the home whatever its modes, or where an earlier version put them, and always found again."""

import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from strangers import modes

from frem_search.errors import StorageError
from frem_search.storage.database import open_storage
from frem_search.storage.embedded import embedded, place
from frem_search.storage.embedded.programs import wheel_folders

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database runs as another user")


def keep(number):
    """Store a number in the database of this home."""
    with open_storage() as storage, storage.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE kept AS SELECT {number} AS number")


def kept():
    with open_storage() as storage, storage.engine.begin() as connection:
        return connection.exec_driver_sql("SELECT number FROM kept").scalar(), storage.label


def begin_study(name, *, n_trials=0):
    import optuna

    with open_storage() as storage:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(storage=storage.optuna, study_name=name)
        for _ in range(n_trials):
            study.ask()


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
def test_of_two_databases_with_studies_the_one_used_last_is_taken_whatever_ended_the_first_look(
    home, elsewhere, make_database, monkeypatch
):
    here = make_database(home / "own" / "postgres")
    for data in (here, elsewhere):
        place.decide(data)
        begin_study("found", n_trials=1)
    (home / "own" / "postgres.place").unlink()
    # A look at a database starts and stops its server, which writes its files; here the older one's come last.
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(place, "decide", interrupt)
            with pytest.raises(KeyboardInterrupt):
                keep(7)
        os.utime(here / "global" / "pg_control", (2e9, 2e9))
    with open_storage() as storage:
        assert storage.label == f"embedded, in {elsewhere}"


def interrupt(*_):
    raise KeyboardInterrupt


@as_root
def test_of_commands_at_once_one_decides_for_all(home, elsewhere, make_database, monkeypatch):
    here = make_database(home / "own" / "postgres")
    looked_at, look = [], embedded._use

    def use(data):
        looked_at.append(data)
        return look(data)

    def begin():
        with embedded.embedded_postgres():
            pass

    monkeypatch.setattr(embedded, "_use", use)
    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looked_at == [here, elsewhere]
    assert place.folder() == here


@as_root
def test_of_two_databases_one_that_does_not_start_is_told_with_the_way_to_the_other(home, elsewhere, make_database):
    make_database(home / "own" / "postgres")
    (elsewhere / "PG_VERSION").write_text("16\n")
    file = home / "own" / "postgres.place"
    told = f"{elsewhere}: .* got one of 16.* write postgres into {file} for the first, or {elsewhere} for the second"
    with pytest.raises(StorageError, match=told):
        kept()
    file.write_text("postgres")
    keep(7)
    assert kept() == (7, f"embedded, in {home}/own/postgres")


def test_an_earlier_place_has_its_name_from_the_homes_path(monkeypatch):
    """As earlier versions made it; a path that is no UTF-8 has one too."""
    for path in (b"/srv/x", "/srv/café".encode(), b"/srv/caf\xe9"):
        monkeypatch.setenv("FREM_SEARCH_HOME", os.fsdecode(path))
        expected = hashlib.sha256(path + b"/postgres").hexdigest()[:12]
        assert place.earlier_place() == place.EARLIER / f"postgres-{expected}"


@as_root
def test_a_remembered_database_that_is_gone_is_not_replaced_by_an_empty_one(home, elsewhere):
    keep(7)
    shutil.rmtree(elsewhere)
    with pytest.raises(StorageError, match=f"lies in {elsewhere}, and that is not there. Bring it back, or remove"):
        kept()
    (home / "own" / "postgres.place").unlink()
    keep(8)
    assert kept() == (8, f"embedded, in {home}/own/postgres")


@pytest.mark.parametrize(
    "text", ["", "caf\udce9", "/etc", "../x", "/var/lib/frem-search/artifacts", "/var/lib/frem-search/../x"]
)
def test_a_place_that_is_none_is_told(home, text):
    (home / "postgres.place").write_bytes(os.fsencode(text))
    with pytest.raises(StorageError, match=r"postgres.place: expected postgres, or .* Remove this file"):
        place.folder()
