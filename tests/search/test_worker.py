"""The worker: whatever interrupts it, a search comes to the same trials; what fails says why."""

import math
from contextlib import closing

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from searches import curves, kinds, leases, make_search, raising, stop_after

from frem_search.errors import ArtifactError, DeviceMemoryError, ParameterError, StorageError
from frem_search.search.worker import BEHIND_IMAGES, MOST_REPORTS


@pytest.fixture
def search(storage, do_nothing):
    return make_search(storage, do_nothing)


def test_what_happens_in_a_search(search, storage):
    events = list(search(n_trials=2).work())
    one = ["claimed", "epoch", "epoch", "epoch", "complete"]
    assert [event.kind for event in events] == one * 2
    assert [event.number for event in events] == [0] * 5 + [1] * 5
    assert set(events[0].params) == {"B", "X", "depth"}
    trials = search.study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert [event.value for event in events if event.kind == "complete"] == [trial.value for trial in trials]
    result = {"best_epoch": 3, "val": {"mean_iou": trials[0].value, "per_class": {}}}
    assert trials[0].user_attrs == {"result": result, "provenance": {"seconds": 1.0}}
    assert [curve["epoch"] for curve in curves(storage)] == [[1, 2, 3]] * 2
    assert kinds(search(n_trials=2)) == []


@pytest.mark.parametrize("n_epochs", [1, 3, 49, 50, 51, 99, 100, 101, 149, 2000])
def test_at_most_fifty_reports_of_a_trial_and_one_of_its_end(search, do_nothing, n_epochs):
    list(search(do_nothing(n_epochs), n_trials=1).work())
    steps = list(search.study.trials[0].intermediate_values)
    assert len(steps) <= MOST_REPORTS == 50
    assert len(steps) >= min(n_epochs, 25)
    assert steps[-1] == n_epochs
    assert steps == sorted(set(steps))


def test_what_is_reported_is_the_best_so_far(search, do_nothing):
    objective = do_nothing(4, score=lambda params, epoch: [0.1, 0.5, 0.3, 0.4][epoch - 1])
    list(search(objective, n_trials=1).work())
    (trial,) = search.study.trials
    assert trial.intermediate_values == {1: 0.1, 2: 0.5, 3: 0.5, 4: 0.5}
    assert trial.value == 0.5


def test_a_loss_that_is_no_number_prunes_with_the_reason(search, do_nothing):
    objective = do_nothing(5, score=lambda params, epoch: math.nan if epoch == 3 else 0.1 * epoch)
    events = list(search(objective, n_trials=1).work())
    assert events[-1].kind == "pruned"
    (trial,) = search.study.trials
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.2)
    assert trial.user_attrs["reason"] == "the training loss was no number in epoch 3"
    assert objective.discarded == [(0, False)]


def test_a_pruned_trial_says_so_and_has_its_curve(search, do_nothing, storage):
    objective = do_nothing(4, score=lambda params, epoch: [0.9, 0.1][len(objective.params) - 1])
    events = list(search(objective, n_trials=2, pruner="asha", settings={"min_epochs": 2, "factor": 2}).work())
    assert [event.kind for event in events if event.kind != "epoch"] == ["claimed", "complete", "claimed", "pruned"]
    assert search.study.trials[1].user_attrs["reason"].startswith("its score is below")
    assert [curve["epoch"] for curve in curves(storage)] == [[1, 2, 3, 4], [1, 2]]


# ---- Interruptions.


def whole(search, do_nothing, n_trials, n_epochs, **settings):
    list(search(do_nothing(n_epochs), n_trials=n_trials, **settings).work())
    found = [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in search.study.trials]
    optuna.delete_study(study_name="study", storage=search.study._storage)
    return found


def by_image(params, fold):
    """Four images of a fold, which differ far more from each other than one trial's scores from another's."""
    return [0.2 * i + 0.1 * fold + 1e-3 * math.log(params["X"]) for i in range(4)]


