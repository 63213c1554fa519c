"""Where the workers of `run` are: in this process, in others of this machine, or on a cluster."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from frem_search.errors import UsageError

if TYPE_CHECKING:
    from frem_search.search.begin import Opened
    from frem_search.search.engines.team import Team
    from frem_search.storage.database import Storage
    from frem_search.study.file import StudyFile
    from frem_search.study.record import StudyRecord

ENGINES = ("local", "ray")
INTERRUPTED = 130


def check_engine(engine: str, *, gpus_per_worker: float | None) -> None:
    """Refuse an engine that there is not, or an option that it does not have.

    Raises:
        UsageError: So it is.
    """
    if engine not in ENGINES:
        message = f"--engine: expected one of {', '.join(ENGINES)}, but got {engine!r}."
        raise UsageError(message)
    if engine == "local" and gpus_per_worker is not None:
        message = (
            "--gpus-per-worker: only --engine ray divides GPUs. Here, --cohort trains several trials in one worker, "
            "and --device cuda:0,cuda:0 puts two workers on a GPU."
        )
        raise UsageError(message)


@dataclass(frozen=True)
class Asked:
    """What was asked of `run`.

    Args:
        study_file: The study, with the options that concern it.
        which: Those options: study, quick, dataset, n_trials, n_epochs.
        storage_url: What --storage gave.
        artifacts: What --artifacts gave.
        device: What --device gave.
        workers: What --workers gave.
        gpus_per_worker: What --gpus-per-worker gave.
        cohort: What --cohort gave.
        checkpoint_every: What --checkpoint-every gave.
    """

    study_file: "StudyFile"
    which: dict[str, Any]
    storage_url: str | None
    artifacts: str | None
    device: str
    workers: int | None
    gpus_per_worker: float | None
    cohort: str | None
    checkpoint_every: float

    @property
    def environment(self) -> dict[str, str]:
        """The URLs as workers get them: not as options, where every user of a machine would see a password in them."""
        urls = {"FREM_SEARCH_STORAGE": self.storage_url, "FREM_SEARCH_ARTIFACTS": self.artifacts}
        return {name: url for name, url in urls.items() if url}


def run_here(asked: Asked, storage: "Storage", *, is_stopping: Callable[[], bool]) -> None:
    """Search in this process, or in several of this machine."""
    from frem_search.cli.options import artifacts_of
    from frem_search.search.engines.local import devices_of, local_workers
    from frem_search.storage.artifacts import masked

    devices = devices_of(asked.device, asked.workers)
    is_begun = len(devices) == 1 or _is_measured(asked, devices)
    if is_begun:
        devices = devices_of(asked.device, _search_alone(asked, storage, devices, is_stopping=is_stopping))
    if len(devices) == 1:
        return
    where = masked(artifacts_of(asked.artifacts))
    _tell(f"{asked.study_file.name}: {len(devices)} workers on {', '.join(devices)}, artifacts {where}")
    if not is_begun:  # else it was told where the study was begun
        _tell_left_out(asked.study_file)
    team = local_workers(
        worker_arguments(
            **asked.which,
            cohort=None if asked.cohort == "auto" else asked.cohort,  # what was measured is stored with the study
            checkpoint_every=asked.checkpoint_every,
        ),
        devices,
        storage=storage,
        study=asked.study_file.name,
        environment=asked.environment,
        is_stopping=is_stopping,
        tell=_tell,
    )
    _show_team(team, asked)


def _tell_left_out(study_file: "StudyFile") -> None:
    """Say which extra scores the workers of this machine cannot compute."""
    from frem_search.training.recipe import left_out

    if study_file.extra_scores and (line := left_out(study_file)):
        _tell(line)


def _is_measured(asked: Asked, devices: Sequence[str]) -> bool:
    """Whether it takes a measurement to tell how many trials train side by side."""
    if asked.cohort is not None:
        return asked.cohort == "auto"
    if devices[0] == "cpu":
        return False
    from frem_search.system.device import find_device

    return find_device(devices[0]).type != "cpu"


def _search_alone(asked: Asked, storage: "Storage", devices: Sequence[str], *, is_stopping: Callable[[], bool]) -> int:
    """Begin the study or join it, and search if one process is to do that; return how many are."""
    from frem_search.cli.progress import show_progress
    from frem_search.study.record import read_record

    is_chosen = len(devices) > 1
    with open_worker(
        asked.study_file,
        storage,
        device=devices[0],
        artifacts=asked.artifacts,
        cohort=asked.cohort,
        workers=devices.count(devices[0]) if is_chosen else asked.workers,  # measured on one device as they share it
        checkpoint_every=asked.checkpoint_every,
        is_stopping=is_stopping,
    ) as (_, worker, arrangement):
        n_workers = len(devices) if is_chosen else arrangement.workers
        if n_workers == 1:
            before = read_record(storage, asked.study_file.name, has_curves=False)
            _note_budget(before, asked)
            with closing(worker.work()) as events:  # whatever happens, trials are let go before the database is
                show_progress(events, before)
        return n_workers


def _show_team(team: "Team", asked: Asked) -> None:
    """Show what a team does, until its workers have left."""
    from frem_search.cli.progress import show_progress

    with team:
        before = team.begun()
        if before is None:
            raise typer.Exit(INTERRUPTED)
        _note_budget(before, asked)
        with closing(team.events(before)) as events:
            show_progress(events, before)


def run_on_ray(asked: Asked, storage: "Storage", *, is_stopping: Callable[[], bool]) -> None:
    """Search on a Ray cluster; the study is begun there, as this machine may have neither GPU nor images."""
    from frem_search.search.engines.nodes import plan, room
    from frem_search.search.engines.ray import check_storage, ray_cluster, ray_workers
    from frem_search.training.recipe import check

    check(asked.study_file)
    with ray_cluster() as nodes:
        check_storage(nodes, asked.storage_url)
        chosen = plan(nodes, device=asked.device, workers=asked.workers, gpus_per_worker=asked.gpus_per_worker)
        n_places = min(chosen.n, room(nodes, cpus=chosen.cpus, gpus=chosen.gpus))
        _tell(f"Ray: room for {n_places} of {chosen.n} workers on {len(nodes)} node{'s' if len(nodes) > 1 else ''}")
        if asked.artifacts is None and len({node.address for node in nodes}) > 1:
            _tell("No --artifacts: they lie on each machine, and a trial that another one takes over begins again.")
        team = ray_workers(
            asked.study_file,
            worker_arguments(
                **asked.which | {"study": None},
                cohort=asked.cohort,
                checkpoint_every=asked.checkpoint_every,
            ),
            chosen,
            storage=storage,
            environment=asked.environment,
            is_stopping=is_stopping,
            tell=_tell,
        )
        _show_team(team, asked)


@contextmanager
def open_worker(
    study_file: "StudyFile", storage: "Storage", *, artifacts: str | None, checkpoint_every: float, **settings: Any
) -> "Iterator[Opened]":
    """Open a worker with what the commands have in common.

    Args:
        study_file: The study.
        storage: Its database.
        artifacts: What --artifacts gave.
        checkpoint_every: What --checkpoint-every gave.
        settings: As `join.open_worker` takes them.
    """
    from frem_search.cli.options import artifacts_of
    from frem_search.search.begin import open_worker

    if math.isnan(checkpoint_every):
        message = "--checkpoint-every: expected seconds of at least 0, but got nan."
        raise UsageError(message)
    with open_worker(
        study_file,
        storage,
        artifacts=artifacts_of(artifacts),
        checkpoint_every_s=checkpoint_every,
        tell=_tell,
        **settings,
    ) as opened:
        yield opened


def worker_arguments(**options: Any) -> list[str]:
    """Return the options of `run` as `worker` takes them.

    >>> worker_arguments(study="mouse_frem", quick=True, n_trials=None, checkpoint_every=0.0)
    ['--study', 'mouse_frem', '--quick', '--checkpoint-every', '0.0']
    """
    arguments = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value is not None and value is not False:  # 0.0 is a value
            arguments += [option, str(value)]
    return arguments


def _note_budget(before: "StudyRecord", asked: Asked) -> None:
    n_trials = asked.which["n_trials"]
    if n_trials is not None and n_trials < before.n_trials:
        _tell(f"{before.name}: the budget stays {before.n_trials} trials; it can be raised, not lowered.")


def _tell(line: str) -> None:
    typer.echo(line, err=True)
