"""Checks of images: which datasets lie here, and whether they are those that a study was begun with."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from frem_search.doctor.finding import Finding

if TYPE_CHECKING:
    from frem_search.data.summary import DatasetSummary
    from frem_search.storage.database import Storage
    from frem_search.study.file import StudyFile


CONTRACTS = """
    SELECT study_name, value_json FROM studies JOIN study_user_attributes USING (study_id)
    WHERE key = 'contract' ORDER BY study_name
"""


def read(name: str) -> "DatasetSummary":
    """Read a whole dataset."""
    from frem_search.data.catalogue import check

    return check(name)


def dataset_names() -> list[str]:
    """Return the named datasets and those that were prepared here."""
    from frem_search.data.catalogue import list_datasets

    return [row.name for row in list_datasets()]


def dataset(name: str) -> Finding:
    """Whether a dataset lies on disk."""
    from frem_search.data import DATASETS
    from frem_search.data.catalogue import list_datasets

    row = next(row for row in list_datasets() if row.name == name)
    if row.is_present:
        return Finding("dataset", "ok", f"{name}: {row.folder}")
    source = DATASETS[name]
    return Finding("dataset", "ok" if source.synthesize else "warn", f"{name}: not here.", source.remedy)


def begun_with(storage: "Storage") -> list[tuple[str, dict[str, str]]]:
    """Return the datasets that lie here and that stored studies were begun with: fingerprints by study."""
    import sqlalchemy as sa

    from frem_search.data.catalogue import list_datasets

    begun: dict[str, dict[str, str]] = {row.name: {} for row in list_datasets() if row.is_present}
    with storage.engine.connect() as connection:
        for name, text in connection.execute(sa.text(CONTRACTS)):
            contract = json.loads(text)
            begun.get(contract["dataset"], {})[name] = contract["dataset_fingerprint"]
    return [(dataset_name, studies) for dataset_name, studies in begun.items() if studies]


def stored_studies(
    dataset_name: str, fingerprints: Mapping[str, str], read_dataset: "Callable[[str], DatasetSummary]" = read
) -> Finding:
    """Whether a dataset holds the images that stored studies were begun with."""
    now = read_dataset(dataset_name)
    others = [name for name, fingerprint in fingerprints.items() if fingerprint != now.fingerprint]
    if not others:
        n = f"{len(fingerprints)} stored stud{'y was' if len(fingerprints) == 1 else 'ies were'}"
        return Finding("images", "ok", f"{now.folder} holds those that {n} begun with")
    found = f"{now.folder} holds other images than those that {', '.join(others)} began with."
    return Finding("images", "warn", found, "To go on with that, bring its images back, or give them with --dataset.")


def study(
    load_study: "Callable[[], StudyFile | str]",
    storage: "Storage | None",
    read_dataset: "Callable[[str], DatasetSummary]" = read,
) -> Finding:
    """Whether the study can run here: file, images, and the images it was begun with."""
    from frem_search.study.file import find_study_file
    from frem_search.study.stored import stored_contract

    asked = load_study()
    name = asked if isinstance(asked, str) else asked.name
    stored = stored_contract(storage, name) if storage is not None else None
    if isinstance(asked, str):
        dataset_name = "" if stored is None else str(stored["dataset"])
        if not dataset_name:
            find_study_file(name)  # raises, with the nearest names
    else:
        from frem_search.training.recipe import check

        check(asked)
        dataset_name = asked.dataset
    now = read_dataset(dataset_name)
    if stored is None:
        return Finding("study", "ok", f"{name}: not begun yet; {now.n_cases} images in {now.folder}")
    if stored["dataset_fingerprint"] != now.fingerprint:
        found = f"{name}: begun with images of fingerprint {stored['dataset_fingerprint'][:12]}, but {now.folder} has "
        remedy = "Bring back the images it was begun with, or run the study under another name."
        return Finding("study", "FAIL", f"{found}{now.fingerprint[:12]}.", remedy)
    return Finding("study", "ok", f"{name}: stored, and {now.folder} holds the images it was begun with")
