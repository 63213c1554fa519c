"""The checked form of a file in `studies/`, with `[quick]` and the options of the command merged into it."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from frem_search.errors import StudyFileError, did_you_mean
from frem_search.study.space import Range, Space, parse_space

PRECISIONS = ("auto", "fp32", "bf16")
SAMPLERS = ("tpe", "random", "gp", "qmc", "grid")
PRUNERS: dict[str, dict[str, int]] = {  # the settings of each, with what they are when the file is silent
    "none": {},
    "median": {"n_startup_trials": 5, "n_warmup_epochs": 0},
    "asha": {"min_epochs": 1, "factor": 4},
    "wilcoxon": {"n_startup_images": 5},
}


@dataclass(frozen=True)
class Sampler:
    """The `[sampler]` table: how parameters are suggested, and the seed from which everything of the study follows."""

    name: str = "tpe"
    seed: int = 0
    n_startup_trials: int = 10


@dataclass(frozen=True)
class StudyFile:
    """What a study file says, checked, with `[quick]` and the options of the command merged into it."""

    name: str
    path: Path
    text: str
    title: str
    dataset: str
    network: str
    n_trials: int
    n_epochs: int
    space: Space
    loss: str = "softmax_cross_entropy"
    score: str = "mean_iou"
    extra_scores: tuple[str, ...] = ()  # told of every complete trial too, and not searched for
    predictions_after: tuple[int, ...] = ()  # epochs whose predictions are kept with every trial
    fold: int = 0
    n_folds: int | None = None  # of a cross-validation; None trains and scores one fold
    precision: str = "auto"
    sampler: Sampler = field(default_factory=Sampler)
    pruner: str = "none"
    pruner_settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def folds(self) -> tuple[int, ...]:
        """Which folds a trial is trained and scored on."""
        return (self.fold,) if self.n_folds is None else tuple(range(self.n_folds))

    @property
    def n_epochs_of_trial(self) -> int:
        """Epochs of a trial: of all its folds together if they are trained one after another."""
        return self.n_epochs * len(self.folds) if self.is_pruned_by_fold else self.n_epochs

    @property
    def is_pruned_by_fold(self) -> bool:
        """Whether a trial's folds are trained one after another, so that the next one can be spared."""
        return self.pruner == "wilcoxon"


def studies_folders() -> tuple[Path, ...]:
    """Return where studies are looked up: the working directory first, then those that are shipped."""
    shipped = Path(__file__).parent / "shipped"  # by the wheel; in a checkout they lie beside the package
    return (Path("studies"), shipped if shipped.is_dir() else Path(__file__).parents[2] / "studies")


def list_study_files() -> list[Path]:
    """Return the path of every study that can be named, each name once."""
    found: dict[str, Path] = {}
    for folder in studies_folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def find_study_file(study: str) -> Path:
    """Return the path of a study's file.

    Args:
        study: A name, or a path that ends in `.toml`.

    Raises:
        StudyFileError: There is none, with the nearest name.
    """
    if study.endswith(".toml"):
        path = Path(study)
        if path.is_file():
            return path
        message = f"{study}: no such study file. Give the path of a .toml file, or the name of a study."
        raise StudyFileError(message)
    known = {path.stem: path for path in list_study_files()}
    if study in known:
        return known[study]
    message = (
        f"Unknown study {study!r}.{did_you_mean(study, known)} `frem-search study list` shows those that can be named; "
        "or give the path of a .toml file."
    )
    raise StudyFileError(message)


def load_study_file(
    study: str,
    *,
    quick: bool = False,
    dataset: str | None = None,
    n_trials: int | None = None,
    n_epochs: int | None = None,
) -> StudyFile:
    """Read and check a study file.

    Args:
        study: A name or a path.
        quick: Merge the file's `[quick]` table over the rest.
        dataset: Another dataset than the file's: a name or a folder. The study is then stored under another name.
        n_trials: Another budget than the file's.
        n_epochs: Another number of epochs than the file's.

    Raises:
        StudyFileError: A key or value is wrong; the message names file, key, what was expected and what was got.
    """
    path = find_study_file(study)
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text)
    # ValueError: TOML, UTF-8, or an integer of more digits than Python reads; RecursionError: nested too deep.
    except (ValueError, RecursionError) as error:
        message = f"{path}: not a TOML file: {error}. See docs/studies.md for its form."
        raise StudyFileError(message) from None
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}."
        raise StudyFileError(message) from None
    reader = _Reader(path)
    quick_table = reader.table(table, "quick")
    table.pop("quick", None)
    if quick:
        if not quick_table:
            message = f"{path}: --quick needs a [quick] table, but the file has none. Add one, or leave --quick out."
            raise StudyFileError(message)
        table = _merge(table, quick_table)
    else:
        _check_quick(reader, table, quick_table)
    name = path.stem + ("-quick" if quick else "")
    if dataset is not None and dataset != table.get("dataset"):
        table["dataset"] = dataset
        name += f"@{Path(dataset).resolve().name}"
    budget = table.get("budget")
    if isinstance(budget, dict):
        budget |= {key: n for key, n in (("n_trials", n_trials), ("n_epochs", n_epochs)) if n is not None}
    return reader.study(table, name=name, text=text)


