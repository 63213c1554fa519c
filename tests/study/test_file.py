"""Study files: every mistake is one StudyFileError that names file, key, what was expected and what was got."""

import json
import math
import os
from datetime import date, datetime, time

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from frem_search.errors import FremSearchError, StudyFileError
from frem_search.study.file import Sampler, find_study_file, list_study_files, load_study_file, studies_folders
from frem_search.study.space import Fixed, Range

GOOD = {
    "title": "A study",
    "dataset": "mouse_synthetic",
    "network": "unet",
    "budget": {"n_trials": 3, "n_epochs": 4},
    "params": {"base_channels": 4, "B": {"low": 0, "high": 16}},
}
TOP = (
    "title, dataset, network, loss, score, extra_scores, predictions_after, fold, folds, precision, budget, params, "
    "sampler, pruner"
)


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{inline(key)} = {inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool | int | float) else value.isoformat()


def to_toml(table):
    return "".join(f"{inline(key)} = {inline(value)}\n" for key, value in table.items())


def changed(key, value):
    """GOOD with one key, `section.key` or `key`, set to another value; to None, without it."""
    table = json.loads(json.dumps(GOOD))
    *sections, last = key.split(".")
    inner = table
    for section in sections:
        inner = inner.setdefault(section, {})
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return table


@pytest.fixture
def write(tmp_path):
    def write(table, name="some_study.toml"):
        path = tmp_path / name
        path.write_text(table if isinstance(table, str) else to_toml(table), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fails(write):
    """What the StudyFileError says about a table, without the file that it must begin with."""

    def fails(table, **options):
        path = write(table)
        with pytest.raises(StudyFileError) as raised:
            load_study_file(str(path), **options)
        assert str(raised.value).startswith(f"{path}: ")
        assert raised.value.exit_status == 2
        return str(raised.value).removeprefix(f"{path}: ")

    return fails


def test_what_a_file_leaves_out_has_its_usual_value(write):
    path = write(GOOD)
    loaded = load_study_file(str(path))
    assert (loaded.name, loaded.path, loaded.text) == ("some_study", path, path.read_text())
    assert (loaded.title, loaded.dataset, loaded.network) == ("A study", "mouse_synthetic", "unet")
    assert (loaded.n_trials, loaded.n_epochs, loaded.fold) == (3, 4, 0)
    assert (loaded.loss, loaded.score, loaded.precision) == ("softmax_cross_entropy", "mean_iou", "auto")
    assert loaded.space == {"base_channels": Fixed(4), "B": Range(0, 16)}
    assert loaded.sampler == Sampler(name="tpe", seed=0, n_startup_trials=10)
    assert (loaded.pruner, loaded.pruner_settings) == ("none", {})


def test_what_a_file_sets_is_what_is_loaded(write):
    sampler = {"name": "gp", "seed": 7, "n_startup_trials": 2}
    path = write(GOOD | {"fold": 2, "precision": "bf16", "sampler": sampler, "pruner": {"name": "asha", "factor": 3}})
    loaded = load_study_file(str(path))
    assert (loaded.fold, loaded.precision) == (2, "bf16")
    assert loaded.sampler == Sampler(name="gp", seed=7, n_startup_trials=2)
    assert (loaded.pruner, loaded.pruner_settings) == ("asha", {"min_epochs": 1, "factor": 3})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("titel", "A", f"titel: unknown key. Did you mean 'title'? Known here: {TOP}."),
        ("qqq", {"a": 1}, f"qqq: unknown key. Known here: {TOP}."),
        (
            "budget.n_trails",
            3,
            "budget.n_trails: unknown key. Did you mean 'budget.n_trials'? Known here: n_trials, n_epochs.",
        ),
        (
            "sampler.sed",
            3,
            "sampler.sed: unknown key. Did you mean 'sampler.seed'? Known here: name, seed, n_startup_trials.",
        ),
        ("pruner.factor", 3, "pruner.factor: unknown key. Known here: name."),
        (
            "pruner",
            {"name": "asha", "min_epoch": 3},
            "unknown key. Did you mean 'pruner.min_epochs'? Known here: name, min_epochs",
        ),
        (
            "pruner",
            {"name": "median", "factor": 3},
            "pruner.factor: unknown key. Known here: name, n_startup_trials, n_warmup",
        ),
        (
            "params.B.hihg",
            3,
            "params.B: a range has the keys low and high, and may have log and step, but got low, high, hihg.",
        ),
        ("quick.budgt", {"n_trials": 1}, "budgt: unknown key. Did you mean 'budget'?"),
        ("quick.quick", {}, "quick: unknown key."),
    ],
)
def test_an_unknown_key_is_told_at_every_level(fails, key, value, says):
    assert says in fails(changed(key, value))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folds": 5}, "folds: expected a table, but got 5. Write it as [folds]."),
        ({"folds": {}}, "folds.n: expected an integer of at least 2, but got nothing."),
        ({"folds": {"n": 1}}, "folds.n: expected an integer of at least 2, but got 1."),
        ({"folds": {"k": 5}}, "folds.k: unknown key. Known here: n."),
        ({"folds": {"n": 5}, "fold": 1}, "folds: expected either fold, to train one, or [folds], to train all, but"),
        ({"pruner": {"name": "wilcoxon"}}, "pruner.name: wilcoxon compares folds, but there is one only."),
        ({"extra_scores": "seg"}, "extra_scores: expected a list of texts, but got 'seg'."),
        ({"predictions_after": 3}, "predictions_after: expected a list of epochs, from 1 on, but got 3."),
        ({"predictions_after": [0]}, "predictions_after: expected a list of epochs, from 1 on, but got [0]."),
        ({"extra_scores": [1]}, "extra_scores: expected a list of texts, but got [1]."),
        ({"sampler": {"name": "grid"}}, "params.B: expected a choice, as grid tries all, but got a range."),
    ],
)
def test_folds_scores_and_grids_that_cannot_be_are_told(fails, changes, says):
    assert fails(GOOD | changes).startswith(says)


