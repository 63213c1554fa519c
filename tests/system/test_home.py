"""Where files lie."""

import os
from pathlib import Path

from frem_search.system.home import datasets_folder, home


def test_the_folder_that_was_set(monkeypatch, tmp_path):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(tmp_path / "a" / ".." / "b"))
    assert home() == tmp_path / "b"
    assert datasets_folder() == tmp_path / "b" / "datasets"


def test_a_tilde_and_a_relative_folder_are_made_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FREM_SEARCH_HOME", "~/data")
    assert home() == tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FREM_SEARCH_HOME", "here")
    assert home() == tmp_path / "here"


def test_the_usual_place_of_root_and_of_others(monkeypatch, tmp_path):
    monkeypatch.setenv("FREM_SEARCH_HOME", "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert home() == Path("/var/lib/frem-search")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert home() == tmp_path / "frem-search"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local/share/frem-search"
