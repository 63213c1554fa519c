"""`make clean` removes what `make quickstart` made, wherever root's database was put, and nothing else."""

import os
import runpy
import subprocess
import sys

import pytest
from places import REPOSITORY

from frem_search.storage.embedded.embedded import embedded_postgres


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's database was put elsewhere")
def test_make_clean_removes_what_an_earlier_version_put_elsewhere_and_nothing_else(home, elsewhere, capsys):
    others = [home / "var" / "postgres-0123456789ab", home / "var" / "artifacts", home / "own" / "postgres"]
    for other in others:
        other.mkdir(parents=True)
    with embedded_postgres():
        pass
    for _ in range(2):
        runpy.run_path(str(REPOSITORY / "tools" / "clean.py"), run_name="__main__")
    told = capsys.readouterr()
    assert told.out == f"removed {elsewhere}\n"
    assert told.err.startswith(
        f"nothing removed: {home}/own/postgres.place: this home's database lies in {elsewhere}, "
    )
    assert sorted((home / "var").iterdir()) == sorted(others[:2])
    assert others[2].exists()
