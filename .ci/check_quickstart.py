"""Check what `make quickstart` left behind: every trial finished, every figure drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path("quickstart").resolve()
FIGURES = ("tpe_scatter", "history", "learning_curves", "parameter_importance")

command = [".venv/bin/frem-search", "status", "--study", "mouse_frem", "--quick", "--json"]
environment = os.environ | {"FREM_SEARCH_HOME": str(QUICKSTART / "home")}
answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
states = json.loads(answer.stdout)["states"]
problems = []
if states["complete"] != 30 or sum(states.values()) != 30:
    problems.append(f"expected 30 complete trials, but got {states}")
problems += [
    f"{path}: missing or empty"
    for name in FIGURES
    for path in (QUICKSTART / "figures" / f"{name}.{suffix}" for suffix in ("html", "png", "csv"))
    if not path.is_file() or not path.stat().st_size
]
if problems:
    sys.exit("quickstart: " + "\n".join(problems))
sys.stdout.write(
    f"quickstart: {states['complete']} trials, {len(FIGURES)} figures and more in {QUICKSTART / 'figures'}\n"
)
