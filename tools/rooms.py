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
from functools import cache
from pathlib import Path

Arrows = dict[str, set[str]]


def imports_of(file: Path) -> Iterator[str]:
    """Yield the dotted name of every import of a file, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def draw_arrows(package: Path) -> Arrows:
    """Return for each room of a package the rooms that it imports."""
    rooms = {path.stem: path for path in package.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    rooms.pop("__init__", None)
    arrows: Arrows = {}
    for room, path in rooms.items():
        files = path.rglob("*.py") if path.is_dir() else [path]
        parts = (name.split(".") for file in files for name in imports_of(file))
        targets = {part[1] for part in parts if part[0] == package.name and len(part) > 1}
        arrows[room] = targets & set(rooms) - {room}
    return arrows


def find_circle(arrows: Arrows) -> list[str]:
    """Return rooms that import each other in a circle, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(room: str, way: list[str]) -> list[str]:
        if room in way:
            return [*way[way.index(room) :], room]
        if room in done:
            return []
        found = next(filter(None, (walk(target, [*way, room]) for target in sorted(arrows[room]))), [])
        done.add(room)
        return found

    return next(filter(None, (walk(room, []) for room in sorted(arrows))), [])


def count_floors(arrows: Arrows) -> int:
    """Return how many rooms the longest way down enters."""

    @cache
    def floor(room: str) -> int:
        return 1 + max((floor(target) for target in arrows[room]), default=0)

    return max(map(floor, arrows), default=0)


def arrows_up(arrows: Arrows, layers: list[str]) -> list[str]:
    """Return the arrows between rooms of one layer, and those to a layer above; a room in no layer is an error."""
    height = {name.strip(): -i for i, layer in enumerate(layers) for name in layer.split("|")}
    if unknown := sorted(set(arrows) - set(height)):
        sys.exit(f"pyproject.toml: expected every room in a layer, but these are in none: {', '.join(unknown)}.")
    return [f"{a} -> {b}" for a in sorted(arrows) for b in sorted(arrows[a]) if height[a] <= height[b]]


def main() -> None:
    """Print the counts of the package in the working directory, and exit with 1 if one is over its bound."""
    parser = argparse.ArgumentParser(description="Count rooms, arrows, floors, circles and arrows up.")
    for name in ("rooms", "floors", "arrows"):
        parser.add_argument(f"--most-{name}", type=int, default=sys.maxsize)
    most = parser.parse_args()
    tools = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["importlinter"]
    arrows = draw_arrows(Path(tools["root_package"]))
    circle, up = find_circle(arrows), arrows_up(arrows, tools["contracts"][0]["layers"])
    counts = {"rooms": len(arrows), "arrows": sum(map(len, arrows.values()))}
    counts |= {"floors": 0 if circle else count_floors(arrows)}
    print(", ".join(f"{count} {name}" for name, count in counts.items()), end="; ")
    print("circle: " + " -> ".join(circle) if circle else "no circle", end="; ")
    print("arrows up: " + ", ".join(up) if up else "no arrow up")
    over = [name for name, count in counts.items() if count > getattr(most, f"most_{name}")]
    for name in over:
        print(f"expected at most {getattr(most, f'most_{name}')} {name}, but got {counts[name]}.", file=sys.stderr)
    sys.exit(bool(over or circle or up))


if __name__ == "__main__":
    main()
