"""`make clean` removes what `make quickstart` made, wherever root's database was put, and nothing else."""

import os
import runpy
import shutil
import subprocess
import sys

import pytest
from places import REPOSITORY

from frem_search.storage.embedded.embedded import embedded_postgres
from frem_search.storage.embedded.place import holds_database

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's database was put elsewhere")


def test_make_clean_removes_what_make_quickstart_made_and_needs_nothing_installed(home, monkeypatch):
    checkout = home / "my checkout"
    (checkout / "quickstart" / "home").mkdir(parents=True)
    (checkout / ".venv").mkdir()
    for name in ("Makefile", "tools", "frem_search"):
        (checkout / name).symlink_to(REPOSITORY / name)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(checkout / "quickstart" / "home"))
    with embedded_postgres():
        pass
    command = ["make", "clean", f"PYTHON={sys.executable} -S"]
    made = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    assert made.stderr == ""
    assert "removed" not in made.stdout
    assert sorted(path.name for path in checkout.iterdir()) == ["Makefile", "frem_search", "tools"]


@as_root
def test_make_clean_removes_what_an_earlier_version_put_elsewhere_and_nothing_else(home, elsewhere, capsys):
    others = [home / "var" / "postgres-0123456789ab", home / "var" / "artifacts", home / "own" / "postgres"]
    for other in others:
        other.mkdir(parents=True)
    with embedded_postgres():
        pass
    assert clean() == 0
    assert capsys.readouterr().out == f"removed {elsewhere}\n"
    assert clean() == 0
    assert capsys.readouterr().out == f"{elsewhere}: the database is gone already\n"
    assert sorted((home / "var").iterdir()) == sorted(others[:2])
    assert others[2].exists()


@as_root
def test_make_clean_in_a_copy_leaves_the_database_of_the_first_and_names_it(home, elsewhere, monkeypatch, capsys):
    with embedded_postgres():
        pass
    shutil.copytree(home / "own", home / "copy")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "copy"))
    assert clean() == 0
    assert capsys.readouterr().out == (
        f"left alone, since another home may use it: {elsewhere}. If none does: rm -r {elsewhere}\n"
    )
    assert holds_database(elsewhere)


@as_root
def test_make_clean_names_the_database_that_was_not_chosen(home, elsewhere, make_database, capsys):
    make_database(home / "own" / "postgres")
    (home / "own" / "postgres.place").write_text("postgres\n")
    assert clean() == 0
    assert capsys.readouterr().out.endswith(f"If none does: rm -r {elsewhere}\n")
    assert holds_database(elsewhere)


def test_make_clean_removes_nothing_where_the_place_cannot_be_read(home):
    (home / "quickstart" / "home").mkdir(parents=True)
    (home / "quickstart" / "home" / "postgres.place").write_text("/etc\n")
    for name in ("Makefile", "tools", "frem_search"):
        (home / name).symlink_to(REPOSITORY / name)
    command = ["make", "clean", f"PYTHON={sys.executable} -S"]
    made = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert made.returncode != 0
    assert "nothing removed: " in made.stderr
    assert (home / "quickstart" / "home" / "postgres.place").exists()


def clean():
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "tools" / "clean.py"), run_name="__main__")
    return ended.value.code
