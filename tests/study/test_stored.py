"""Studies in the storage: begun once, joined only under the contract that they were begun with."""

import subprocess
import sys
from dataclasses import replace

import optuna
import pytest

from frem_search.errors import ContractError
from frem_search.storage.database import open_storage
from frem_search.study.file import Sampler, load_study_file
from frem_search.study.space import Choice, Fixed, Range
from frem_search.study.stored import artifacts_prefix, make_contract, open_study, stored_contract


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def study_file(tiny_study):
    return load_study_file(str(tiny_study))


def contract_of(study_file, **changes):
    given = {
        "precision": "fp32",
        "dataset": "tiny",
        "dataset_fingerprint": "abc",
        "class_names": ("ground", "disc", "square"),
    }
    return make_contract(study_file, **(given | changes))


def everything(storage):
    with storage.engine.connect() as connection:
        tables = ("studies", "study_user_attributes", "study_system_attributes", "trials")
        return [connection.exec_driver_sql(f"SELECT * FROM {t} ORDER BY 1").all() for t in tables]


def test_a_study_is_stored_with_all_that_it_was_begun_with(storage, study_file):
    opened = open_study(storage, study_file, contract_of(study_file))
    stored = optuna.load_study(study_name="tiny", storage=storage.optuna)
    assert stored.direction.name == "MAXIMIZE"
    attrs = stored.user_attrs
    assert attrs["contract"] == contract_of(study_file) == stored_contract(storage, "tiny")
    assert (attrs["n_trials"], attrs["title"], attrs["uid"]) == (3, study_file.title, opened.uid)
    assert attrs["study_file"] == study_file.path.read_text()
    assert opened.artifacts_prefix == artifacts_prefix("tiny", opened.uid) == f"tiny-{opened.uid[:8]}"


def test_joining_changes_nothing(storage, study_file):
    first = open_study(storage, study_file, contract_of(study_file))
    before = everything(storage)
    again = open_study(storage, replace(study_file, n_trials=2), contract_of(study_file))
    assert (again.uid, again.id) == (first.uid, first.id)
    assert everything(storage) == before


def test_a_larger_budget_is_taken_over_and_a_smaller_one_not(storage, study_file):
    for asked, stored in ((5, 5), (4, 5), (50, 50)):
        study = open_study(storage, replace(study_file, n_trials=asked), contract_of(study_file))
        assert study.optuna.user_attrs["n_trials"] == stored


CHANGES = {
    "network": {"network": "se_unet"},
    "loss": {"loss": "another"},
    "score": {"score": "another"},
    "fold": {"fold": 1},
    "n_epochs": {"n_epochs": 4},
    "space": {"space": {"B": Range(0, 16), "X": Choice((1, 10)), "depth": Fixed(2)}},
    "sampler": {"sampler": Sampler(name="random")},
    "seed": {"sampler": Sampler(seed=1)},
    "n_startup_trials": {"sampler": Sampler(n_startup_trials=11)},
    "pruner": {"pruner": "asha", "pruner_settings": {"min_epochs": 1, "factor": 4}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_study_file_is_refused_by_the_name_of_the_key(storage, study_file, key):
    open_study(storage, study_file, contract_of(study_file))
    before = everything(storage)
    changed = replace(study_file, n_trials=99, **CHANGES[key])
    with pytest.raises(ContractError) as caught:
        open_study(storage, changed, contract_of(changed))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [key]
    assert lines[0].startswith("tiny: this study was begun with other settings")
    assert "frem-search study fork" in lines[-1]
    assert everything(storage) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "bf16"),
        ("dataset", "other"),
        ("dataset_fingerprint", "def"),
        ("class_names", ("ground", "square", "disc")),
    ],
)
def test_other_conditions_are_refused_too(storage, study_file, key, value):
    open_study(storage, study_file, contract_of(study_file))
    with pytest.raises(ContractError, match=f"\n  {key}: stored .*, now "):
        open_study(storage, study_file, contract_of(study_file, **{key: value}))


def test_the_order_and_the_spelling_of_parameters_do_not_matter(storage, study_file):
    open_study(storage, study_file, contract_of(study_file))
    turned = replace(study_file, space=dict(reversed(study_file.space.items())), title="Another title")
    open_study(storage, turned, contract_of(turned))


def test_a_space_of_every_kind_survives_the_storage(storage, study_file):
    space = {
        "a": Range(1, 9, step=2),
        "b": Range(1e-5, 1.0, log=True),
        "c": Choice(([32, 32], [64, 32])),
        "d": Choice((True, 1.5, "text")),
        "e": Fixed([32, 64]),
    }
    mixed = replace(study_file, space=space)
    for _ in range(2):
        open_study(storage, mixed, contract_of(mixed))


@pytest.mark.parametrize(("direction", "has_trial"), [("minimize", False), ("maximize", True)])
def test_a_study_of_another_program_is_left_alone(storage, study_file, direction, has_trial):
    study = optuna.create_study(storage=storage.optuna, study_name="tiny", direction=direction)
    if has_trial:
        study.ask()
    before = everything(storage)
    with pytest.raises(ContractError, match="tiny: the storage holds a study of this name that another program made"):
        open_study(storage, study_file, contract_of(study_file))
    assert everything(storage) == before


def test_no_contract_of_what_is_not_there(storage):
    assert stored_contract(storage, "nowhere") is None


OPEN = """
import sys
from frem_search.storage.database import open_storage
from frem_search.study.stored import make_contract, open_study
from frem_search.study.file import load_study_file
with open_storage(sys.argv[1]) as storage:
    study_file = load_study_file(sys.argv[2], n_trials=int(sys.argv[3]))
    given = {"precision": "fp32", "dataset": "tiny", "dataset_fingerprint": "f", "class_names": ("a", "b")}
    contract = make_contract(study_file, **given)
    print("ready", flush=True)
    sys.stdin.readline()
    print(open_study(storage, study_file, contract).uid)
"""


def test_two_processes_that_begin_a_study_at_once_share_it(storage_url, tiny_study):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, storage_url, str(tiny_study), str(n_trials)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for n_trials in (3, 7)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    uids = [process.communicate("\n", timeout=60)[0] for process in started]
    assert uids[0] == uids[1] != ""
    with open_storage(storage_url) as storage:
        (study,) = optuna.get_all_study_summaries(storage.optuna)
        assert study.user_attrs["n_trials"] == 7
