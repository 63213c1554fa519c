"""A study read back: states in our words, the best trial, curves, and who holds what."""

import threading

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from frem_search.errors import StudyNotFoundError
from frem_search.storage.database import open_storage
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import load_study_file
from frem_search.study.record import StudyRecord, TrialRecord, read_record
from frem_search.study.samplers import distributions
from frem_search.study.stored import make_contract, open_study


@pytest.fixture
def study(storage, tiny_study):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study_file = load_study_file(str(tiny_study), n_trials=20)
    contract = make_contract(
        study_file, precision="fp32", dataset="tiny", dataset_fingerprint="f", class_names=("ground", "disc")
    )
    return open_study(storage, study_file, contract)


def make_leases(study, **settings):
    return Leases(study.storage, study.optuna, distributions=distributions(study.file.space), **settings)


def test_what_a_record_holds(storage, study):
    make_leases(study).claim()
    record = read_record(storage, "tiny")
    assert (record.name, record.title, record.dataset, record.score) == ("tiny", study.file.title, "tiny", "mean_iou")
    assert (record.n_trials, record.class_names, record.uid) == (20, ("ground", "disc"), study.uid)
    assert record.contract == study.contract
    assert record.searched == ("B", "X")
    assert record.storage == storage.label
    assert set(record.trials[0].params) == {"B", "X"}


def test_states_in_our_words(storage, study):
    leases = make_leases(study, device="cpu, 1 threads", max_attempts=1)
    curve = {"epoch": [1, 2], "score": [0.25, None]}
    ends = [(TrialState.COMPLETE, 0.5), (TrialState.PRUNED, None), (TrialState.FAIL, None)]
    for state, value in ends:
        held = leases.claim()
        held.epoch = 2
        leases.report(held, 0.25, step=1)
        leases.tell(held, state=state, value=value, attrs={"reason": "why"}, curve=curve)
    running, waiting = leases.claim(), leases.claim()
    leases.checkpointed(running, epoch=7, curve={"epoch": [7]})
    leases.release(waiting, reason="stopped")
    study.optuna.enqueue_trial({"B": 1, "X": 2})
    record = read_record(storage, "tiny")
    assert [t.state for t in record.trials] == ["complete", "pruned", "fail", "running", "waiting", "enqueued"]
    assert [t.value for t in record.trials] == [0.5, 0.25, None, None, None, None]
    assert [t.reason for t in record.trials] == ["why", "why", "why", "", "stopped", ""]
    assert [t.epoch for t in record.trials] == [2, 2, 2, 7, 0, 0]
    assert [t.curve for t in record.trials] == [curve, curve, curve, {"epoch": [7]}, {}, {}]
    assert [(t.attempts, t.total_attempts) for t in record.trials] == [(1, 1), (1, 1), (1, 1), (0, 1), (0, 1), (0, 0)]
    assert record.n_finished == 3
    assert record.trials[3].worker.endswith(" cpu, 1 threads")
    assert record.trials[0].started < record.trials[0].finished
    assert record.trials[5].started is None
    assert [t.number for t in record.complete] == [0]
    assert [t.curve for t in read_record(storage, "tiny", has_curves=False).trials] == [{}] * 6


def test_a_trial_whose_lease_ran_out_or_whose_worker_is_gone_is_waiting(storage, study):
    held = [make_leases(study).claim(), make_leases(study).claim()]
    assert [t.state for t in read_record(storage, "tiny").trials] == ["running", "running"]
    change = "UPDATE frem_lease SET expires_at = now() - interval '1 second' WHERE trial_id = :id"
    with storage.engine.begin() as connection:
        connection.execute(sa.text(change), {"id": held[0].id})
    trials = read_record(storage, "tiny").trials
    assert [t.state for t in trials] == ["waiting", "running"]
    assert [t.reason for t in trials] == ["no sign of life from its worker", ""]
    change = "UPDATE frem_lease SET pid_started = pid_started - 100 WHERE trial_id = :id"
    with storage.engine.begin() as connection:
        connection.execute(sa.text(change), {"id": held[1].id})
    trials = read_record(storage, "tiny").trials
    assert [t.state for t in trials] == ["waiting", "waiting"]
    assert [t.reason for t in trials] == ["no sign of life from its worker", "its worker is gone"]


