"""How long `frem-search --help` takes beyond an interpreter that does nothing, in one run.

python benchmarks/startup.py [--repeats 20]
"""

import argparse
import statistics
import subprocess
import sys
import time

HELP = "import sys; sys.argv = ['frem-search', '--help']; from frem_search.cli import main; main()"


def seconds(code: str) -> float:
    """Return the wall time of an interpreter that runs `code`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    seconds(HELP)
    pairs = [(seconds("pass"), seconds(HELP)) for _ in range(repeats)]
    beyond = [ours - plain for plain, ours in pairs]
    print(f"Python {sys.version.split()[0]}, n = {repeats}")
    print(f"python -c pass      {statistics.median(plain for plain, _ in pairs):.3f} s")
    print(f"frem-search --help  {statistics.median(ours for _, ours in pairs):.3f} s")
    print(f"beyond              {statistics.median(beyond):.3f} s ({min(beyond):.3f} to {max(beyond):.3f})")


if __name__ == "__main__":
    main()
