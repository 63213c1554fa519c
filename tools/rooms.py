"""Count the rooms of the package and the imports between them, and fail where there are more than allowed.

A room is a folder or a file at the top of the package, but for `__init__.py`, which anything may import. An arrow leads
from a room to another one that it imports, wherever the import stands and however many there are. Floors are counted
along the longest way down. An arrow runs up if it leads to a room of the same or of a higher layer of pyproject.toml.

    python tools/rooms.py --most-rooms 17 --most-floors 9 --most-arrows 95
"""

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def imports_of(file: Path) -> Iterator[str]:
    """Yield the dotted name of every import of a file, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                sys.exit(f"{file}:{node.lineno}: expected absolute imports, but got a relative one. Name the package.")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def draw_arrows(package: Path) -> dict[str, set[str]]:
    """Return for each room of a package the rooms that it imports."""
    rooms = {path.stem: path for path in package.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    rooms.pop("__init__", None)
    arrows = {}
    for room, path in rooms.items():
        files = path.rglob("*.py") if path.is_dir() else [path]
        parts = (name.split(".") for file in files for name in imports_of(file))
        targets = {part[1] for part in parts if part[0] == package.name and len(part) > 1}
        arrows[room] = targets & set(rooms) - {room}
    return arrows


def count_floors(arrows: dict[str, set[str]]) -> int:
    """Return how many rooms the longest way down enters.

    Raises:
        CycleError: Rooms import each other in a circle.
    """
    floors: dict[str, int] = {}
    for room in TopologicalSorter(arrows).static_order():
        floors[room] = 1 + max((floors[target] for target in arrows[room]), default=0)
    return max(floors.values(), default=0)


def arrows_up(arrows: dict[str, set[str]], layers: list[str]) -> list[str]:
    """Return the arrows to a room of the same layer or of one above; a room in no layer ends the program."""
    height = {name.strip(): -i for i, layer in enumerate(layers) for name in layer.split("|")}
    if unknown := sorted(set(arrows) - set(height)):
        sys.exit(f"pyproject.toml: expected every room in a layer, but {', '.join(unknown)} is in none. Add it to one.")
    return [f"{a} -> {b}" for a in sorted(arrows) for b in sorted(arrows[a]) if height[a] <= height[b]]


def main() -> None:
    """Print the counts of the package in the working directory, and exit with 1 if one is over its bound."""
    parser = argparse.ArgumentParser(description="Count rooms, floors and arrows; find circles and arrows up.")
    for name in ("rooms", "floors", "arrows"):
        parser.add_argument(f"--most-{name}", type=int, default=sys.maxsize)
    bounds = vars(parser.parse_args())
    linter = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["importlinter"]
    package = linter["root_package"]
    arrows = draw_arrows(Path(package))
    try:
        counts = {"rooms": len(arrows), "floors": count_floors(arrows), "arrows": sum(map(len, arrows.values()))}
    except CycleError as error:
        sys.exit(
            f"{package}: expected no circle of rooms, but got {' -> '.join(reversed(error.args[1]))}. Move an import."
        )
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + ", no circle")
    if up := arrows_up(arrows, linter["contracts"][0]["layers"]):
        sys.exit(f"{package}: expected imports that point down, but got {', '.join(up)}. Move the import or the layer.")
    for name, count in counts.items():
        if count > (most := bounds[f"most_{name}"]):
            sys.exit(
                f"{package}: expected at most {most} {name}, but got {count}. Untangle them before you raise the bound."
            )


if __name__ == "__main__":
    main()
