"""Begin a study or join it, and give a worker for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import optuna

from frem_search.bench.arrangement import settle
from frem_search.bench.speed import Arrangement, Trainee
from frem_search.search.worker import Worker
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.database import Storage
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import StudyFile
from frem_search.study.samplers import distributions
from frem_search.study.stored import OpenStudy, make_contract, open_study, parse_cohort
from frem_search.system.device import best_precision, describe_device, find_device
from frem_search.training.objective import Objective
from frem_search.training.recipe import check, check_dataset, left_out, load_images


class Opened(NamedTuple):
    """A study and a worker for it.

    Args:
        study: Begun or joined.
        worker: Which has claimed nothing yet.
        arrangement: How the study's trials share this machine.
    """

    study: OpenStudy
    worker: Worker
    arrangement: Arrangement


@contextmanager
def open_worker(
    study_file: StudyFile,
    storage: Storage,
    *,
    device: str = "auto",
    artifacts: str,
    cohort: str | None = None,
    workers: int | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    checkpoint_every_s: float = 60.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Opened]:
    """Check everything that can be checked, begin or join the study, and give a worker for it.

    Args:
        study_file: The study.
        storage: Its database.
        device: As `find_device` takes it.
        artifacts: The URL of checkpoints, weights and predictions.
        cohort: As `arrangement.settle` takes it.
        workers: As `arrangement.settle` takes it.
        is_stopping: As `Worker` takes it.
        checkpoint_every_s: As `Worker` takes it.
        tell: Told in a line where trials are trained and kept, which extra scores are left out, and what takes its
            time before the first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check(study_file)
    if cohort is not None:
        parse_cohort(cohort)  # before anything is begun
    chosen = find_device(device)
    dataset = load_images(study_file)
    check_dataset(study_file, dataset)
    Artifacts(artifacts, "").check()
    contract = make_contract(
        study_file,
        precision=best_precision(chosen) if study_file.precision == "auto" else study_file.precision,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
    )
    study = open_study(storage, study_file, contract)
    kept = Artifacts(artifacts, study.artifacts_prefix)
    where = kept.url("").rstrip("/")
    tell(f"{study_file.name}: dataset {dataset.name}, artifacts {where}, device {describe_device(chosen)}")
    if line := left_out(study_file):
        tell(line)
    precision = study.contract["precision"]
    trainee = Trainee(study_file, dataset, chosen, precision)
    arrangement = settle(study, trainee, cohort=cohort, workers=workers, tell=tell)
    objective = Objective(
        study_file,
        dataset,
        device=chosen,
        precision=precision,
        artifacts=kept,
        study_uid=study.uid,
        layout=arrangement.layout,
    )
    leases = Leases(
        storage,
        study.optuna,
        distributions=distributions(study_file.space),
        device=describe_device(chosen),
    )
    with leases:
        worker = Worker(
            leases,
            objective,
            space=study_file.space,
            n_epochs=study_file.n_epochs,
            n_slots=arrangement.cohort,
            is_stopping=is_stopping,
            checkpoint_every_s=checkpoint_every_s,
        )
        yield Opened(study, worker, arrangement)
