"""Checks of images: which datasets lie here, and whether they are those that a study was begun with."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from frem_search.doctor.finding import Finding

if TYPE_CHECKING:
    from frem_search.storage import Storage
    from frem_search.study_file import StudyFile


def dataset_names() -> list[str]:
    """Return the named datasets and those that were prepared here."""
    from frem_search.data.prepare import list_datasets

    return [row.name for row in list_datasets()]


def dataset(name: str) -> Finding:
    """Whether a dataset lies on disk."""
    from frem_search.data import DATASETS
    from frem_search.data.prepare import list_datasets

    row = next(row for row in list_datasets() if row.name == name)
    if row.is_present:
        return Finding("dataset", "ok", f"{name}: {row.folder}")
    source = DATASETS[name]
    return Finding("dataset", "ok" if source.synthesize else "warn", f"{name}: not here.", source.remedy)


def study(load_study: "Callable[[], StudyFile | str]", storage: "Storage | None") -> Finding:
    """Whether the study can run here: file, images, and the images it was begun with."""
    from frem_search.data.prepare import check as check_dataset
    from frem_search.study import stored_contract
    from frem_search.study_file import find_study_file

    asked = load_study()
    name = asked if isinstance(asked, str) else asked.name
    stored = stored_contract(storage, name) if storage is not None else None
    if isinstance(asked, str):
        dataset_name = "" if stored is None else str(stored["dataset"])
        if not dataset_name:
            find_study_file(name)  # raises, with the nearest names
    else:
        from frem_search.parameters import check

        check(asked)
        dataset_name = asked.dataset
    now = check_dataset(dataset_name)
    if stored is None:
        return Finding("study", "ok", f"{name}: not begun yet; {now.n_cases} images in {now.folder}")
    if stored["dataset_fingerprint"] != now.fingerprint:
        found = f"{name}: begun with images of fingerprint {stored['dataset_fingerprint'][:12]}, but {now.folder} has "
        remedy = "Bring back the images it was begun with, or run the study under another name."
        return Finding("study", "FAIL", f"{found}{now.fingerprint[:12]}.", remedy)
    return Finding("study", "ok", f"{name}: stored, and {now.folder} holds the images it was begun with")
