"""Several trials side by side in one worker: what happens to one happens to no other, and none is lost."""

import math

import numpy as np
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from searches import curves, leases, make_search, raising, stop_after

from frem_search.errors import ArtifactError, DeviceMemoryError
from frem_search.search import worker as worker_module


@pytest.fixture
def search(storage, do_nothing):
    return make_search(storage, do_nothing)


def of_numbers(events, kind):
    return [event.number for event in events if event.kind == kind]


def number_of(objective, params):
    return next(number for number, known in objective.params.items() if known is params)


def take_away(storage, number):
    """Let another worker, which lives elsewhere, take a trial."""
    with storage.engine.begin() as connection:
        statement = """
            UPDATE frem_lease SET token = 'x', worker = 'x', boot_id = 'x', expires_at = now() + '1 day'
            WHERE trial_id = (SELECT trial_id FROM trials WHERE number = :number)
        """
        connection.execute(sa.text(statement), {"number": number})


def assert_waiting_for_the_next_worker(search, storage, numbers, *, attempts=0):
    rows = dict(zip([trial.number for trial in search.study.trials], leases(storage), strict=True))
    for number in numbers:
        assert search.study.trials[number].state == TrialState.RUNNING
        assert (rows[number].token, rows[number].attempts) == (None, attempts)


def test_all_slots_are_filled_at_once_and_the_budget_is_exact(search, storage):
    events = list(search(n_trials=7, n_slots=3).work())
    assert [event.kind for event in events[:6]] == ["claimed"] * 3 + ["epoch"] * 3
    assert sorted(of_numbers(events, "complete")) == of_numbers(events, "claimed") == list(range(7))
    assert of_numbers(events, "waiting") == []
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 7
    for trial in search.study.trials:
        assert list(trial.intermediate_values) == [1, 2, 3]
    assert [curve["epoch"] for curve in curves(storage)] == [[1, 2, 3]] * 7
    assert all(row.token is None for row in leases(storage))


def test_more_slots_than_trials_train_what_there_is(search):
    events = list(search(n_trials=2, n_slots=8).work())
    assert [event.kind for event in events] == [*["claimed"] * 2, *["epoch"] * 5, "complete", "epoch", "complete"]


def test_a_slot_that_becomes_free_is_filled_while_the_others_go_on(search, do_nothing):
    def score(params, epoch):
        return math.nan if number_of(objective, params) == 1 and epoch == 2 else 0.1 * epoch

    objective = do_nothing(4, score=score)
    events = [(event.kind, event.number) for event in search(objective, n_trials=5, n_slots=3).work()]
    pruned = events.index(("pruned", 1))
    assert events[pruned + 1] == ("claimed", 3)
    assert events[pruned + 2 : pruned + 5] == [("epoch", 2), ("epoch", 0), ("epoch", 2)]
    assert events.index(("epoch", 3)) < events.index(("complete", 0)) < events.index(("claimed", 4))
    assert [kind for kind, _ in events].count("epoch") == 4 * 4 + 2
    assert [trial.state.name for trial in search.study.trials] == ["COMPLETE", "PRUNED", *["COMPLETE"] * 3]


def test_each_trial_has_reports_pruning_and_a_curve_of_its_own(search, do_nothing, storage):
    scores = ([0.1, 0.5, 0.3, 0.6], [0.2, 0.1, 0.7, 0.4], [0.01, 0.02, 0.9, 0.9])
    objective = do_nothing(4, score=lambda params, epoch: scores[number_of(objective, params)][epoch - 1])
    settings = {"pruner": "asha", "settings": {"min_epochs": 2, "factor": 2}}
    events = list(search(objective, n_trials=3, n_slots=3, **settings).work())
    assert of_numbers(events, "pruned") == [1, 2]  # a score of 0.5 had been reported before
    trials = search.study.trials
    assert trials[0].intermediate_values == {1: 0.1, 2: 0.5, 3: 0.5, 4: 0.6}
    assert trials[1].intermediate_values == {1: 0.2, 2: 0.2}
    assert trials[2].intermediate_values == {1: 0.01, 2: 0.02}
    assert [curve["score"] for curve in curves(storage)] == [scores[0], [0.2, 0.1], [0.01, 0.02]]
    assert {number for number, weights in objective.discarded if not weights} == {0, 1, 2}


