"""Which arrangement of trials is the fastest on this machine: measured once, and remembered."""

import fcntl
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from frem_search import __version__
from frem_search.bench.speed import Arrangement, Speed, Trainee, best, measure
from frem_search.errors import ContractError, DeviceMemoryError
from frem_search.study.stored import LARGEST_COHORT, OpenStudy, keep_cohort, parse_cohort
from frem_search.system.cores import n_cores
from frem_search.system.device import describe_device
from frem_search.system.files import write_atomically
from frem_search.system.home import home
from frem_search.training.side_by_side.layouts import ALONE, LAYOUTS

SECONDS_EACH = 3.0
SECONDS_IN_ALL = 50.0
FREE_SHARE = 0.9  # of the device's memory that may be planned with


def settle(
    study: OpenStudy,
    trainee: Trainee,
    *,
    cohort: str | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Arrangement:
    """Return how the trials of a study share this machine; the cohort is the one that the study was begun with.

    Where nothing is asked for, a study begins on the CPU with one trial at a time, because only then its suggestions
    repeat themselves, and on a GPU with what was measured to be the fastest.

    Args:
        study: The study, begun or joined.
        trainee: Its network and images on this machine.
        cohort: `auto` or a number, if it was given.
        workers: How many processes, if it was given.
        tell: Told in a line what is measured.

    Raises:
        ContractError: The study was begun with another cohort than the one that is asked for.
        DeviceMemoryError: Not even one trial fits on the device.
    """
    asked = None if cohort is None else parse_cohort(cohort)
    stored = study.cohort
    if stored is None:
        is_plain = cohort is None and trainee.device.type == "cpu"
        # A number of trials side by side says that processes are not to be chosen.
        processes = workers or (None if asked is None else 1)
        chosen = Arrangement(workers or 1) if is_plain else choose(trainee, cohort=asked, workers=processes, tell=tell)
        stored = keep_cohort(study, {"cohort": chosen.cohort, "layout": chosen.layout})
        if stored == {"cohort": chosen.cohort, "layout": chosen.layout}:
            return chosen
    if asked is not None and asked != stored["cohort"]:
        message = (
            f"{study.file.name}: this study was begun with --cohort {stored['cohort']}, but --cohort {asked} was asked "
            "for, and the order of its suggestions depends on it. Leave the option out, or begin a new study from it "
            "with `frem-search study fork`."
        )
        raise ContractError(message)
    if trainee.device.type in LAYOUTS[stored["layout"]].devices:
        return Arrangement(workers or 1, stored["cohort"], stored["layout"])
    # Begun on another kind of device.
    return choose(trainee, cohort=stored["cohort"], workers=workers or 1, tell=tell)


def choose(
    trainee: Trainee,
    *,
    cohort: int | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Arrangement:
    """Return the fastest arrangement, from the file of those that were measured before if it is there.

    Args:
        trainee: What is to be trained.
        cohort: How many trials side by side, if that is given.
        workers: How many processes, if that is given.
        tell: Told in a line what is measured.

    Raises:
        DeviceMemoryError: Not even one trial fits on the device.
    """
    options = {"cohort": cohort, "workers": workers}
    only = list(candidates(trainee, **options))
    if len(only) == 1:
        return only[0]
    key, path = _key(trainee, options), home() / "arrangements.json"
    with _turn(path):
        known = _read(path)
        if key not in known:
            tell(f"measuring how to train side by side on {describe_device(trainee.device)}, once; under a minute")
            speeds = measure_all(trainee, only)
            chosen = best(speed for speed in speeds if not speed.error)
            known[key] = {"chosen": asdict(chosen.arrangement), "measured": [_to_json(speed) for speed in speeds]}
            write_atomically(path, json.dumps(known, indent=2).encode())
            tell(f"{chosen.arrangement}: {chosen.images_per_s:.0f} images/s; remembered in {path}")
    return Arrangement(**known[key]["chosen"])


def candidates(trainee: Trainee, *, cohort: int | None = None, workers: int | None = None) -> Iterator[Arrangement]:
    """Yield the arrangements worth timing, the simplest first.

    Args:
        trainee: What is to be trained.
        cohort: How many trials side by side, if that is given.
        workers: How many processes, if that is given.
    """
    kind, cores = trainee.device.type, n_cores()
    # TPE learns little from trials that are all drawn at once: a quarter of the budget at most.
    most = min(LARGEST_COHORT, max(2, trainee.study_file.n_trials // 4))
    layouts = [name for name, layout in LAYOUTS.items() if kind in layout.devices]
    if kind == "cpu":
        sizes = {"threads": [min(cores, most)], "stacked": [4, 8]}
    else:
        sizes = {layout: [2**power for power in range(1, 7)] for layout in layouts}
    for layout in layouts:
        if cohort in (None, 1) and LAYOUTS[layout].is_for_one:
            yield Arrangement(workers or 1, 1, layout)
        wanted = [cohort] if cohort else [size for size in sizes.get(layout, []) if 1 < size <= most]
        if layout != ALONE:
            yield from (Arrangement(workers or 1, size, layout) for size in wanted if size > 1)
    if kind == "cpu" and workers is None and cohort in (None, 1) and cores > 1:
        yield Arrangement(min(cores, most), 1, ALONE)


def measure_all(trainee: Trainee, arrangements: list[Arrangement]) -> list[Speed]:
    """Measure arrangements until the time for it is over; larger ones only as long as they gain and fit.

    Raises:
        DeviceMemoryError: Not even one trial fits on the device.
    """
    until, speeds = time.monotonic() + SECONDS_IN_ALL, list[Speed]()
    subject = trainee.shortened() if trainee.device.type == "cpu" else trainee
    for arrangement in arrangements:
        alike = [each for each in speeds if each.arrangement.layout == arrangement.layout and not each.error]
        is_hopeless = not _fits(alike, arrangement, trainee.device) or _gains_no_more(alike, arrangement)
        if speeds and (is_hopeless or time.monotonic() > until):
            continue
        speeds.append(measure(subject, arrangement, seconds=SECONDS_EACH))
    if all(speed.error for speed in speeds):
        raise DeviceMemoryError(speeds[0].error)
    return speeds


def _fits(alike: list[Speed], arrangement: Arrangement, device: torch.device) -> bool:
    """Whether the memory that two smaller cohorts took says that a larger one has room."""
    if len(alike) < 2 or device.type != "cuda":
        return True
    first, second = alike[-2], alike[-1]
    each = (second.peak_memory - first.peak_memory) / (second.arrangement.cohort - first.arrangement.cohort)
    needed = second.peak_memory + each * (arrangement.cohort - second.arrangement.cohort)
    return needed < FREE_SHARE * torch.cuda.get_device_properties(device).total_memory


def _gains_no_more(alike: list[Speed], arrangement: Arrangement) -> bool:
    if len(alike) < 2 or arrangement.workers > 1:
        return False
    return alike[-1].images_per_s < 1.05 * alike[-2].images_per_s


def _key(trainee: Trainee, options: dict[str, Any]) -> str:
    """Return what the speed of a training depends on, as a digest."""
    file, dataset = trainee.study_file, trainee.dataset
    parts = {
        "network": file.network,
        "loss": file.loss,
        "score": file.score,
        "n_folds": file.n_folds,
        "pruner": file.pruner,
        "params": trainee.params,
        "image": list(dataset.images.shape[1:]),
        "n_images": [len(part) for part in vars(dataset.splits[file.folds[0]]).values()],
        "n_trials": file.n_trials,
        "device": describe_device(trainee.device),
        "host": platform.node(),
        "cores": n_cores(),
        "precision": trainee.precision,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts | options, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _to_json(speed: Speed) -> dict[str, Any]:
    return asdict(replace(speed, images_per_s=round(speed.images_per_s, 1)))


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or torn: measured anew
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Let one process of this machine measure at a time: two would slow each other down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
