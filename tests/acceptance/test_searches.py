"""Whole searches that train networks: interrupted, killed or side by side, they come to the same trials."""

import hashlib
import io
import itertools
import json
import signal
import time
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState
from searches import curves

from frem_search.bench.speed import Arrangement
from frem_search.errors import DeviceError
from frem_search.search import begin as begin_module
from frem_search.search.begin import open_worker
from frem_search.segmentation.inference import score_images
from frem_search.storage.database import open_storage
from frem_search.study.file import load_study_file
from frem_search.study.stored import keep_cohort
from frem_search.training import cohort as cohort_module


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_study(tiny_study):
    """The tiny study, learning fast enough for its trials to differ in their scores."""
    text = tiny_study.read_text().replace("batch_size = 4\n", "batch_size = 2\nlearning_rate = 0.01\n")
    tiny_study.write_text(text)
    return tiny_study


@pytest.fixture
def real(tiny_study, tmp_path):
    """Run `tiny_study` in a database with the real objective, and give what is left to compare."""
    study_file = load_study_file(str(tiny_study), n_epochs=6)

    def work(storage, *, artifacts="artifacts", stop_after=None, on_event=lambda _: None, **settings):
        url, events = str(tmp_path / artifacts), []
        settings |= {"device": "cpu", "is_stopping": lambda: stop_after and events.count("epoch") >= stop_after}
        with open_worker(study_file, storage, artifacts=url, **settings) as (study, worker, _):
            for event in worker.work():
                events.append(event.kind)  # is_stopping looks at it meanwhile
                on_event(event)
        return study, events

    return work


@pytest.fixture
def side_by_side(monkeypatch):
    """Let studies begin with a layout that nothing was measured for: `side_by_side("threads", cohort=2)`."""

    def begin_with(layout, *, cohort):
        def settle(study, *_, **__):
            kept = keep_cohort(study, {"cohort": cohort, "layout": layout})
            return Arrangement(cohort=kept["cohort"], layout=kept["layout"])

        monkeypatch.setattr(begin_module, "settle", settle)

    return begin_with


def outcome(study):
    found = []
    for trial in study.optuna.trials:
        result = trial.user_attrs["result"]
        found.append((trial.number, trial.state, trial.params, trial.value, trial.intermediate_values, result))
    return found


def without_seconds(curves_of_trials):
    return [{name: column for name, column in curve.items() if name != "seconds"} for curve in curves_of_trials]


@pytest.fixture(scope="module")
def found():
    """What was found once, for all tests of this module."""
    return {}


@pytest.fixture
def uninterrupted(postgres, _template, real, one_thread, found):
    """What the search comes to when nothing happens to it."""
    if not found:
        name = postgres.create(template=_template)
        with open_storage(postgres.url(name)) as storage:
            study, events = real(storage, artifacts="whole")
            assert events.count("complete") == 3
            found["trials"], found["curves"] = outcome(study), without_seconds(curves(storage))
        postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")
    return found["trials"], found["curves"]


def test_an_interrupted_search_comes_to_bitwise_the_same(storage, real, uninterrupted):
    assert len({trial[3] for trial in uninterrupted[0]}) == 3  # the trials do differ
    luck, n_released = np.random.default_rng(0), 0
    while True:
        study, events = real(storage, stop_after=luck.integers(1, 7), checkpoint_every_s=1000)
        n_released += events.count("released")
        if [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE] * 3:
            break
    assert n_released >= 2
    assert (outcome(study), without_seconds(curves(storage))) == uninterrupted