def test_each_trial_has_checkpoints_of_its_own(search, do_nothing, storage):
    checkpoints = {}
    objective = do_nothing(9, checkpoints=checkpoints)
    events = search(objective, n_trials=3, n_slots=3, checkpoint_every_s=0).work()
    while next(events).kind == "claimed" or objective.n_trained < 8:
        pass
    events.close()
    # The event of the eighth epoch had been told, and nothing been stored of it.
    assert [epoch for epoch, _ in checkpoints.values()] == [3, 2, 2]
    assert [(row.checkpoint_epoch, row.token) for row in leases(storage)] == [(3, None), (2, None), (2, None)]
    assert [curve["epoch"] for curve in curves(storage)] == [[1, 2, 3], [1, 2], [1, 2]]
    events = list(search(do_nothing(9, checkpoints=checkpoints), n_trials=3, n_slots=3).work())
    assert of_numbers(events, "adopted") == [0, 1, 2]
    assert [of_numbers(events, "epoch").count(number) for number in range(3)] == [6, 7, 7]
    assert [list(trial.intermediate_values) for trial in search.study.trials] == [list(range(1, 10))] * 3


def test_a_stop_stores_and_releases_all_trials(search, do_nothing, storage):
    checkpoints = {}
    objective = do_nothing(9, checkpoints=checkpoints)
    events = list(search(objective, n_trials=9, n_slots=3, is_stopping=stop_after(objective, 4)).work())
    assert [event.kind for event in events] == [*["claimed"] * 3, *["epoch"] * 3, *["epoch", "released"] * 3]
    assert of_numbers(events, "released") == [0, 1, 2] == sorted(checkpoints)
    assert {(row.reason, row.checkpoint_epoch, row.epoch) for row in leases(storage)} == {("stopped", 2, 2)}
    assert_waiting_for_the_next_worker(search, storage, range(3))
    assert objective.members == {}


@pytest.mark.parametrize("seed", range(3))
def test_slots_that_are_stopped_again_and_again_lose_and_repeat_nothing(search, do_nothing, storage, seed):
    luck, checkpoints, n_stops, events, told = np.random.default_rng(seed), {}, 0, None, []
    while events != []:
        objective = do_nothing(5, checkpoints=checkpoints)
        is_stopping = stop_after(objective, luck.integers(1, 9))
        events = list(search(objective, n_trials=8, n_slots=3, is_stopping=is_stopping).work())
        told += [(event.number, event.report.epoch) for event in events if event.kind == "epoch"]
        n_stops += "released" in [event.kind for event in events]
    assert n_stops >= 2
    assert sorted(told) == [(number, epoch) for number in range(8) for epoch in range(1, 6)]
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 8
    assert [list(trial.intermediate_values) for trial in search.study.trials] == [[1, 2, 3, 4, 5]] * 8
    assert max(row.attempts for row in leases(storage)) <= 1


@pytest.mark.parametrize("n_events", [1, 2, 3, 5, 8])
def test_who_stops_listening_lets_all_trials_go(search, storage, n_events):
    events = search(n_trials=3, n_slots=3).work()
    for _ in range(n_events):
        next(events)
    events.close()
    assert_waiting_for_the_next_worker(search, storage, range(min(n_events, 3)))
    assert sorted(of_numbers(search(n_trials=3, n_slots=3).work(), "complete")) == [0, 1, 2]


