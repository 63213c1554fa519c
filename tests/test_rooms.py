"""tools/rooms.py counts what it says, and fails where it should."""

import subprocess
import sys

import pytest
from places import REPOSITORY

FILES = {
    "pyproject.toml": """
        [tool.importlinter]
        root_package = "house"
        [[tool.importlinter.contracts]]
        layers = ["roof", "one | other", "ground"]
    """,
    "house/__init__.py": "",
    "house/roof.py": "def f():\n    import house.one.inner\n    from house import other\n",
    "house/one/__init__.py": "",
    "house/one/inner.py": "import os\nfrom house.ground import a, b\nfrom house.one import inner\n",
    "house/other/__init__.py": "if False:\n    from house.ground import a\n",
    "house/ground.py": "",
}


@pytest.fixture
def count(tmp_path):
    """Run the tool on a small package, some of whose files are others."""

    def count(*options, **changed):
        for name, text in (FILES | {name.replace("__", "/") + ".py": text for name, text in changed.items()}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return subprocess.run(
            [sys.executable, REPOSITORY / "tools" / "rooms.py", *options], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    return count


def test_rooms_floors_and_arrows_are_counted(count):
    done = count("--most-rooms", "4", "--most-floors", "3", "--most-arrows", "4")
    assert (done.returncode, done.stdout) == (0, "4 rooms, 3 floors, 4 arrows, no circle\n")


@pytest.mark.parametrize(
    ("options", "changed", "says"),
    [
        (["--most-arrows", "3"], {}, "expected at most 3 arrows, but got 4"),
        (["--most-floors", "2"], {}, "expected at most 2 floors, but got 3"),
        (["--most-rooms", "3"], {}, "expected at most 3 rooms, but got 4"),
        ([], {"house__ground": "import house.roof"}, "expected no circle of rooms, but got"),
        ([], {"house__other__more": "import house.one"}, "but got other -> one. Move"),
        ([], {"house__attic": ""}, "expected every room in a layer, but attic is in none"),
        ([], {"house__roof": "from . import one"}, "roof.py:1: expected absolute imports"),
    ],
)
def test_what_is_over_its_bound_or_tangled_fails(count, options, changed, says):
    done = count(*options, **changed)
    assert done.returncode == 1
    assert says in done.stderr