def test_wilcoxon_spares_the_folds_of_a_trial_that_is_worse_image_by_image(search, do_nothing):
    objective = do_nothing(3, image_scores=by_image, score=lambda params, fold: math.log(params["X"]))
    settings = {"n_startup_images": 5}
    list(search(objective, n_trials=12, pruner="wilcoxon", settings=settings).work())
    best = -math.inf
    for trial in search.study.trials:
        is_better = math.log(trial.params["X"]) > best
        assert trial.state is (TrialState.COMPLETE if is_better else TrialState.PRUNED)
        # Steps are images: all of a complete trial, those of two folds of one that was worse on each of eight.
        *steps, last = trial.intermediate_values
        assert [*steps, last] == [*range(1, 13)] if is_better else [*range(1, 9), BEHIND_IMAGES]
        if not is_better:
            assert trial.value == pytest.approx(np.mean(by_image(trial.params, 1) + by_image(trial.params, 2)))
        best = max(best, math.log(trial.params["X"]))
    assert {trial.state for trial in search.study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_search_pruned_by_fold_comes_to_the_same_however_often_it_is_stopped(search, do_nothing, storage):
    settings = {"n_trials": 6, "pruner": "wilcoxon", "settings": {"n_startup_images": 5}}
    scores = {"image_scores": by_image, "score": lambda params, fold: math.log(params["X"])}
    list(search(do_nothing(3, **scores), **settings).work())
    expected = [(trial.state, trial.params, trial.intermediate_values) for trial in search.study.trials]
    optuna.delete_study(study_name="study", storage=storage.optuna)
    checkpoints = {}
    for n in range(60):
        objective = do_nothing(3, checkpoints=checkpoints, **scores)
        if not list(search(objective, is_stopping=stop_after(objective, 1 + n % 2), **settings).work()):
            break
    assert [(trial.state, trial.params, trial.intermediate_values) for trial in search.study.trials] == expected


@pytest.mark.parametrize("pruner", ["none", "asha"])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_that_was_stopped_again_and_again_comes_to_the_same(search, do_nothing, storage, seed, pruner):
    pruning = {"pruner": pruner, "settings": {"min_epochs": 2, "factor": 2}}
    expected = whole(search, do_nothing, 6, 5, **pruning)
    luck, checkpoints, n_stops, events = np.random.default_rng(seed), {}, 0, None
    while events != []:
        objective = do_nothing(5, checkpoints=checkpoints)
        is_stopping = stop_after(objective, luck.integers(1, 9))
        events = kinds(search(objective, n_trials=6, is_stopping=is_stopping, **pruning))
        n_stops += "released" in events
        assert objective.members == {}
    assert n_stops >= 2
    assert [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in search.study.trials] == expected
    assert all(row.token is None for row in leases(storage))
    assert max(row.attempts for row in leases(storage)) <= 1


def test_a_stop_stores_where_the_trial_was(search, do_nothing, storage):
    checkpoints = {}
    objective = do_nothing(9, checkpoints=checkpoints)
    events = kinds(search(objective, n_trials=1, is_stopping=stop_after(objective, 2)))
    assert events == ["claimed", "epoch", "epoch", "released"]
    (row,) = leases(storage)
    assert (row.token, row.reason, row.attempts, row.checkpoint_epoch, row.epoch) == (None, "stopped", 0, 2, 2)
    assert curves(storage)[0]["epoch"] == [1, 2]
    assert list(checkpoints) == [0]
    events = kinds(search(do_nothing(9, checkpoints=checkpoints), n_trials=1))
    assert events == ["adopted", *["epoch"] * 7, "complete"]
    assert list(search.study.trials[0].intermediate_values) == list(range(1, 10))


def test_a_stop_after_the_last_epoch_completes_the_trial(search, do_nothing):
    objective = do_nothing(3)
    events = kinds(search(objective, n_trials=5, is_stopping=stop_after(objective, 3)))
    assert events == ["claimed", "epoch", "epoch", "epoch", "complete"]


@pytest.mark.parametrize("at", ["claimed", "epoch"])
def test_who_stops_listening_lets_the_trial_go(search, do_nothing, storage, at):
    events = search(do_nothing(), n_trials=1).work()
    while next(events).kind != at:
        pass
    events.close()
    (row,) = leases(storage)
    assert (row.token, row.attempts) == (None, 0)


@pytest.mark.parametrize("where", ["admit", "epoch", "finish"])
def test_an_interrupt_in_the_middle_lets_the_trial_go_and_does_not_count(search, do_nothing, storage, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    objective = do_nothing(before_epoch=interrupt if where == "epoch" else None)
    if where != "epoch":
        setattr(objective, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(search(objective, n_trials=1).work())
    (row,) = leases(storage)
    assert (row.token, row.attempts) == (None, 0)
    assert kinds(search(n_trials=1))[-1] == "complete"


def test_a_checkpoint_is_stored_as_often_as_asked(search, do_nothing, storage):
    objective = do_nothing(5)
    saved, save = [], objective.save_checkpoint
    objective.save_checkpoint = lambda number: (saved.append(objective.members[number].epoch), save(number))
    list(search(objective, n_trials=1, checkpoint_every_s=0).work())
    assert saved == [1, 2, 3, 4]
    saved.clear()
    list(search(objective, n_trials=2, checkpoint_every_s=3600).work())
    assert saved == []


def test_a_worker_that_lost_its_trial_goes_on_with_the_next(search, do_nothing, storage):
    def take(number, epoch):
        if (number, epoch) == (0, 2):
            with storage.engine.begin() as connection:
                statement = "UPDATE frem_lease SET token = 'another', worker = 'another', expires_at = now() + '1 day'"
                connection.execute(sa.text(statement + ", boot_id = 'elsewhere'"))

    events = []
    worker = search(do_nothing(3, before_epoch=take), n_trials=2, is_stopping=lambda: "waiting" in events)
    for event in worker.work():
        events.append(event.kind)  # noqa: PERF401 is_stopping looks at it meanwhile
    assert events == ["claimed", "epoch", "epoch", "lost", "claimed", "epoch", "epoch", "epoch", "complete", "waiting"]
    assert [trial.state for trial in search.study.trials] == [TrialState.RUNNING, TrialState.COMPLETE]
    assert list(search.study.trials[0].intermediate_values) == [1]


def test_a_lost_trial_is_noticed_at_the_next_epoch_though_nothing_is_due(search, do_nothing, storage):
    """Renewal has found it out; reports and checkpoints are far apart."""
    objective = do_nothing(500)
    worker = search(objective, n_trials=1)
    for event in worker.work():
        if event.epoch == 12:
            next(iter(worker._leases._held.values())).is_lost = True
        if event.kind == "lost":
            break
    assert objective.n_trained == 13
    assert "it was taken while this worker was out of touch" in event.reason
    assert worker._leases._held == {}


@pytest.mark.parametrize("n_epochs", [3, 9])  # at its last epoch, and before
def test_a_worker_whose_lease_was_taken_overwrites_no_file(search, do_nothing, storage, n_epochs):
    def take(number, epoch):
        if epoch == 3:
            objective.checkpoints[0] = "of its next worker"
            with storage.engine.begin() as connection:
                connection.execute(sa.text("UPDATE frem_lease SET token = 'x', worker = 'x', boot_id = 'x'"))

    objective = do_nothing(n_epochs, before_epoch=take)
    objective.finish = lambda number: pytest.fail("weights were written")
    events = []
    worker = search(objective, n_trials=1, checkpoint_every_s=0, is_stopping=lambda: "lost" in events)
    for event in worker.work():
        events.append(event.kind)  # noqa: PERF401 is_stopping looks at it meanwhile
    assert events[-1] == "lost"
    assert objective.checkpoints == {0: "of its next worker"}
    assert objective.discarded == []


def test_a_trial_that_somebody_else_finished_ends_nothing_else(search, do_nothing, storage):
    def finish(number, epoch):
        if (number, epoch) == (0, 2):
            storage.optuna.set_trial_state_values(search.study.trials[0]._trial_id, TrialState.FAIL)

    events = list(search(do_nothing(4, before_epoch=finish), n_trials=2, n_slots=2).work())
    assert [(event.kind, event.number) for event in events if event.kind not in ("epoch", "claimed")] == [
        ("lost", 0),
        ("complete", 1),
    ]
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_an_adopted_trial_is_stored_after_its_first_epoch(search, do_nothing):
    first = do_nothing(5)
    list(search(first, n_trials=1, is_stopping=lambda: first.n_trained >= 2).work())
    second = do_nothing(5, checkpoints=first.checkpoints)
    for event in search(second, n_trials=1, checkpoint_every_s=3600).work():
        if event.kind == "epoch" and event.epoch == 4:
            assert second.checkpoints[0][0] == 3


def test_an_adopted_trial_is_pruned_before_it_is_trained_further(search, do_nothing):
    scores = lambda params, epoch: 0.9 if objective_is_good[0] else 0.1  # noqa: E731
    objective_is_good = [True]
    median = {"n_startup_trials": 2, "n_warmup_epochs": 0}
    search_median = lambda objective, **of: search(objective, pruner="median", settings=median, **of)  # noqa: E731
    list(search_median(do_nothing(4, score=scores), n_trials=4).work())
    objective_is_good[0] = False
    objective = do_nothing(4, score=scores)
    stop = search_median(objective, n_trials=5, is_stopping=lambda: objective.n_trained >= 1)
    stop._leases.should_prune = lambda *_, **__: False  # as if it had been killed before it asked
    assert [event.kind for event in stop.work()] == ["claimed", "epoch", "released"]
    again = do_nothing(4, score=scores, checkpoints=objective.checkpoints)
    assert [event.kind for event in search_median(again, n_trials=5).work()] == ["adopted", "pruned"]
    assert again.n_trained == 0


def test_who_adopts_a_trial_tells_where_it_goes_on_and_what_was_set_aside(search, do_nothing):
    first = do_nothing(5)
    list(search(first, n_trials=1, is_stopping=lambda: first.n_trained >= 2).work())
    second = do_nothing(5, checkpoints=first.checkpoints)
    with closing(search(second, n_trials=1).work()) as events:
        event = next(events)
    assert (event.kind, event.epoch, event.reason) == ("adopted", 2, "")
    third, admit = do_nothing(5), do_nothing.admit

    def without_checkpoint(number, params):
        trial = admit(third, number, params)
        trial.set_aside = "checkpoint.pt.unusable"
        return trial

    third.admit = without_checkpoint
    with closing(search(third, n_trials=1).work()) as events:
        event = next(events)
    assert (event.kind, event.epoch, event.reason) == ("adopted", 0, "checkpoint.pt.unusable")


def test_a_finished_trial_tells_how_far_the_study_is_and_whether_it_leads(search, do_nothing):
    list(search(do_nothing(score=lambda params, epoch: 0.5), n_trials=2).work())
    events = search(do_nothing(score=lambda params, epoch: 0.4), n_trials=3).work()
    assert [(e.n_finished, e.is_best) for e in events if e.kind == "complete"] == [(3, False)]
    events = search(do_nothing(score=lambda params, epoch: 0.6), n_trials=4).work()
    assert [(e.n_finished, e.is_best) for e in events if e.kind == "complete"] == [(4, True)]


def test_a_trial_that_is_claimed_while_another_is_given_up_is_let_go_too(search, do_nothing, storage):
    broken = do_nothing(before_epoch=raising(ArtifactError("broken")))
    with pytest.raises(ArtifactError):
        list(search(broken, lease={"max_attempts": 1}).work())
    with closing(search(lease={"max_attempts": 1}).work()) as events:
        assert next(events).kind == "failed"
    assert [row.token for row in leases(storage)] == [None, None]


def test_what_killed_workers_left_is_swept_at_the_beginning_and_at_the_end(search, do_nothing):
    objective = do_nothing()
    list(search(objective, n_trials=2).work())
    assert objective.swept == [[], [0, 1]]


def test_files_go_when_the_storage_knows_the_end_and_not_before(search, do_nothing, storage):
    def take():
        with storage.engine.begin() as connection:
            connection.execute(sa.text("UPDATE frem_lease SET token = 'x', worker = 'x', boot_id = 'x'"))
        return {"seconds": 1.0}

    objective = do_nothing()
    objective.provenance = lambda number: take()  # between the last file and the tell
    events = []
    for event in search(objective, n_trials=1, is_stopping=lambda: "lost" in events).work():
        events.append(event.kind)  # noqa: PERF401 is_stopping looks at it meanwhile
    assert events[-1] == "lost"
    assert objective.discarded == []


def test_a_failed_trial_leaves_no_checkpoint(search, do_nothing):
    objective = do_nothing(before_epoch=raising(ZeroDivisionError("division by zero"), at=3))
    list(search(objective, n_trials=1, checkpoint_every_s=0).work())
    assert objective.discarded == [(0, False)]


def test_a_code_error_in_a_trial_that_was_lost_does_not_end_the_worker(search, do_nothing, storage):
    def take(number, epoch):
        if number == 0:
            with storage.engine.begin() as connection:
                connection.execute(sa.text("UPDATE frem_lease SET token = 'x', worker = 'x', boot_id = 'x'"))
            raise ZeroDivisionError

    events = []
    worker = search(do_nothing(1, before_epoch=take), n_trials=2, is_stopping=lambda: "waiting" in events)
    for event in worker.work():
        events.append(event.kind)  # noqa: PERF401 is_stopping looks at it meanwhile
    assert events == ["claimed", "lost", "claimed", "epoch", "complete", "waiting"]


# ---- Errors.


def test_three_code_errors_in_a_row_end_the_worker(search, do_nothing, storage):
    objective = do_nothing(before_epoch=raising(ZeroDivisionError("division by zero")))
    events = []
    with pytest.raises(ZeroDivisionError):
        events.extend(search(objective, n_trials=9).work())
    trials = search.study.trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 3
    assert trials[0].user_attrs["reason"] == "ZeroDivisionError: division by zero"
    assert all(row.token is None for row in leases(storage))


def test_code_errors_with_a_success_between_do_not_end_the_worker(search, do_nothing):
    def fail_mostly(number, epoch):
        if number % 3 != 2:
            raise ZeroDivisionError

    events = kinds(search(do_nothing(1, before_epoch=fail_mostly), n_trials=6))
    assert events.count("failed") == 4
    assert events.count("complete") == 2


def test_out_of_memory_prunes_where_shapes_are_searched(search, do_nothing):
    objective = do_nothing(before_epoch=raising(DeviceMemoryError("cuda:0: out of memory")))
    objective.searches_shapes = True
    assert kinds(search(objective, n_trials=2)) == ["claimed", "pruned"] * 2
    assert {trial.state for trial in search.study.trials} == {TrialState.PRUNED}
    assert search.study.trials[0].user_attrs["reason"] == "cuda:0: out of memory"


@pytest.mark.parametrize("where", ["admit", "epoch"])
def test_out_of_memory_ends_the_worker_where_all_trials_need_the_same(search, do_nothing, storage, where):
    error = DeviceMemoryError("cuda:0: out of memory")
    objective = do_nothing(before_epoch=raising(error) if where == "epoch" else None)
    if where == "admit":
        objective.admit = raising(error)
    with pytest.raises(DeviceMemoryError):
        list(search(objective, n_trials=2).work())
    (row,) = leases(storage)
    assert (row.token, row.attempts, row.reason) == (None, 0, "cuda:0: out of memory")
    assert search.study.trials[0].state == TrialState.RUNNING


@pytest.mark.parametrize(
    "error",
    [ArtifactError("no space"), OSError(5, "I/O error"), StorageError("away")],
)
def test_an_error_of_the_machine_ends_the_worker_and_the_trial_waits(search, do_nothing, storage, error):
    objective = do_nothing()
    objective.save_checkpoint = raising(error)
    with pytest.raises(type(error)):
        list(search(objective, n_trials=2, checkpoint_every_s=0).work())
    (row,) = leases(storage)
    assert (row.token, row.attempts, row.reason) == (None, 1, str(error))
    assert search.study.trials[0].state == TrialState.RUNNING


def test_parameters_that_nothing_takes_fail_the_trial_and_not_the_worker(search, do_nothing):
    objective, refuse = do_nothing(), raising(ParameterError("B", "at most 16", 99))
    admit = objective.admit
    objective.admit = lambda number, params: (refuse if number == 0 else admit)(number, params)
    events = [event.kind for event in search(objective, n_trials=2).work()]
    assert events == ["claimed", "failed", "claimed", "epoch", "epoch", "epoch", "complete"]
    trials = search.study.trials
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "expected at most 16, but got 99" in trials[0].user_attrs["reason"]


def test_parameters_of_enqueued_trials_that_nothing_takes_never_end_the_worker(search, do_nothing):
    objective, admit = do_nothing(), do_nothing.admit

    def refuse(number, params):
        if number < 4:
            raise ParameterError("batch_size", "at least 1", 0)
        return admit(objective, number, params)

    objective.admit = refuse
    assert kinds(search(objective, n_trials=5)) == ["claimed", "failed"] * 4 + ["claimed", *["epoch"] * 3, "complete"]


def test_an_unusable_checkpoint_does_not_hide_that_later_ones_advance(search, do_nothing, storage):
    first = search(do_nothing(), n_trials=1, checkpoint_every_s=0, is_stopping=lambda: False)
    events = first.work()
    for event in events:
        if event.report and event.report.epoch == 2:
            break
    events.close()
    assert [(row.checkpoint_epoch, row.token) for row in leases(storage)] == [(1, None)]
    second = search(do_nothing(), n_trials=1, checkpoint_every_s=0).work()  # its objective begins with epoch 0
    assert next(second).kind == "adopted"
    next(second)
    assert [row.checkpoint_epoch for row in leases(storage)] == [0]
    second.close()


def test_a_trial_that_cannot_be_trained_on_any_machine_fails_in_the_end(search, do_nothing):
    objective = do_nothing(before_epoch=raising(ArtifactError("broken")))
    for _ in range(3):
        with pytest.raises(ArtifactError):
            list(search(objective, n_trials=1).work())
    (event,) = search(objective, n_trials=1).work()
    assert (event.kind, event.number, event.n_finished) == ("failed", 0, 1)
    assert "3 attempts in a row advanced no checkpoint" in event.reason
    assert [0] in objective.swept
    (trial,) = search.study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"].endswith("advanced no checkpoint; the last ended: broken")


def test_a_finished_trial_leaves_no_checkpoint_and_only_the_best_keep_their_weights(search, do_nothing):
    from frem_search.search.worker import KEPT_WEIGHTS

    objective = do_nothing(1, score=lambda params, epoch: float(len(objective.params)))  # each better than before
    list(search(objective, n_trials=KEPT_WEIGHTS + 3).work())
    assert [number for number, weights in objective.discarded if not weights] == list(range(KEPT_WEIGHTS + 3))
    assert {number for number, weights in objective.discarded if weights} == {0, 1, 2}