@pytest.mark.parametrize("key", ["dataset", "network", "budget", "budget.n_trials", "budget.n_epochs"])
def test_a_missing_key_is_told(fails, key):
    told = fails(changed(key, None))
    assert told.startswith(key)
    assert "but got nothing." in told


@pytest.mark.parametrize("key", ["title", "dataset", "network", "loss", "score"])
@pytest.mark.parametrize("value", [3, 1.5, True, ["a"], {"a": 1}, "", math.nan, date(2026, 1, 1)])
def test_a_text_must_be_a_text(fails, key, value):
    assert fails(changed(key, value)) == f"{key}: expected a text, but got {value!r}."


@pytest.mark.parametrize(
    ("key", "lowest"),
    [
        ("fold", 0),
        ("budget.n_trials", 1),
        ("budget.n_epochs", 1),
        ("sampler.seed", 0),
        ("sampler.n_startup_trials", 1),
        ("pruner.n_startup_trials", 1),
        ("pruner.n_warmup_epochs", 0),
        ("pruner.min_epochs", 1),
        ("pruner.factor", 2),
    ],
)
@pytest.mark.parametrize("value", ["3", 3.0, True, [3], {"low": 1, "high": 2}, -1, 2**63, 10**300, math.nan, math.inf])
def test_an_integer_must_be_an_integer_in_its_bounds(fails, key, lowest, value):
    table = changed(key, value)
    if key.startswith("pruner."):
        table["pruner"]["name"] = "asha" if key in ("pruner.min_epochs", "pruner.factor") else "median"
    assert fails(table).startswith(f"{key}: expected an integer of at least {lowest}, but got {value!r}.")


@pytest.mark.parametrize("key", ["budget", "params", "sampler", "pruner", "quick"])
@pytest.mark.parametrize("value", [3, "x", [1], [{"n_trials": 1}], False, time(1, 2)])
def test_a_table_must_be_a_table(fails, key, value):
    assert fails(changed(key, value)) == f"{key}: expected a table, but got {value!r}. Write it as [{key}]."


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("precision", "fp16", "precision: expected one of auto, fp32, bf16, but got 'fp16'."),
        ("sampler.name", "TPE", "sampler.name: expected one of tpe, random, gp, qmc, grid, but got 'TPE'."),
        ("pruner.name", "hyperband", "pruner.name: expected one of none, median, asha, wilcoxon, but got 'hyperband'."),
        ("params.B", {"low": 2, "high": 1}, "params.B: low must be below high, but got 2 and 1. Swap them"),
        ("params.B", [], "params.B: a choice needs at least one value, but got []."),
        ("params.X", {"low": 0.0, "high": 1.0, "log": True}, "params.X: a logarithmic range must begin above 0"),
        ("params.X", {"low": 1, "high": 5, "step": 3}, "params.X.step: expected a step that leads from 1 to 5"),
        ("params.X", math.nan, "params.X: expected a finite number, but got nan."),
        ("params.X", 10**400, "params.X: expected an integer of at most 64 bits, but got one of 1329 bits."),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(fails, key, value, says):
    assert fails(changed(key, value)).startswith(says)


