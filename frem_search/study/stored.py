"""A study in the storage, and the contract under which it was begun."""

import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frem_search.errors import ContractError, UsageError
from frem_search.study.file import StudyFile
from frem_search.study.space import space_to_json

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import Connection

    from frem_search.storage.database import Storage

CONTRACT_VERSION = 1
LARGEST_COHORT = 64  # trials side by side


def make_contract(
    study_file: StudyFile, *, precision: str, dataset: str, dataset_fingerprint: str, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return what must be equal for a worker to join a stored study.

    The budget of trials is not part of it and may be raised; package versions are recorded with each trial.
    """
    space = space_to_json(study_file.space)
    return {
        "contract_version": CONTRACT_VERSION,
        "dataset": dataset,
        "dataset_fingerprint": dataset_fingerprint,
        "class_names": list(class_names),
        "fold": study_file.fold,
        "network": study_file.network,
        "loss": study_file.loss,
        "score": study_file.score,
        "space": space,
        "space_sha256": hashlib.sha256(json.dumps(space, sort_keys=True).encode()).hexdigest(),
        "n_epochs": study_file.n_epochs,
        "precision": precision,
        "sampler": study_file.sampler.name,
        "n_startup_trials": study_file.sampler.n_startup_trials,
        "seed": study_file.sampler.seed,
        "pruner": {"name": study_file.pruner} | dict(study_file.pruner_settings),
    } | ({} if study_file.n_folds is None else {"n_folds": study_file.n_folds})


@dataclass(frozen=True)
class OpenStudy:
    """A study in the storage, whose contract is the file's."""

    file: StudyFile
    storage: "Storage"
    optuna: "optuna.Study"
    contract: Mapping[str, Any]
    uid: str  # of this very study: another one of the same name, made after a deletion, has another

    @property
    def id(self) -> int:
        """The study's key in Optuna's tables."""
        return self.optuna._study_id

    @property
    def cohort(self) -> dict[str, Any] | None:
        """How many trials train side by side, `{"cohort": 4, "layout": "stacked"}`; None in a study just begun."""
        stored: dict[str, Any] | None = self.optuna.user_attrs.get("cohort")
        return stored

    @property
    def artifacts_prefix(self) -> str:
        """The folder of this study's artifacts."""
        return artifacts_prefix(self.file.name, self.uid)


def artifacts_prefix(name: str, uid: str) -> str:
    """Return the folder of a study's artifacts: another study of the same name has another."""
    return f"{name}-{uid[:8]}"


def open_study(storage: "Storage", study_file: StudyFile, contract: Mapping[str, Any]) -> OpenStudy:
    """Create a study, or join the stored one.

    Raises:
        ContractError: The stored study was begun with other settings; nothing is changed.
    """
    from frem_search.study.pruners import make_pruner
    from frem_search.study.samplers import distributions, make_sampler

    settings = study_file.sampler
    sampler = make_sampler(
        settings.name,
        space=distributions(study_file.space),
        seed=settings.seed,
        n_startup_trials=settings.n_startup_trials,
    )
    pruner = make_pruner(study_file.pruner, dict(study_file.pruner_settings))

    def create_or_join() -> tuple["optuna.Study", dict[str, Any]]:
        with storage.transaction() as connection:
            study = hold_study(storage, connection, study_file.name, sampler=sampler, pruner=pruner)
            stored = study.user_attrs
            if "contract" not in stored:
                _refuse_foreign(study)
                return study, write_attrs(study, study_file, contract, uid=uuid.uuid4().hex)
            is_same = stored["contract"] == _followed(study_file, contract, stored["contract"])
            if is_same and study_file.n_trials > stored["n_trials"]:
                study.set_user_attr("n_trials", study_file.n_trials)
            return study, stored

    study, stored = storage.retrying(create_or_join)
    contract = _followed(study_file, contract, stored["contract"])
    _compare(study_file.name, stored["contract"], contract)
    return OpenStudy(study_file, storage, study, stored["contract"], stored["uid"])


def hold_study(storage: "Storage", connection: "Connection", name: str, **of_study: Any) -> "optuna.Study":
    """Return the study of a name, made if there is none; until the transaction ends no other process makes one.

    Args:
        storage: The database.
        connection: Of the transaction.
        name: The study's.
        of_study: Sampler and pruner, for `optuna.create_study`.
    """
    import optuna
    import sqlalchemy as sa

    connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
    return optuna.create_study(
        storage=storage.optuna, study_name=name, direction="maximize", load_if_exists=True, **of_study
    )


def write_attrs(
    study: "optuna.Study", study_file: StudyFile, contract: Mapping[str, Any], *, uid: str, **others: Any
) -> dict[str, Any]:
    """Store what a new study is begun with, and return it."""
    attrs = {
        "contract": dict(contract),
        "title": study_file.title,
        "study_file": study_file.text,
        "uid": uid,
        "n_trials": study_file.n_trials,
    } | others
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    return attrs


def parse_cohort(text: str) -> int | None:
    """Read `--cohort`: a number, or None for `auto`.

    Raises:
        UsageError: It is neither.

    >>> parse_cohort("auto"), parse_cohort("4")
    (None, 4)
    """
    if text == "auto":
        return None
    if text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= LARGEST_COHORT:
        return int(text)
    message = f"--cohort: expected auto or a number of trials from 1 to {LARGEST_COHORT}, but got {text!r}."
    raise UsageError(message)


def keep_cohort(study: OpenStudy, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Store how many trials train side by side, unless another worker was first; return what is stored."""

    def keep() -> dict[str, Any]:
        with study.storage.transaction() as connection:
            held = hold_study(study.storage, connection, study.file.name)
            stored: dict[str, Any] | None = held.user_attrs.get("cohort")
            if stored is None:
                stored = dict(chosen)
                held.set_user_attr("cohort", stored)
            return stored

    return study.storage.retrying(keep)


def _followed(study_file: StudyFile, contract: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contract, with the stored precision where the file leaves the choice open."""
    precision = stored["precision"] if study_file.precision == "auto" else contract["precision"]
    return {**contract, "precision": precision}


def _refuse_foreign(study: "optuna.Study") -> None:
    if study.direction.name != "MAXIMIZE" or study.get_trials(deepcopy=False):
        message = (
            f"{study.study_name}: the storage holds a study of this name that another program made. "
            "Rename the study file, or choose another database with --storage."
        )
        raise ContractError(message)


def stored_contract(storage: "Storage", name: str) -> dict[str, Any] | None:
    """Return the contract of a stored study, or nothing if there is no such study."""
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage.optuna)
    except KeyError:
        return None
    return study.user_attrs.get("contract")


def _compare(name: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differing = [key for key in sorted(set(stored) | set(asked)) if stored.get(key) != asked.get(key)]
    if not differing:
        return
    lines = [
        f"  {key}: stored {_short(stored.get(key))}, now {_short(asked.get(key))}"
        for key in differing
        if key != "space_sha256" or "space" not in differing
    ]
    message = (
        f"{name}: this study was begun with other settings, and trials of both would not be comparable:\n"
        + "\n".join(lines)
        + "\nUndo the change, or begin a new study from it with `frem-search study fork`."
    )
    raise ContractError(message)


def _short(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."