def test_a_trial_that_another_program_began_is_waiting(storage, study):
    study.optuna.ask()
    (trial,) = read_record(storage, "tiny").trials
    assert (trial.state, trial.reason) == ("waiting", "begun by another program")


def test_a_trial_in_training_is_as_far_as_its_last_report(storage, study):
    """Its lease tells the epoch when it is renewed, half a minute later."""
    first, second = make_leases(study), make_leases(study)
    held = first.claim()
    first.report(held, 0.25, step=5)
    (trial,) = read_record(storage, "tiny").trials
    assert (trial.epoch, trial.attempts, trial.total_attempts) == (5, 1, 1)
    first.release(held, reason="the disk is full", is_forgiven=False)
    assert [t.epoch for t in read_record(storage, "tiny").trials] == [0]
    again = second.claim()  # and begins again, as there is no checkpoint
    (trial,) = read_record(storage, "tiny").trials
    assert (trial.state, trial.epoch, trial.attempts, trial.total_attempts) == ("running", 0, 2, 2)
    second.checkpointed(again, epoch=2, curve={"epoch": [1, 2]})
    (trial,) = read_record(storage, "tiny").trials
    assert (trial.epoch, trial.attempts, trial.total_attempts) == (2, 0, 2)


def test_reports_of_images_are_no_epochs(storage, tiny_study):
    text = tiny_study.read_text() + '\n[folds]\nn = 2\n\n[pruner]\nname = "wilcoxon"\n'
    tiny_study.write_text(text)
    study_file = load_study_file(str(tiny_study))
    contract = make_contract(
        study_file, precision="fp32", dataset="tiny", dataset_fingerprint="f", class_names=("ground", "disc")
    )
    leases = make_leases(open_study(storage, study_file, contract))
    leases.report(leases.claim(), 0.25, step=7)
    assert [t.epoch for t in read_record(storage, "tiny").trials] == [0]


def test_trials_and_leases_are_of_one_moment(storage, storage_url, study):
    """A claim and a tell between two statements of the reader are not half seen."""
    with open_storage(storage_url) as other:
        joined = open_study(other, study.file, study.contract)
        leases, is_over = make_leases(joined), threading.Event()

        def search():
            while not is_over.is_set():
                held = leases.claim()
                if held == "spent":
                    is_over.set()
                    return
                leases.tell(held, state=TrialState.COMPLETE, value=1.0, attrs={}, curve={"epoch": [1]})

        thread = threading.Thread(target=search)
        thread.start()
        seen = []
        while not is_over.is_set():
            seen += [(t.state, bool(t.curve)) for t in read_record(storage, "tiny").trials]
        thread.join()
    assert set(seen) <= {("complete", True), ("running", False)}
    assert ("complete", True) in seen


def trial(number, value, state="complete"):
    return TrialRecord(number, state, value, {}, {}, None, None, {})


def test_the_best_is_the_highest_and_among_equals_the_first():
    def best(*trials):
        return StudyRecord("s", "", "d", "mean_iou", 9, (), {}, trials).best

    assert best() is None
    assert best(trial(0, None), trial(1, 0.9, "pruned")) is None
    assert best(trial(0, 0.5), trial(1, 0.7), trial(2, 0.7), trial(3, 0.6)).number == 1


@pytest.mark.parametrize(("name", "hint"), [("tinny", r" Did you mean 'tiny'\?"), ("nowhere", "")])
def test_an_unknown_study_is_told_with_the_nearest(storage, study, name, hint):
    with pytest.raises(StudyNotFoundError, match=rf"{name}: no such study in the storage \(.*\)\.{hint} Start it with"):
        read_record(storage, name)


def test_a_study_of_another_program_is_not_read(storage):
    optuna.create_study(storage=storage.optuna, study_name="foreign")
    with pytest.raises(StudyNotFoundError, match="foreign: a study that another program made"):
        read_record(storage, "foreign")