@pytest.mark.parametrize(
    ("quick", "says"),
    [
        (3, "quick: expected a table, but got 3."),
        ({"budget": 3}, "budget: expected a table, but got 3. Write it as [budget]. So it is with [quick]"),
        (
            {"budget": {"n_trials": 0}},
            "budget.n_trials: expected an integer of at least 1, but got 0. So it is with [quick]",
        ),
        (
            {"params": {"B": {"low": 3}}},
            "params.B: a range has the keys low and high, and may have log and step, but got low",
        ),
        ({"dataset": 1}, "dataset: expected a text, but got 1. So it is with [quick]"),
    ],
)
@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_mistake_in_quick_is_told_whether_or_not_it_is_asked_for(fails, quick, says, is_asked_for):
    told = fails(GOOD | {"quick": quick}, quick=is_asked_for)
    assert told.startswith(says if not is_asked_for else says.partition(" So it is")[0])


def test_a_mistake_outside_quick_is_not_blamed_on_it(fails):
    told = fails(changed("fold", -1) | {"quick": {"budget": {"n_trials": 1}}})
    assert told == "fold: expected an integer of at least 0, but got -1."


def test_quick_without_a_table_for_it(fails):
    told = fails(GOOD, quick=True)
    assert told == "--quick needs a [quick] table, but the file has none. Add one, or leave --quick out."


def test_quick_replaces_key_by_key_and_a_parameter_whole(write):
    table = changed("params.X", {"low": 1.0, "high": 1000.0, "log": True})
    quick = {"budget": {"n_trials": 1}, "params": {"X": 3, "depth": 2}, "sampler": {"seed": 5}}
    path = str(write(table | {"quick": quick}))
    loaded = load_study_file(path, quick=True)
    assert (loaded.name, loaded.n_trials, loaded.n_epochs) == ("some_study-quick", 1, 4)
    assert loaded.space == {"base_channels": Fixed(4), "B": Range(0, 16), "X": Fixed(3), "depth": Fixed(2)}
    assert loaded.sampler.seed == 5
    assert load_study_file(path).space["X"] == Range(1.0, 1000.0, log=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"dataset = ", "Invalid value"),
        (b"this is no TOML", "Expected '=' after a key"),
        (b"a = 1\na = 2", "Cannot overwrite a value"),
        (b"a = 2026-02-30", "Invalid date or datetime"),
        (b'title = "\xff\xfe"', "can't decode byte 0xff"),
        (b"\x00\x01\x02", "Invalid"),
        (b"\x89PNG\r\n\x1a\n", "can't decode byte 0x89"),
        (b"a = " + b"1" * 5000, "5000 digits"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "recursion"),
    ],
)
def test_not_a_toml_file(tmp_path, content, says):
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    with pytest.raises(StudyFileError) as raised:
        load_study_file(str(path))
    assert str(raised.value).startswith(f"{path}: not a TOML file: ")
    assert says in str(raised.value)
    assert str(raised.value).endswith(". See docs/studies.md for its form.")


def test_an_empty_file_lacks_its_first_key(fails):
    assert fails("") == "dataset: expected a text, but got nothing."


def test_files_of_other_systems_are_read(tmp_path):
    path = tmp_path / "s.toml"
    path.write_bytes(b"\xef\xbb\xbf" + to_toml(GOOD).replace("\n", "\r\n").encode())
    assert load_study_file(str(path)).n_trials == 3


def test_a_folder_is_no_study_file(tmp_path):
    folder = tmp_path / "s.toml"
    folder.mkdir()
    with pytest.raises(
        StudyFileError, match=r"s\.toml: no such study file\. Give the path of a \.toml file, or the name"
    ):
        load_study_file(str(folder))