def test_a_torn_or_foreign_checkpoint_is_set_aside_and_changes_nothing(storage, real, uninterrupted, tmp_path):
    study, events = real(storage, stop_after=3)
    assert events[-1] == "released"
    checkpoint = tmp_path / "artifacts" / study.artifacts_prefix / "0" / "checkpoint.pt"
    whole_content = checkpoint.read_bytes()
    checkpoint.write_bytes(whole_content[: len(whole_content) // 2])
    real(storage, stop_after=2)
    set_aside = checkpoint.with_name("checkpoint.pt.unusable")
    assert set_aside.read_bytes() == whole_content[: len(whole_content) // 2]
    foreign = torch.load(checkpoint, weights_only=True)
    foreign["identity"]["study"] = "another"
    for fold in foreign["folds"]:
        fold["epoch"] = 5
    buffer = io.BytesIO()
    torch.save(foreign, buffer)
    whole_but_foreign = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    checkpoint.write_bytes(whole_but_foreign)
    real(storage, stop_after=2)
    assert set_aside.read_bytes() == whole_but_foreign
    study, events = real(storage)
    assert events.count("complete") == 3
    assert (outcome(study), without_seconds(curves(storage))) == uninterrupted
    assert not list(tmp_path.glob("artifacts/*/*/checkpoint*")), "finished trials need none, whole or set aside"


def failing_once(error, in_call):
    """Return what raises an error in one of its calls and validates in the others."""
    n_calls = itertools.count(1)

    def fail_once(*args, **kwargs):
        if next(n_calls) == in_call:
            raise error
        return score_images(*args, **kwargs)

    return fail_once


def test_a_trial_that_fails_leaves_no_checkpoint(storage, real, tmp_path, monkeypatch):
    real(storage, stop_after=1)
    (checkpoint,) = tmp_path.glob("artifacts/*/0/checkpoint.pt")
    monkeypatch.setattr(cohort_module, "score_images", failing_once(ZeroDivisionError("a bug"), in_call=1))
    left = {}

    def look(event):
        left.setdefault(event.kind, list(checkpoint.parent.iterdir()))

    study, events = real(storage, stop_after=1, on_event=look)
    assert events[:2] == ["adopted", "failed"]
    assert study.optuna.trials[0].user_attrs["reason"] == "ZeroDivisionError: a bug"
    assert (left["adopted"], left["failed"]) == ([checkpoint], [])


@pytest.mark.parametrize("in_call", [1, 4])
def test_a_device_that_fails_ends_the_worker_and_the_next_one_goes_on(
    storage, real, uninterrupted, monkeypatch, in_call
):
    error = torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it.")
    monkeypatch.setattr(cohort_module, "score_images", failing_once(error, in_call))
    with pytest.raises(DeviceError, match=r"^cpu: failed: CUDA error: unspecified launch failure\. This process"):
        real(storage)
    (trial,) = optuna.load_study(study_name="tiny", storage=storage.optuna).trials
    assert trial.state is TrialState.RUNNING
    study, events = real(storage)
    assert events[0] == "adopted"
    assert events.count("complete") == 3
    assert (outcome(study), without_seconds(curves(storage))) == uninterrupted


def test_a_search_killed_again_and_again_comes_to_bitwise_the_same(
    storage, storage_url, start_cli, run_cli, tiny_study, uninterrupted
):
    command = ["run", "--study", tiny_study, "--device", "cpu", "--n-epochs", 6, "--checkpoint-every", 0]
    luck = np.random.default_rng(0)
    for _ in range(2):
        process = start_cli(*command, FREM_SEARCH_STORAGE=storage_url)
        wait_for_epochs(storage, process, more=int(luck.integers(1, 4)))
        time.sleep(float(luck.random()) * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = run_cli(*command, "--json", FREM_SEARCH_STORAGE=storage_url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["states"]["complete"] == 3
    study = SimpleNamespace(optuna=optuna.load_study(study_name="tiny", storage=storage.optuna))
    assert (outcome(study), without_seconds(curves(storage))) == uninterrupted


def wait_for_epochs(storage, process, *, more):
    """Wait until the search has reported so many epochs more than it had."""
    before, deadline = n_reports(storage), time.monotonic() + 60
    while n_reports(storage) < before + more and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def n_reports(storage):
    with storage.engine.connect() as connection:
        return connection.execute(sa.text("SELECT count(*) FROM trial_intermediate_values")).scalar()


def assert_as_uninterrupted(storage, study, uninterrupted, *, is_exact):
    """Expect the trials of a search by one trial at a time: every bit, but for a stack."""
    trials, rows = outcome(study), without_seconds(curves(storage))
    if is_exact:
        assert (trials, rows) == uninterrupted
    for (number, state, params, value, _, _), row, trial, expected in zip(trials, rows, *uninterrupted, strict=True):
        assert (number, state, params) == trial[:3]
        assert row["epoch"] == expected["epoch"] == [1, 2, 3, 4, 5, 6]
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0, abs=2e-3)
        assert value == max(row["score"])


@pytest.mark.parametrize("layout", ["in_turn", "threads", "stacked"])
def test_trials_side_by_side_come_to_what_they_come_to_alone(storage, real, uninterrupted, side_by_side, layout):
    side_by_side(layout, cohort=2)
    study, events = real(storage)
    assert events[:2] == ["claimed"] * 2
    assert events.count("complete") == 3
    assert "waiting" not in events
    assert_as_uninterrupted(storage, study, uninterrupted, is_exact=layout != "stacked")
    provenance = [trial.user_attrs["provenance"] for trial in study.optuna.trials]
    assert [(each["cohort"], each["layout"]) for each in provenance] == [(2, layout)] * 3


@pytest.mark.parametrize("layout", ["threads", "stacked"])
def test_trials_side_by_side_that_are_stopped_again_and_again_come_to_the_same(
    storage, real, uninterrupted, side_by_side, layout
):
    side_by_side(layout, cohort=2)
    luck, n_released, states = np.random.default_rng(1), 0, []
    while states != [TrialState.COMPLETE] * 3:
        study, events = real(storage, stop_after=luck.integers(1, 9), checkpoint_every_s=1000)
        n_released += events.count("released")
        states = [trial.state for trial in study.optuna.trials]
    assert n_released >= 3
    assert_as_uninterrupted(storage, study, uninterrupted, is_exact=layout != "stacked")


@pytest.mark.parametrize("layout", ["threads", "stacked"])
def test_trials_side_by_side_whose_worker_is_killed_are_all_adopted_and_come_to_the_same(
    storage, storage_url, start_cli, tiny_study, tmp_path, real, uninterrupted, side_by_side, layout
):
    side_by_side(layout, cohort=2)
    real(storage, stop_after=1)  # the study has begun with this layout, and so the command takes it
    command = ["run", "--study", tiny_study, "--device", "cpu", "--n-epochs", 6, "--checkpoint-every", 0]
    places = {"FREM_SEARCH_STORAGE": storage_url, "FREM_SEARCH_ARTIFACTS": tmp_path / "artifacts"}
    process = start_cli(*command, **places)
    wait_for_epochs(storage, process, more=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    study = SimpleNamespace(optuna=optuna.load_study(study_name="tiny", storage=storage.optuna))
    assert [trial.state for trial in study.optuna.trials] == [TrialState.RUNNING] * 2
    _, events = real(storage)
    assert events[:2] == ["adopted"] * 2
    assert events.count("epoch") < 3 * 6 - 2, "the test needs checkpoints that are gone on from"
    assert events.count("complete") == 3
    assert_as_uninterrupted(storage, study, uninterrupted, is_exact=layout != "stacked")
