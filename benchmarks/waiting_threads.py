"""What it costs that PyTorch's threads wait busily for each other, on a quiet machine and beside other programs.

    python benchmarks/waiting_threads.py [--repeats 5]

Trains four epochs of `mouse_frem --quick` in a process of its own, with as many threads as there are cores: with GNU
OpenMP's own patience and with frem-search's, alone, beside one busy program, and beside another such training.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TRAIN = """
import sys, time
sys.path.insert(0, "benchmarks")
from seed_spread import scores
from frem_search.study.file import load_study_file
study = load_study_file("mouse_frem", quick=True, n_epochs=4)
scores((study, {"B": 4, "X": 100.0}, 0))
print("ready", flush=True)
started = time.perf_counter()
scores((study, {"B": 4, "X": 100.0}, 0))
print(time.perf_counter() - started)
"""
BURN = "while True: pass"
PATIENCE = {"OpenMP's own": {}, "frem-search's": {"GOMP_SPINCOUNT": "1000"}}


def seconds(environment: dict[str, str]) -> float:
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return float(ended.stdout.split()[-1])


@contextmanager
def beside(code: str, environment: dict[str, str]) -> Iterator[None]:
    """Run code again and again beside what is measured."""
    loop = subprocess.Popen(
        ["/bin/sh", "-c", 'while "$0" -c "$1"; do :; done', sys.executable, code],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(1)
    try:
        yield
    finally:
        os.killpg(loop.pid, 15)
        loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    neighbours = {"alone": "", "beside a busy program": BURN, "beside another training": TRAIN}
    for name, code in neighbours.items():
        measured: dict[str, list[float]] = {each: [] for each in PATIENCE}
        for _ in range(options.repeats):
            for each, environment in PATIENCE.items():
                if not code:
                    measured[each].append(seconds(environment))
                else:
                    with beside(code, environment):
                        measured[each].append(seconds(environment))
        for each, values in measured.items():
            print(
                f"{name:24} {each:14} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f}), "
                f"n = {len(values)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