def test_a_path_that_is_not_there():
    with pytest.raises(StudyFileError, match=r"^nowhere/s\.toml: no such study file\."):
        load_study_file("nowhere/s.toml")


def test_a_file_that_cannot_be_read(write, monkeypatch):
    path = write(GOOD)

    def refuse(*_, **__):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(StudyFileError, match=rf"^{path}: cannot be read: Permission denied\."):
        load_study_file(str(path))


def test_an_unknown_study_is_told_with_the_nearest_name():
    with pytest.raises(StudyFileError) as raised:
        load_study_file("mouse_fram")
    expected = (
        "Unknown study 'mouse_fram'. Did you mean 'mouse_frem'? `frem-search study list` shows those that can be named"
    )
    assert str(raised.value).startswith(expected)
    assert str(raised.value).endswith("or give the path of a .toml file.")


@pytest.mark.parametrize("name", ["", "zzz", "../mouse_frem", "mouse_frem.toml.", "a\0b"])
def test_a_name_like_no_other(name):
    with pytest.raises(StudyFileError, match=r"^Unknown study "):
        find_study_file(name)


def test_without_any_studies_the_message_still_helps(monkeypatch):
    monkeypatch.setattr("frem_search.study.file.studies_folders", lambda: ())
    with pytest.raises(StudyFileError, match=r"^Unknown study 'x'\. .*; or give the path of a \.toml file\."):
        find_study_file("x")


