"""The two JSON files of an nnU-Net folder: `dataset.json` and `splits_final.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from frem_search.data.folds import Split
from frem_search.data.images import ENDINGS
from frem_search.errors import DatasetError

EXAMPLE = (
    '{"channel_names": {"0": "grey"}, "labels": {"background": 0, "membrane": 1}, "numTraining": 50, '
    '"file_ending": ".png"}'
)


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says; the index of a class is its label value."""

    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    n_training: int


def read_description(folder: Path) -> Description:
    """Read and check `dataset.json`."""
    file = folder / "dataset.json"
    content = _read_json(file, remedy=f"A dataset folder holds one like {EXAMPLE}.")
    if not isinstance(content, dict):
        _refuse(file, "an object", content, f"Write it like {EXAMPLE}.")
    channel_names, labels = _mapping(file, content, "channel_names"), _mapping(file, content, "labels")
    n_training, ending = content.get("numTraining"), content.get("file_ending")
    if not isinstance(n_training, int) or isinstance(n_training, bool):
        _refuse(file, "numTraining: the number of cases in imagesTr", n_training, "Count them.")
    if not isinstance(ending, str) or ending.lower() not in ENDINGS:
        _refuse(file, f"file_ending: one of {', '.join(ENDINGS)}", ending, "Only 2-D PNG and TIFF images are read.")
    return Description(_class_names(file, labels), _channel_names(file, channel_names), n_training)


def read_splits(file: Path, *, training: Sequence[str], extra_test: Sequence[str]) -> tuple[Split, ...]:
    """Read and check `splits_final.json`.

    Args:
        file: Its path.
        training: The cases of imagesTr, any of which may train, validate or test.
        extra_test: The cases of imagesTs, which test in every fold that has no `test` of its own.
    """
    content = _read_json(file, remedy="Remove the file to get random folds.")
    shape = 'a list of folds {"train": [...], "val": [...]}, each with an optional "test": [...]'
    if not isinstance(content, list) or not content:
        _refuse(file, shape, content, "Remove the file to get random folds.")
    known = {"train": set(training), "val": set(training), "test": {*training, *extra_test}}
    return tuple(
        _fold(file, k, fold, known=known, extra_test=extra_test, shape=shape) for k, fold in enumerate(content)
    )


def _fold(
    file: Path, k: int, fold: object, *, known: Mapping[str, set[str]], extra_test: Sequence[str], shape: str
) -> Split:
    if not isinstance(fold, dict) or not {"train", "val"} <= set(fold) <= {"train", "val", "test"}:
        _refuse(file, shape, fold, f"Mend fold {k}.")
    parts: dict[str, tuple[str, ...]] = {"test": tuple(extra_test)}
    for part, cases in fold.items():
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            _refuse(
                file, f"fold {k}: {part}: a list of case names", cases, "Write names as in labelsTr, without ending."
            )
        if unknown := sorted(set(cases) - known[part]):
            _refuse(file, f"fold {k}: {part}: cases of this dataset", unknown[:5], "Remove them, or add their images.")
        parts[part] = tuple(cases)
    for part in ("train", "val"):
        if not parts[part]:
            _refuse(file, f"fold {k}: {part}: at least one case", [], "Move cases there.")
    together = [*parts["train"], *parts["val"], *parts["test"]]
    if twice := sorted({case for case in together if together.count(case) > 1}):
        _refuse(file, f"fold {k}: every case in one part, once", twice[:5], "Remove the repetition.")
    return Split(parts["train"], parts["val"], parts["test"])


def _class_names(file: Path, labels: Mapping[str, Any]) -> tuple[str, ...]:
    if "ignore" in labels:
        _refuse(file, 'labels without "ignore", which is not supported', dict(labels), "Give those pixels a class.")
    values = list(labels.values())
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        _refuse(
            file, "labels: one whole number per class (regions are not supported)", dict(labels), "Use plain classes."
        )
    if sorted(values) != list(range(len(values))) or not 2 <= len(values) <= 256:
        _refuse(file, "labels: 2 to 256 classes numbered 0, 1, 2, ... without gaps", dict(labels), "Renumber them.")
    return tuple(sorted(labels, key=lambda name: labels[name]))


def _channel_names(file: Path, channels: Mapping[str, Any]) -> tuple[str, ...]:
    keys = [str(i) for i in range(len(channels))]
    if not channels or sorted(channels) != sorted(keys):
        _refuse(file, 'channel_names: keys "0", "1", ... without gaps', dict(channels), "Renumber them.")
    return tuple(str(channels[key]) for key in keys)


def _mapping(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content.get(key), dict):
        _refuse(file, f"{key}: an object", content.get(key), f"Write it like {EXAMPLE}.")
    return content[key]


def _read_json(file: Path, *, remedy: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{file}: expected a readable file, but got: {error.strerror}. {remedy}"
        raise DatasetError(message) from error
    except ValueError as error:
        message = f"{file}: expected JSON, but got: {error}. {remedy}"
        raise DatasetError(message) from error


def _refuse(file: Path, expected: str, got: object, remedy: str) -> NoReturn:
    shown = "nothing" if got is None else json.dumps(got, ensure_ascii=False, default=str)
    message = f"{file}: expected {expected}, but got {shown[:200]}. {remedy}"
    raise DatasetError(message)