def _check_quick(reader: "_Reader", table: dict[str, Any], quick_table: dict[str, Any]) -> None:
    """Tell a mistake in `[quick]` before somebody needs it; one outside it is told first, without it."""
    name = reader.path.stem
    reader.study(table, name=name, text="")
    try:
        reader.study(_merge(table, quick_table), name=name, text="")
    except StudyFileError as error:
        message = f"{error} So it is with [quick], which replaces key by key."
        raise StudyFileError(message) from None


def _merge(table: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Replace key by key; tables one level deep, so that a parameter is replaced whole."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] |= value
        else:
            merged[key] = dict(value) if isinstance(value, dict) else value
    return merged


class _Reader:
    """Checks the tables of one file; every message begins with the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def study(self, table: dict[str, Any], *, name: str, text: str) -> StudyFile:
        known = (
            "title",
            "dataset",
            "network",
            "loss",
            "score",
            "extra_scores",
            "predictions_after",
            "fold",
            "folds",
            "precision",
            "budget",
            "params",
            "sampler",
            "pruner",
        )
        self.known(table, "", known)
        budget, params = self.table(table, "budget"), self.table(table, "params")
        self.known(budget, "budget.", ("n_trials", "n_epochs"))
        n_folds, space = self.folds(table), parse_space(params, where=f"{self.path}: params")
        sampler = self.sampler(self.table(table, "sampler"))
        ranges = [name for name, param in space.items() if isinstance(param, Range)]
        if sampler.name == "grid" and ranges:
            self.wrong(f"params.{ranges[0]}", "expected a choice, as grid tries all, but got a range. List the values.")
        pruner, settings = self.pruner(self.table(table, "pruner"))
        if pruner == "wilcoxon" and n_folds is None:
            self.wrong("pruner.name", "wilcoxon compares folds, but there is one only. Add [folds] with n = 5, say.")
        return StudyFile(
            name=name,
            path=self.path,
            text=text,
            title=self.text(table, "title", default=name),
            dataset=self.text(table, "dataset"),
            network=self.text(table, "network"),
            loss=self.text(table, "loss", default="softmax_cross_entropy"),
            score=self.text(table, "score", default="mean_iou"),
            extra_scores=self.texts(table, "extra_scores"),
            predictions_after=self.epochs(table, "predictions_after"),
            fold=self.integer(table, "fold", low=0, default=0),
            n_folds=n_folds,
            precision=self.text(table, "precision", default="auto", among=PRECISIONS),
            n_trials=self.integer(budget, "budget.n_trials", low=1),
            n_epochs=self.integer(budget, "budget.n_epochs", low=1),
            space=space,
            sampler=sampler,
            pruner=pruner,
            pruner_settings=settings,
        )

    def folds(self, table: dict[str, Any]) -> int | None:
        if "folds" not in table:
            return None
        if "fold" in table:
            self.wrong("folds", "expected either fold, to train one, or [folds], to train all, but got both.")
        folds = self.table(table, "folds")
        self.known(folds, "folds.", ("n",))
        return self.integer(folds, "folds.n", low=2)

    def sampler(self, table: dict[str, Any]) -> Sampler:
        self.known(table, "sampler.", ("name", "seed", "n_startup_trials"))
        return Sampler(
            name=self.text(table, "sampler.name", default="tpe", among=SAMPLERS),
            seed=self.integer(table, "sampler.seed", low=0, default=0),
            n_startup_trials=self.integer(table, "sampler.n_startup_trials", low=1, default=10),
        )

    def pruner(self, table: dict[str, Any]) -> tuple[str, dict[str, int]]:
        name = self.text(table, "pruner.name", default="none", among=tuple(PRUNERS))
        settings = PRUNERS[name]
        self.known(table, "pruner.", ("name", *settings))
        lowest = {"n_warmup_epochs": 0, "factor": 2}
        return name, {
            key: self.integer(table, f"pruner.{key}", low=lowest.get(key, 1), default=default)
            for key, default in settings.items()
        }

    def known(self, table: Mapping[str, Any], prefix: str, known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                hint = did_you_mean(key, known, prefix=prefix)
                self.wrong(prefix + key, f"unknown key.{hint} Known here: {', '.join(known)}.")

    def table(self, table: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = table.get(key, {})
        if not isinstance(value, dict):
            self.wrong(key, f"expected a table, but got {value!r}. Write it as [{key}].")
        return dict(value)

    def text(
        self, table: Mapping[str, Any], key: str, *, default: str | None = None, among: Sequence[str] | None = None
    ) -> str:
        value = table.get(key.rpartition(".")[2], default)
        if not isinstance(value, str) or not value:
            got = "nothing" if value is None else repr(value)
            self.wrong(key, f"expected a text, but got {got}.")
        if among is not None and value not in among:
            self.wrong(key, f"expected one of {', '.join(among)}, but got {value!r}.")
        return str(value)

    def texts(self, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
            self.wrong(key, f"expected a list of texts, but got {value!r}.")
        return tuple(value)

    def epochs(self, table: Mapping[str, Any], key: str) -> tuple[int, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(type(each) is int and each > 0 for each in value):
            self.wrong(key, f"expected a list of epochs, from 1 on, but got {value!r}.")
        return tuple(value)

    def integer(self, table: Mapping[str, Any], key: str, *, low: int, default: int | None = None) -> int:
        value = table.get(key.rpartition(".")[2], default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
            got = "nothing" if value is None else repr(value)
            self.wrong(key, f"expected an integer of at least {low}, but got {got}.")
        return value

    def wrong(self, key: str, reason: str) -> NoReturn:
        message = f"{self.path}: {key}: {reason}"
        raise StudyFileError(message)
