"""What `status` says of a study, from its record alone."""

from datetime import timedelta

from frem_search.cli.table import trials_csv, trials_table
from frem_search.study.record import StudyRecord, TrialRecord
from frem_search.study.status import STATES, describe_trial, end_line, status_json, status_lines, time_left, trials_json

CONTRACT = {
    "n_epochs": 10,
    "space": {"B": {"low": 0, "high": 16, "log": False, "step": None}, "depth": {"value": 2}, "X": {"choices": [1, 2]}},
}


def make_trial(number, state="complete", value=None, *, seconds=None, **more):
    attrs = {} if seconds is None else {"provenance": {"seconds": seconds}}
    return TrialRecord(number, state, value, {"B": number, "X": 1000.0 / 3}, attrs, None, None, {}, **more)


def make_record(*trials, n_trials=10):
    classes = ("ground", "cell")
    return StudyRecord("s", "A title", "mouse", "mean_iou", n_trials, classes, CONTRACT, trials, storage="db")


def test_a_study_that_was_only_begun():
    record = make_record()
    assert status_lines(record) == [
        "s: A title",
        "  dataset   mouse",
        "  storage   db",
        "  trials    0 of 10 finished",
    ]
    assert status_json(record)["states"] == dict.fromkeys(STATES, 0)
    assert (status_json(record)["best"], status_json(record)["workers"], trials_json(record)) == (None, [], [])
    assert time_left(record) is None


def test_a_study_in_the_middle():
    record = make_record(
        make_trial(0, value=0.5, seconds=100.0),
        make_trial(1, value=0.75, seconds=200.0),
        make_trial(2, "pruned", 0.9, seconds=30.0, reason="below"),
        make_trial(3, "running", epoch=4, worker="host:1 cpu", attempts=1, total_attempts=2),
        make_trial(4, "waiting", epoch=2, attempts=1, total_attempts=1, reason="its worker is gone"),
        make_trial(5, "fail", reason="RuntimeError: a\n\nlong  story"),
        make_trial(6, "enqueued"),
    )
    assert status_lines(record)[3:] == [
        "  trials    4 of 10 finished: 2 complete, 1 pruned, 1 running, 1 waiting, 1 enqueued, 1 fail",
        "  best      trial 1: mean_iou 0.7500 with B = 1, X = 333.3",
        "  training  trial 3, epoch 4 of 10, on host:1 cpu",
        "  waiting   trial 4, epoch 2, 1 of 3 attempts spent: its worker is gone",
        "  fail      trial 5, epoch 0: RuntimeError: a long story",
        "  time left about 0:11:00",
    ]
    assert status_json(record)["best"] == {"number": 1, "value": 0.75, "params": {"B": 1, "X": 1000.0 / 3}}
    assert status_json(record)["workers"] == [
        {"worker": "host:1 cpu", "trial": 3, "epoch": 4, "attempts": 1, "total_attempts": 2}
    ]
    assert status_json(record)["waiting"] == [
        {"trial": 4, "epoch": 2, "attempts": 1, "total_attempts": 1, "reason": "its worker is gone"}
    ]
    assert [status_json(record)[key] for key in ("score", "n_epochs", "time_left_s")] == ["mean_iou", 10, 660.0]


def test_attempts_are_told_from_the_second_on_and_of_waiting_trials_from_the_first():
    trials = [
        make_trial(0, "running", attempts=2),
        make_trial(1, "running"),
        make_trial(2, "waiting", reason="stopped"),
    ]
    assert status_lines(make_record(*trials))[4:] == [
        "  training  trial 0, epoch 0 of 10, on , attempt 2 of 3",
        "  training  trial 1, epoch 0 of 10, on ",
        "  waiting   trial 2, epoch 0: stopped",
    ]


def test_among_equal_trials_the_first_is_the_best():
    assert make_record(make_trial(0, value=0.5), make_trial(1, value=0.5)).best.number == 0


def test_workers_side_by_side_share_the_time_left():
    done = make_trial(0, value=0.5, seconds=60.0)
    one, two = make_trial(1, "running"), make_trial(2, "running")
    assert time_left(make_record(done, one, n_trials=5)) == timedelta(minutes=4)
    assert time_left(make_record(done, one, two, n_trials=5)) == timedelta(minutes=2)


def test_where_nobody_works_the_time_left_says_for_whom_it_is():
    record = make_record(make_trial(0, value=0.5, seconds=60.0), n_trials=5)
    assert status_lines(record)[-1] == "  time left about 0:04:00 with one worker"
    assert status_json(record)["time_left_s"] == 240.0
    assert status_json(make_record())["time_left_s"] is None


def test_work_ends_because_the_budget_is_spent_or_was_stopped():
    done = make_trial(0, value=0.5)
    assert end_line(make_record(done, n_trials=1)) == "budget spent: 1 of 1 trials finished"
    assert end_line(make_record(done, make_trial(1, "waiting"), n_trials=2)) == "stopped: 1 of 2 trials finished"


def test_the_history_of_attempts_breaks_no_table():
    history = {"attempts": [{"worker": "host:1", "epoch": 2, "ended": "its worker is gone"}]}
    trial = TrialRecord(0, "running", None, {"B": 1, "X": 2.0}, history, None, None, {}, attempts=2, total_attempts=4)
    (shown,) = trials_json(make_record(trial))
    assert (shown["user_attrs"], shown["attempts"], shown["total_attempts"]) == (history, 2, 4)
    assert len(trials_csv(make_record(trial)).splitlines()) == 2


def test_a_finished_study_has_no_time_left():
    record = make_record(make_trial(0, value=0.5, seconds=60.0), n_trials=1)
    assert time_left(record) == timedelta(0)
    assert not any("time left" in line for line in status_lines(record))


def test_a_trial_without_value_and_parameters_can_be_described():
    assert describe_trial(TrialRecord(3, "fail", None, {}, {}, None, None, {}), "mean_iou") == "trial 3: mean_iou none"


def test_every_trial_is_one_line_of_the_table():
    table = trials_table(make_record(make_trial(0, value=0.5), make_trial(1, "fail", reason="a\nb\tc")))
    lines = table.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["trial", "state", "mean_iou", "test", "B", "X", "epoch", "seconds", "reason"]
    assert lines[2].split() == ["1", "fail", "1", "333.3", "0", "a", "b", "c"]
