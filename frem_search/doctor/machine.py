"""Checks of this machine: Python and its packages, folders, device, browser."""

import shutil
import sys
import tempfile

from frem_search.doctor.finding import Finding
from frem_search.home import home

LOW_SPACE_GB, NO_SPACE_GB = 5.0, 0.5


def python() -> Finding:
    """Which Python runs, and from where."""
    return Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def packages() -> Finding:
    """Whether every package that frem-search needs is there in a version that it can use."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in metadata.requires("frem-search") or []]
    except metadata.PackageNotFoundError:
        return Finding(
            "packages",
            "warn",
            "frem-search is not installed, so what it needs is not known.",
            "Run `pip install -c constraints.txt .` in its folder.",
        )
    needed = [each for each in needed if each.marker is None or each.marker.evaluate()]
    wrong, versions = [], []
    for each in needed:
        try:
            version = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{each} is missing")
            continue
        versions.append(f"{each.name} {version}")
        if not each.specifier.contains(version, prereleases=True):
            wrong.append(f"expected {each}, but got {version}")
    if wrong:
        return Finding("packages", "FAIL", f"{'; '.join(wrong)}.", "Install frem-search again, with constraints.txt.")
    shown = [text for text in versions if text.split()[0] in ("optuna", "torch", "sqlalchemy", "numpy")]
    return Finding("packages", "ok", f"{', '.join(shown)} and {len(versions) - len(shown)} more")


def home_folder() -> Finding:
    """Whether FREM_SEARCH_HOME takes files, and how much room it has."""
    folder = home()
    remedy = "Set FREM_SEARCH_HOME to a folder of yours."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("home", "FAIL", f"{folder}: cannot be written: {error.strerror}.", remedy)
    return _room("home", str(folder), shutil.disk_usage(folder).free / 1e9)


def _room(check: str, folder: str, free_gb: float) -> Finding:
    found = f"{folder}, {free_gb:.1f} GB free"
    remedy = "Free space there, or set FREM_SEARCH_HOME to another disk."
    if free_gb < NO_SPACE_GB:
        return Finding(check, "FAIL", f"{found}: the database and the checkpoints will not fit.", remedy)
    if free_gb < LOW_SPACE_GB:
        return Finding(check, "warn", f"{found}: checkpoints and weights may fill it.", remedy)
    return Finding(check, "ok", found)


def artifacts_store(url: str) -> Finding:
    """Whether a checkpoint can be written, read and removed again."""
    from frem_search.artifacts import Artifacts, masked

    Artifacts(url, "").check()
    return Finding("artifacts", "ok", f"{masked(url)}, written, read and removed")


def device() -> Finding:
    """What `--device auto` would train on, and in which precision."""
    import torch

    from frem_search.training.device import best_precision, describe_device, find_device

    chosen = find_device("auto")
    found = f"{describe_device(chosen)}, PyTorch {torch.__version__}, {best_precision(chosen)}"
    if chosen.type == "cuda":
        memory_gb = torch.cuda.get_device_properties(chosen).total_memory / 1e9
        return Finding("device", "ok", f"{found}, {memory_gb:.0f} GB, {torch.cuda.device_count()} GPU(s)")
    if shutil.which("nvidia-smi"):
        why = (
            "is built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} does not see it"
        )
        remedy = "Install a PyTorch build for the driver that nvidia-smi shows."
        return Finding("device", "warn", f"{found}: there is an NVIDIA driver, but this PyTorch {why}.", remedy)
    return Finding("device", "ok", found)


def pictures() -> Finding:
    """Whether figures can be written as PNG, SVG and PDF."""
    from frem_search.errors import ChromeNotFoundError
    from frem_search.figures.pictures import find_chrome

    try:
        return Finding("pictures", "ok", str(find_chrome()))
    except ChromeNotFoundError as error:
        return Finding("pictures", "warn", str(error), "Figures as HTML need none.")
