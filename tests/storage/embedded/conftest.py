"""What tests of the embedded database share: processes that use it, and databases that are there already."""

import os
import subprocess
import sys

import pytest

from frem_search.storage.embedded import place, server
from frem_search.storage.embedded.account import account_for

USE = """
import sys
from frem_search.storage.database import open_storage
with open_storage() as storage:
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def use():
    """A process that uses the server until `end`."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", USE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def _made(run_folder):
    data = run_folder / "made" / "postgres"
    data.parent.mkdir()
    server.make_database(data, account_for(data))
    return data


@pytest.fixture
def make_database(_made):
    """Put an empty database into a folder; it belongs to the user who runs it."""

    def make(data):
        data.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", _made, data], check=True)
        return data

    return make


@pytest.fixture
def elsewhere(home, monkeypatch, make_database):
    """The folder where an earlier version put the database of FREM_SEARCH_HOME, which is `home / "own"`."""
    monkeypatch.setattr(place, "EARLIER", home / "var")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(home / "own"))
    return make_database(place.earlier_place())
