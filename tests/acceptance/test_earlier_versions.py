"""What commit 4e0b6a7 stored is read by this version, and goes on with the same numbers.

`tests/data/from_4e0b6a7` was made by that commit on a CPU, with one thread: a search of four trials that SIGKILL ended
in the fourth epoch of trial 2, its backup and artifacts, the same search uninterrupted, and weights of `train`.
"""

import json
import shutil

import pytest
from places import MADE_BEFORE

from frem_search.segmentation.evaluate import evaluate
from frem_search.segmentation.weights import read_weights
from frem_search.storage.admin.backup import restore
from frem_search.storage.database import open_storage
from frem_search.study.record import read_record

HERE = MADE_BEFORE / "from_4e0b6a7"
UNINTERRUPTED = json.loads((HERE / "uninterrupted.json").read_text())
# On a processor like that of the commit the numbers are equal; another one may round otherwise.
ROUNDING = 0.005


@pytest.fixture
def images(home):
    shutil.copytree(HERE / "datasets", home / "datasets")


@pytest.fixture
def brought(home, images, empty_database_url):
    """The database of that commit, with its artifacts and images."""
    with open_storage(empty_database_url) as storage:
        assert restore(storage, HERE / "backup.frem") == (1, 3)
    shutil.copytree(HERE / "artifacts", home / "artifacts")
    return empty_database_url


def test_a_backup_is_restored_and_its_study_opens(brought):
    with open_storage(brought) as storage:
        record = read_record(storage, "tiny")
    assert [trial.state for trial in record.trials] == ["complete", "complete", "waiting"]
    assert [trial.value for trial in record.trials[:2]] == [UNINTERRUPTED[number]["value"] for number in "01"]
    assert record.trials[2].epoch == 3


def test_the_search_goes_on_from_its_checkpoint_and_comes_to_the_same_trials(brought, run_cli):
    ended = run_cli("run", "--study", HERE / "tiny.toml", "--device", "cpu", FREM_SEARCH_STORAGE=brought)
    assert ended.returncode == 0, ended.stderr
    assert "trial 2: goes on at epoch 3" in ended.stderr
    with open_storage(brought) as storage:
        trials = read_record(storage, "tiny").trials
    for trial, expected in zip(trials, UNINTERRUPTED.values(), strict=True):
        assert (trial.state, trial.params) == ("complete", expected["params"])
        assert trial.value == pytest.approx(expected["value"], abs=ROUNDING)
        test = trial.user_attrs["result"]["test"]["mean_iou"]
        assert test == pytest.approx(expected["result"]["test"]["mean_iou"], abs=ROUNDING)


@pytest.mark.parametrize(("part", "expected"), [("val", 0.5780268632259388), ("test", 0.596221626142886)])
def test_weights_score_what_they_scored(images, part, expected):
    scored = evaluate(read_weights(HERE / "weights.pt"), part=part, device="cpu")
    assert scored.value == pytest.approx(expected, abs=ROUNDING)


def test_a_kept_trial_predicts_and_is_repeated(brought, run_cli, tmp_path):
    picture = HERE / "datasets/tiny/imagesTr/case00_0000.png"
    options = ("--study", "tiny", "--trial", "0", "--device", "cpu")
    predicted = run_cli("predict", picture, *options, "--out", tmp_path / "out", FREM_SEARCH_STORAGE=brought)
    assert predicted.returncode == 0, predicted.stderr
    again = json.loads(run_cli("rerun", *options, "--json", FREM_SEARCH_STORAGE=brought).stdout)
    assert again["repeated"] == pytest.approx(again["stored"], abs=ROUNDING)