@pytest.mark.parametrize("where", ["admit", "epoch", "save_checkpoint", "finish"])
def test_an_interrupt_in_one_slot_lets_all_trials_go_and_does_not_count(search, do_nothing, storage, where):
    def interrupt(number, *_):
        if number == 1:
            raise KeyboardInterrupt
        return usual and usual(number, *_)

    objective = do_nothing(before_epoch=interrupt if where == "epoch" else None)
    usual = None if where == "epoch" else getattr(objective, where)
    if usual:
        setattr(objective, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(search(objective, n_trials=3, n_slots=3, checkpoint_every_s=0).work())
    states = [trial.state for trial in search.study.trials]
    assert states == {
        "admit": [TrialState.RUNNING] * 2, "finish": [TrialState.COMPLETE, *[TrialState.RUNNING] * 2],
    }.get(where, [TrialState.RUNNING] * 3)  # fmt: skip
    assert_waiting_for_the_next_worker(search, storage, range(states.index(TrialState.RUNNING), len(states)))
    list(search(n_trials=3, n_slots=3).work())
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 3


def test_a_lease_that_is_lost_leaves_the_other_trials(search, do_nothing, storage):
    objective = do_nothing(before_epoch=lambda *at: at == (1, 2) and take_away(storage, 1))
    events = []
    worker = search(objective, n_trials=4, n_slots=3, is_stopping=lambda: events and events[-1].kind == "waiting")
    for event in worker.work():
        events.append(event)  # noqa: PERF402 is_stopping looks at it meanwhile
    lost = next(i for i, event in enumerate(events) if event.kind == "lost")
    assert (events[lost].number, events[lost + 1].kind, events[lost + 1].number) == (1, "claimed", 3)
    assert of_numbers(events, "complete") == [0, 2, 3]
    assert list(search.study.trials[1].intermediate_values) == [1]
    assert 1 not in objective.members


def test_a_trial_that_was_lost_before_memory_ran_out_is_left_to_who_has_it(search, do_nothing, storage):
    def take_and_fill(number, epoch):
        if number == 0:
            take_away(storage, 0)
            raise DeviceMemoryError("cuda:0: out of memory")

    objective, events = do_nothing(before_epoch=take_and_fill), []
    objective.searches_shapes = True
    worker = search(objective, n_trials=2, is_stopping=lambda: events and events[-1] == "waiting")
    for event in worker.work():
        events.append(event.kind)  # noqa: PERF401 is_stopping looks at it meanwhile
    assert events == ["claimed", "lost", "claimed", "epoch", "epoch", "epoch", "complete", "waiting"]
    assert search.study.trials[0].state == TrialState.RUNNING


@pytest.mark.parametrize("where", ["save_checkpoint", "epoch"])
@pytest.mark.parametrize("error", [ArtifactError("no space"), OSError(5, "I/O error")])
def test_an_error_of_the_machine_counts_for_the_trial_concerned_alone(search, do_nothing, storage, where, error):
    def fails(number, *_):
        if number == 1:
            raise error

    objective = do_nothing(before_epoch=fails if where == "epoch" else None)
    if where == "save_checkpoint":
        objective.save_checkpoint = fails
    with pytest.raises(type(error)):
        list(search(objective, n_trials=9, n_slots=3, checkpoint_every_s=0).work())
    assert_waiting_for_the_next_worker(search, storage, [1], attempts=1)
    assert_waiting_for_the_next_worker(search, storage, [0, 2])
    assert {row.reason for row in leases(storage)} == {str(error)}


def test_an_error_after_a_trial_was_told_ends_the_worker_with_this_error(search, do_nothing, storage):
    def discard(number, *, weights):
        if weights:
            raise ArtifactError("permission denied")

    objective = do_nothing(1)
    objective.discard = discard
    with pytest.raises(ArtifactError, match="permission denied"):
        list(search(objective, n_trials=9, n_slots=2).work())
    # Weights are removed from the fourth trial on.
    assert [trial.state for trial in search.study.trials] == [*[TrialState.COMPLETE] * 4, TrialState.RUNNING]
    assert_waiting_for_the_next_worker(search, storage, [4])


def fill_up(objective, most, *, at=1):
    """Let an objective have memory for `most` trials from an epoch on."""

    def before_epoch(number, epoch):
        if len(objective.members) > most and epoch >= at:
            raise DeviceMemoryError("cuda:0: out of memory")

    objective.before_epoch = before_epoch
    return objective


def test_out_of_memory_halves_the_slots_until_the_worker_ends_and_nothing_is_lost(search, do_nothing, storage):
    told = []
    with pytest.raises(DeviceMemoryError):
        told.extend(search(fill_up(do_nothing(), 0), n_trials=6, n_slots=4).work())
    assert [(event.kind, event.number) for event in told] == [
        *(("claimed", number) for number in range(4)),
        *(("released", number) for number in range(4)),
        ("adopted", 0), ("adopted", 1), ("released", 0), ("released", 1), ("adopted", 0),
    ]  # fmt: skip
    assert_waiting_for_the_next_worker(search, storage, range(4))
    events = list(search(n_trials=6, n_slots=4).work())
    assert of_numbers(events, "adopted") == [0, 1, 2, 3]
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 6


def test_out_of_memory_is_told_and_what_fits_goes_on_from_the_checkpoints(search, do_nothing, storage):
    objective = fill_up(do_nothing(6), 2, at=4)
    events = list(search(objective, n_trials=6, n_slots=4, checkpoint_every_s=0).work())
    released = [event for event in events if event.kind == "released"]
    assert [(event.number, event.reason) for event in released] == [
        (number, "out of memory with 4 trials side by side; 2 from here on") for number in range(4)
    ]
    assert of_numbers(events, "adopted") == [0, 1, 2, 3]
    assert of_numbers(events, "waiting") == []
    told = [(event.number, event.report.epoch) for event in events if event.kind == "epoch"]
    assert sorted(told) == [(number, epoch) for number in range(6) for epoch in range(1, 7)]
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 6
    assert {row.attempts for row in leases(storage)} <= {0, 1}


def test_out_of_memory_at_the_beginning_of_a_trial_halves_the_slots_too(search, do_nothing):
    objective = do_nothing()
    admit = objective.admit

    def admit_few(number, params):
        if len(objective.members) == 3:
            raise DeviceMemoryError("cuda:0: out of memory")
        return admit(number, params)

    objective.admit = admit_few
    events = list(search(objective, n_trials=5, n_slots=6).work())
    assert of_numbers(events, "released") == [0, 1, 2, 3]
    assert events[8:10] == [event for event in events if event.kind == "adopted"][:2]
    assert sorted(of_numbers(events, "complete")) == list(range(5))


def test_out_of_memory_with_one_slot_left_prunes_where_shapes_are_searched(search, do_nothing):
    objective = fill_up(do_nothing(), 0)
    objective.searches_shapes = True
    events = list(search(objective, n_trials=3, n_slots=2).work())
    assert of_numbers(events, "released") == [0, 1]
    assert of_numbers(events, "pruned") == [0, 1, 2]


def test_three_code_errors_in_a_row_among_slots_end_the_worker(search, do_nothing, storage):
    objective = do_nothing(before_epoch=raising(ZeroDivisionError("division by zero")))
    with pytest.raises(ZeroDivisionError):
        list(search(objective, n_trials=9, n_slots=3).work())
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL] * 3 + [TrialState.RUNNING] * 2
    assert_waiting_for_the_next_worker(search, storage, [3, 4])


