"""How long the embedded database takes to be made, to start and to stop, each time in a process of its own.

python benchmarks/embedded_start.py [--repeats 20] [--first 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

USE = """
import json, time
from frem_search.storage.embedded.embedded import embedded_postgres
times = [time.perf_counter()]
with embedded_postgres():
    times.append(time.perf_counter())
times.append(time.perf_counter())
print(json.dumps([times[1] - times[0], times[2] - times[1]]))
"""


def start_and_stop(home: str) -> tuple[float, float]:
    """Return the seconds until the database of a home takes connections, and until it has stopped."""
    environment = os.environ | {"FREM_SEARCH_HOME": home}
    told = subprocess.run([sys.executable, "-c", USE], env=environment, check=True, capture_output=True, text=True)
    start, stop = json.loads(told.stdout)
    return start, stop


def row(name: str, seconds: list[float]) -> str:
    """Return a line of the table."""
    shown = f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
    return f"{name:<12}{shown}, n = {len(seconds)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--first", type=int, default=5)
    options = parser.parse_args()
    first = []
    for _ in range(options.first):
        with tempfile.TemporaryDirectory() as home:
            first.append(start_and_stop(home)[0])
    with tempfile.TemporaryDirectory() as home:
        start_and_stop(home)
        starts, stops = zip(*(start_and_stop(home) for _ in range(options.repeats)), strict=True)
    print(row("first start", first))
    print(row("start", list(starts)))
    print(row("stop", list(stops)))


if __name__ == "__main__":
    main()
