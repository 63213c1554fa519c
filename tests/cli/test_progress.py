"""What a search says while it runs: each piece of news once, and of every trial in training now and then."""

import io
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console

from frem_search.cli import progress
from frem_search.cli.progress import show_progress
from frem_search.search.events import TrialEvent
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.training.member import EpochReport

CONTRACT = {"n_epochs": 30, "space": {"B": {"low": 0, "high": 16, "log": False, "step": None}, "depth": {"value": 2}}}
PARAMS = {"B": 8, "depth": 2}


def make_record(*trials, n_trials=3):
    return StudyRecord("s", "A title", "mouse", "mean_iou", n_trials, ("ground", "cell"), CONTRACT, trials)


def finished(value):
    return TrialRecord(0, "complete", value, PARAMS, {}, None, None, {})


@pytest.fixture
def told(capsys):
    """The lines that events make."""

    def told(*events, record=None):
        show_progress(iter(events), record or make_record())
        return capsys.readouterr().err.splitlines()

    return told


def begun(number=0):
    return TrialEvent("claimed", number, params=PARAMS)


def epoch(number, done, score=0.5):
    return TrialEvent(
        "epoch", number, epoch=done, report=EpochReport(number, done, 0.1, score, score, True, False, 1.0)
    )


def test_it_begins_with_how_far_the_study_is(told):
    assert told() == ["s: 0 of 3 trials finished"]
    assert told(record=make_record(finished(0.5))) == ["s: 1 of 3 trials finished"]


@pytest.mark.parametrize(
    ("adopted", "says"),
    [
        ({"epoch": 21}, "goes on at epoch 21"),
        ({"epoch": 0}, "starts again: no checkpoint"),
        (
            {"reason": "artifacts/s-1/0/checkpoint.pt.unusable"},
            "starts again: its checkpoint could not be used and is set aside as artifacts/s-1/0/checkpoint.pt.unusable",
        ),
    ],
)
def test_of_an_adopted_trial_it_is_told_where_it_goes_on(told, adopted, says):
    assert told(TrialEvent("adopted", 0, params=PARAMS, **adopted))[1:] == [f"trial 0: {says}"]


def test_counts_and_the_best_are_those_of_the_whole_study(told):
    """Other workers finish trials too: neither is counted here."""
    events = [
        begun(4),
        TrialEvent("complete", 4, value=0.6, n_finished=5, is_best=False),
        begun(5),
        TrialEvent("complete", 5, value=0.55, n_finished=8, is_best=True),
    ]
    assert told(*events, record=make_record(finished(0.5), n_trials=9))[1:] == [
        "[5/9] trial 4: mean_iou 0.6000  B 8",
        "[8/9] trial 5: mean_iou 0.5500  B 8  best so far",
    ]


def test_a_trial_that_was_given_up_before_it_was_begun_here(told):
    assert told(TrialEvent("failed", 2, reason="3 attempts in a row", n_finished=1))[1:] == [
        "trial 2: failed: 3 attempts in a row"
    ]


def test_no_name_is_doubled(told):
    reason = "trial 4: another worker holds it now, so this worker lets go of it."
    assert told(begun(4), TrialEvent("lost", 4, reason=reason))[1:] == [
        "trial 4: lost: another worker holds it now, so this worker lets go of it."
    ]


def test_waiting_and_outages_are_told_once_each(told):
    waiting, away, back = (TrialEvent(kind, -1, reason="no route") for kind in ("waiting", "away", "back"))
    events = [waiting, waiting, begun(), epoch(0, 1), away, away, epoch(0, 2), back, back, away, back]
    assert told(*events, TrialEvent("released", 0, reason="stopped"), waiting)[1:] == [
        "waiting for trials that other workers hold",
        "the database is away (no route); training goes on",
        "the database is back",
        "the database is away (no route); training goes on",
        "the database is back",
        "trial 0: released: stopped",
        "waiting for trials that other workers hold",
    ]


def test_each_trial_is_shown_every_ten_seconds_however_many_there_are(told, monkeypatch):
    clock = itertools.count(0.0, 0.5)  # half a second for each event
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    epochs = [epoch(number, done) for done in range(1, 25) for number in (0, 1)]
    assert told(begun(0), begun(1), *epochs)[1:] == [
        "trial 0: epoch 10 of 30, mean_iou 0.5000",
        "trial 1: epoch 10 of 30, mean_iou 0.5000",
        "trial 0: epoch 20 of 30, mean_iou 0.5000",
        "trial 1: epoch 20 of 30, mean_iou 0.5000",
    ]


def test_on_a_terminal_each_trial_has_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda *, stderr: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    events = [
        TrialEvent("adopted", 0, params=PARAMS, epoch=21),
        begun(1),
        epoch(0, 22),
        TrialEvent("away", -1, reason="no route"),
        TrialEvent("complete", 0, value=0.6, n_finished=4, is_best=True),
        TrialEvent("failed", 7, reason="given up", n_finished=6),
        TrialEvent("released", 1, reason="stopped"),
    ]
    show_progress(iter(events), make_record(finished(0.5), n_trials=9))
    shown = screen.getvalue()
    for line in ("trial 0: goes on at epoch 21\n", "[4/9] trial 0: mean_iou 0.6000  B 8  best so far\n"):
        assert line in shown
    last = shown[shown.rindex("s, best 0.6000") :]
    assert "6/9" in last
    assert "trial" not in last  # each bar goes with its trial
