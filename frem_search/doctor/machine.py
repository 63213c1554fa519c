"""Checks of this machine: Python and its packages, folders, device, browser."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from frem_search.doctor.finding import Finding
from frem_search.system.home import home

LOW_SPACE_GB, NO_SPACE_GB = 5.0, 0.5
CHROME_TIMEOUT_S = 30.0


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
    from frem_search.storage.artifacts import Artifacts, masked

    Artifacts(url, "").check()
    return Finding("artifacts", "ok", f"{masked(url)}, written, read and removed")


def device() -> Finding:
    """What a search trains on here, in which precision, and whether it computes."""
    import torch

    from frem_search.system.device import best_precision, describe_device, find_device

    asked = os.environ.get("FREM_SEARCH_DEVICE") or "auto"
    if asked != "cpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        return _unseen(asked)
    chosen = [find_device(name.strip()) for name in asked.split(",")]
    names = ", ".join(describe_device(each) for each in chosen)
    found = f"{names}, PyTorch {torch.__version__}, {best_precision(chosen[0])}{_visible()}{_as_asked()}"
    for each in chosen:
        try:
            torch.ones(8, device=each).sum().item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            remedy = (
                "Install a PyTorch build for this GPU and its driver, or free its memory if other programs fill it."
            )
            return Finding("device", "FAIL", f"{found}: {each} computes nothing: {reason}.", remedy)
    return Finding("device", "ok", found)


def _unseen(asked: str) -> Finding:
    """Why there is an NVIDIA driver and nothing that PyTorch can use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = "Install a PyTorch build for the driver that nvidia-smi shows."
    if torch.version.cuda is None:
        why = "this PyTorch is built without CUDA"
    elif visible in ("", "-1"):
        why, remedy = f"CUDA_VISIBLE_DEVICES={visible} hides its GPUs", "Unset CUDA_VISIBLE_DEVICES."
    elif visible is not None:
        why = f"with CUDA_VISIBLE_DEVICES={visible} there is no GPU"
        remedy = f"Unset CUDA_VISIBLE_DEVICES, or name GPUs as `nvidia-smi -L` does. If that does not help: {remedy}"
    else:
        why = f"this PyTorch for CUDA {torch.version.cuda} does not see it"
    found = f"cpu, PyTorch {torch.__version__}{_as_asked()}: there is an NVIDIA driver, but {why}."
    return Finding("device", "FAIL" if "cuda" in asked else "warn", found, remedy)


def _visible() -> str:
    """The GPUs that this process may use, and the memory of the first."""
    import torch

    from frem_search.system.device import visible_gpus

    if not (gpus := visible_gpus()):
        return ""
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f", {memory_gb:.0f} GB, visible GPU{'s' if len(gpus) > 1 else ''}: {', '.join(gpus)}"


def _as_asked() -> str:
    asked = os.environ.get("FREM_SEARCH_DEVICE")
    return f", FREM_SEARCH_DEVICE={asked}" if asked else ""


def pictures() -> Finding:
    """Whether figures can be written as PNG, SVG and PDF."""
    from frem_search.errors import ChromeNotFoundError
    from frem_search.figures.pictures import find_chrome

    try:
        return _started(find_chrome())
    except ChromeNotFoundError as error:
        return Finding("pictures", "warn", str(error), "Figures as HTML need none.")


def _started(chrome: Path) -> Finding:
    command: list[str | Path] = [chrome, "--headless=new", "--version"]
    try:
        told = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHROME_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        status = getattr(error, "returncode", None)
        reason = f"does not start: {error}" if status is None else f"ends with status {status}"
        remedy = "Set BROWSER_PATH to another one; figures as HTML need none."
        return Finding("pictures", "warn", f"{chrome} {reason}.", remedy)
    return Finding("pictures", "ok", f"{chrome}, {told.stdout.decode(errors='replace').strip()}")
