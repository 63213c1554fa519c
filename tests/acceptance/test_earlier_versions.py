"""What commit 4e0b6a7 stored is read by this version, and goes on with the same numbers.

The files in `from_4e0b6a7` were written by that commit on a CPU with AVX2, one thread:

    frem-search run --study tiny.toml --device cpu --checkpoint-every 0      # SIGKILL in the fourth epoch of trial 2
    frem-search db backup --out backup.frem
    frem-search train --study tiny.toml --set B=4 --set X=100 --out weights.pt --device cpu

`expected.json` has what an uninterrupted run of the same commit came to, and what `evaluate` said of the weights.
"""

import json
import shutil

import imagecodecs
import numpy as np
import pytest
from places import MADE_BEFORE

from frem_search.segmentation.evaluate import evaluate
from frem_search.segmentation.weights import read_weights
from frem_search.storage.admin.backup import restore
from frem_search.storage.database import open_storage
from frem_search.study.record import read_record

EXPECTED = json.loads((MADE_BEFORE / "expected.json").read_text())
TRIALS = EXPECTED["trials"]
# As the golden losses: other processors add in another order.
ROUNDING = {"rel": 1e-4}


@pytest.fixture
def images(home):
    shutil.copytree(MADE_BEFORE / "datasets", home / "datasets")


@pytest.fixture
def brought(home, images, empty_database_url):
    """The database of that commit, with its artifacts and images."""
    with open_storage(empty_database_url) as storage:
        assert restore(storage, MADE_BEFORE / "backup.frem") == (1, 3)
    shutil.copytree(MADE_BEFORE / "artifacts", home / "artifacts")
    return empty_database_url


def test_a_backup_is_restored_and_its_study_opens(brought):
    with open_storage(brought) as storage:
        record = read_record(storage, "tiny")
    assert [trial.state for trial in record.trials] == ["complete", "complete", "waiting"]
    assert [trial.value for trial in record.trials[:2]] == [TRIALS[number]["value"] for number in "01"]
    assert record.trials[2].epoch == 3


def test_the_search_goes_on_from_its_checkpoint_and_comes_to_the_same_trials(brought, run_cli):
    ended = run_cli("run", "--study", MADE_BEFORE / "tiny.toml", "--device", "cpu", FREM_SEARCH_STORAGE=brought)
    assert ended.returncode == 0, ended.stderr
    assert "trial 2: goes on at epoch 3" in ended.stderr
    with open_storage(brought) as storage:
        trials = read_record(storage, "tiny").trials
    for trial, expected in zip(trials, TRIALS.values(), strict=True):
        assert (trial.state, trial.params) == ("complete", expected["params"])
        assert trial.curve["train_loss"] == pytest.approx(expected["train_loss"], **ROUNDING)
        assert trial.curve["score"] == pytest.approx(expected["score"], **ROUNDING)
        assert trial.value == pytest.approx(expected["value"], **ROUNDING)
        test = trial.user_attrs["result"]["test"]["mean_iou"]
        assert test == pytest.approx(expected["result"]["test"]["mean_iou"], **ROUNDING)


@pytest.mark.parametrize("part", ["val", "test"])
def test_weights_score_what_they_scored(images, part):
    scored = evaluate(read_weights(MADE_BEFORE / "weights.pt"), part=part, device="cpu")
    assert scored.value == pytest.approx(EXPECTED["weights"][part], **ROUNDING)


def test_a_kept_trial_predicts_and_is_repeated(brought, run_cli, tmp_path):
    (folder,) = (MADE_BEFORE / "artifacts").glob("*/0")
    stored = np.load(folder / "predictions.npz")
    pictures = [MADE_BEFORE / f"datasets/tiny/imagesTr/{case}_0000.png" for case in stored["cases"]]
    options = ("--study", "tiny", "--trial", "0", "--device", "cpu")
    predicted = run_cli("predict", *pictures, *options, "--out", tmp_path / "out", FREM_SEARCH_STORAGE=brought)
    assert predicted.returncode == 0, predicted.stderr
    for path, pred in zip(predicted.stdout.split()[::2], stored["pred"], strict=True):
        assert (imagecodecs.png_decode((tmp_path / path).read_bytes()) == pred).mean() > 0.999
    again = json.loads(run_cli("rerun", *options, "--json", FREM_SEARCH_STORAGE=brought).stdout)
    assert again["repeated"] == pytest.approx(again["stored"], **ROUNDING)