def test_a_code_error_leaves_the_other_trials(search, do_nothing):
    def fails(number, epoch):
        if (number, epoch) == (1, 2):
            raise ZeroDivisionError("division by zero")

    events = list(search(do_nothing(before_epoch=fails), n_trials=4, n_slots=3).work())
    assert (of_numbers(events, "failed"), of_numbers(events, "complete")) == ([1], [0, 2, 3])
    assert search.study.trials[1].user_attrs["reason"] == "ZeroDivisionError: division by zero"


def test_two_workers_with_several_slots_keep_the_budget_exact(search, do_nothing, monkeypatch):
    monkeypatch.setattr(worker_module, "BUSY_POLL_S", 0.01)
    at_work = [search(do_nothing(), n_trials=11, n_slots=n).work() for n in (3, 2)]
    luck, told = np.random.default_rng(0), [[], []]
    while at_work:
        which = luck.integers(len(at_work))
        event = next(at_work[which], None)
        if event is None:
            at_work.pop(which)
        else:
            told[which].append(event)
    assert all(of_numbers(events, "complete") for events in told)
    done = [(event.number, event.report.epoch) for events in told for event in events if event.kind == "epoch"]
    assert sorted(done) == [(number, epoch) for number in range(11) for epoch in range(1, 4)]
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 11
