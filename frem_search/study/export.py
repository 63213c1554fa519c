"""A study as an SQLite file, for tools that read only that."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

from frem_search.errors import StorageError, UsageError
from frem_search.storage.trial_notes import moved_notes
from frem_search.study.record import read_record

if TYPE_CHECKING:
    from frem_search.storage.database import Storage


def export_sqlite(storage: "Storage", name: str, file: Path) -> int:
    """Copy a study with its trials, parameters, reports and attributes into a new SQLite file; return how many trials.

    Curves and leases are frem-search's own and stay behind. The file is there whole or not at all.

    Args:
        storage: Where the study is.
        name: The study's.
        file: Which must not be there yet.

    Raises:
        StudyNotFoundError: There is no such study.
        UsageError: The file is there, or its folder is not.
        StorageError: It cannot be written.
    """
    if file.exists() or file.is_symlink():
        message = f"--sqlite {file}: expected a new file, but it is there already. Remove it, or give another name."
        raise UsageError(message)
    if not file.parent.is_dir():
        message = f"--sqlite {file}: expected a file in a folder that exists, but {file.parent} is none. Make it first."
        raise UsageError(message)
    n_trials = len(read_record(storage, name, has_curves=False).trials)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as beside:
            copy = Path(beside) / "copy.db"
            _copy(storage, name, copy)
            copy.replace(file)
    except (OSError, sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = getattr(error, "strerror", None) or error.__cause__ or error
        message = f"--sqlite {file}: the copy failed: {reason}. Free space, or give a file in another folder."
        raise StorageError(message) from None
    return n_trials


# The dashboard keeps notes among a study's attributes, by a key of the trial that differs between databases.
NOTES = sa.text("DELETE FROM study_system_attributes WHERE key LIKE :pattern")
NOTE = sa.text("INSERT INTO study_system_attributes (study_id, key, value_json) VALUES (:study_id, :key, :value)")


def _copy(storage: "Storage", name: str, file: Path) -> None:
    url = sa.URL.create("sqlite", database=str(file)).render_as_string()
    target = RDBStorage(url.replace("{", "{{").replace("}", "}}"))  # RDBStorage fills {SCHEMA_VERSION} into its URL
    try:
        optuna.copy_study(from_study_name=name, from_storage=storage.optuna, to_storage=target)
        _move_notes(optuna.load_study(study_name=name, storage=storage.optuna), target)
    finally:
        target.remove_session()
        target.engine.dispose()


def _move_notes(origin: optuna.Study, target: RDBStorage) -> None:
    (study,) = target.get_all_studies()
    new_ids = {trial.number: trial._trial_id for trial in target.get_all_trials(study._study_id, deepcopy=False)}
    old_ids = {trial.number: trial._trial_id for trial in origin.get_trials(deepcopy=False)}
    notes = moved_notes(
        target.get_study_system_attrs(study._study_id), {old_ids[number]: new for number, new in new_ids.items()}
    )
    with target.engine.begin() as connection:
        connection.execute(NOTES, {"pattern": "dashboard:%:note_%"})
        rows = [{"study_id": study._study_id, "key": key, "value": json.dumps(note)} for key, note in notes.items()]
        if rows:
            connection.execute(NOTE, rows)