def test_the_working_directory_goes_before_what_is_shipped(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    write(changed("title", "mine"), "studies/mouse_frem.toml")
    write(GOOD, "studies/another.toml")
    assert load_study_file("mouse_frem").title == "mine"
    names = [path.stem for path in list_study_files()]
    assert names == sorted(set(names))
    assert {"another", "mouse_frem", "mouse_unet"} <= set(names)


@pytest.mark.parametrize(
    ("options", "name", "dataset"),
    [
        ({}, "some_study", "mouse_synthetic"),
        ({"quick": True}, "some_study-quick", "drosophila_synthetic"),
        ({"dataset": "mouse_synthetic"}, "some_study", "mouse_synthetic"),
        ({"dataset": "mouse"}, "some_study@mouse", "mouse"),
        ({"dataset": "drosophila_synthetic", "quick": True}, "some_study-quick", "drosophila_synthetic"),
        ({"dataset": "mouse", "quick": True}, "some_study-quick@mouse", "mouse"),
        ({"dataset": "/data/Liver 2/"}, "some_study@Liver 2", "/data/Liver 2/"),
        ({"dataset": "data/../cells"}, "some_study@cells", "data/../cells"),
    ],
)
def test_a_study_is_stored_under_a_name_for_what_it_trains_on(write, options, name, dataset):
    path = write(GOOD | {"quick": {"dataset": "drosophila_synthetic"}})
    loaded = load_study_file(str(path), **options)
    assert (loaded.name, loaded.dataset) == (name, dataset)


def test_the_working_directory_as_a_dataset_has_a_name(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    assert load_study_file(str(write(GOOD)), dataset=".").name == f"some_study@{tmp_path.name}"


def test_an_empty_dataset_is_refused(fails):
    assert fails(GOOD, dataset="") == "dataset: expected a text, but got ''."


def test_a_budget_on_the_command_line_goes_before_the_file(write):
    path = str(write(GOOD | {"quick": {"budget": {"n_trials": 1, "n_epochs": 1}}}))
    for quick in (True, False):
        loaded = load_study_file(path, quick=quick, n_trials=7, n_epochs=8)
        assert (loaded.n_trials, loaded.n_epochs) == (7, 8)


SHIPPED = [
    pytest.param(path, quick, id=f"{path.stem}{'-quick' if quick else ''}")
    for folder in studies_folders()[1:]
    for path in sorted(folder.glob("*.toml"))
    for quick in (False, True)
]


def test_studies_are_shipped():
    assert len(SHIPPED) >= 74


@pytest.mark.parametrize(("path", "quick"), SHIPPED)
def test_every_shipped_study_passes_every_check(path, quick):
    from frem_search.data import DATASETS
    from frem_search.training.recipe import check

    loaded = load_study_file(str(path), quick=quick)
    check(loaded)
    assert loaded.dataset in DATASETS
    assert loaded.title.strip()
    if quick:  # on generated images where there are any
        own = load_study_file(str(path)).dataset
        assert loaded.dataset == (f"{own}_synthetic" if f"{own}_synthetic" in DATASETS else own)


texts = st.text(max_size=5)
scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.dates(min_value=date(1000, 1, 1))
    | st.datetimes(min_value=datetime(1000, 1, 1))
    | st.sampled_from([10**400, 2**63, -(2**63), "tpe", "asha", "median", "bf16"])
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
counts = st.integers(1, 100)


def mostly(good, **keys):
    """A table whose keys are as often right as not, sometimes missing, sometimes with strangers among them."""
    right = st.fixed_dictionaries(keys)
    wrong = st.sampled_from(sorted(keys)).flatmap(lambda key: junk.map(lambda value: {key: value}))
    stranger = st.dictionaries(texts, junk, min_size=1, max_size=1)
    return (
        right | st.builds(lambda a, b: a | b, right, wrong | stranger) | st.fixed_dictionaries({}, optional=keys) | good
    )


names = st.sampled_from(["mouse", "/some/folder"])
tables = mostly(
    st.dictionaries(texts, junk, max_size=3),
    dataset=names,
    network=st.just("unet"),
    budget=mostly(junk, n_trials=counts, n_epochs=counts),
    params=st.dictionaries(st.sampled_from(["B", "X", "depth", "é", "a b"]), junk, max_size=3)
    | st.fixed_dictionaries({"B": st.fixed_dictionaries({"low": counts, "high": counts | st.floats()})}),
    sampler=mostly(st.just({}), name=st.sampled_from(["tpe", "qmc"]), seed=counts),
    pruner=mostly(st.just({}), name=st.sampled_from(["asha", "median", "none"])),
    quick=st.just({}) | mostly(st.just({}), dataset=names, params=st.dictionaries(texts, junk, max_size=2)),
)


@given(table=tables, quick=st.booleans())
@settings(
    derandomize=True,
    max_examples=1000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_whatever_stands_in_a_file_it_loads_or_is_a_study_file_error(tmp_path_factory, table, quick):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(to_toml(table), encoding="utf-8")
    try:
        loaded = load_study_file(str(path), quick=quick)
    except FremSearchError as error:
        assert (type(error), str(error)[: len(f"{path}: ")]) == (StudyFileError, f"{path}: ")  # noqa: PT017 both may be
        return
    assert 1 <= loaded.n_trials < 2**63
    assert loaded.name == "any" + ("-quick" if quick else "")


values = st.sampled_from(
    [
        0,
        1,
        2,
        3,
        4,
        17,
        -1,
        0.5,
        1e300,
        "batch_norm",
        "x",
        True,
        [1, 2],
        [[8, 8]],
        {"value": [8, 8]},
        {"value": {}},
        [True, False],
        {"low": 0, "high": 4},
        {"low": 0.5, "high": 1},
        {"low": 1, "high": 2000},
        date(2026, 1, 1),
        2**62,
    ]
)
some_params = st.dictionaries(
    st.sampled_from(
        [
            "B",
            "X",
            "base_channels",
            "depth",
            "normalization",
            "image_size",
            "supervision",
            "lambda",
            "learning_rate",
            "batch_size",
            "augmentation",
            "se_reduction",
            "nothing",
        ]
    ),
    values,
    max_size=3,
)


@given(params=some_params)
@settings(
    derandomize=True, max_examples=1000, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_whatever_the_parameters_are_they_pass_or_are_a_study_file_error(tmp_path_factory, params):
    from frem_search.training.recipe import check

    # Networks list the widths of all levels first, here more than there is memory for. Remove when they refuse it.
    assume(params.get("depth") != 2**62)
    path = tmp_path_factory.getbasetemp() / "params.toml"
    path.write_text(to_toml(GOOD | {"params": {"base_channels": 2, "depth": 1} | params}), encoding="utf-8")
    try:
        check(load_study_file(str(path)))
    except StudyFileError as error:
        assert str(error).startswith(f"{path}: params")  # noqa: PT017 both outcomes are right
