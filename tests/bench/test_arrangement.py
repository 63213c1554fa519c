"""Which arrangement of trials is chosen: what was measured to be the fastest, once; and what a study has begun with."""

import json
from dataclasses import replace
from typing import ClassVar

import optuna
import pytest
import torch

from frem_search.bench import arrangement as arrangement_module
from frem_search.bench.arrangement import candidates, choose, measure_all, parse_cohort, settle
from frem_search.bench.speed import Arrangement, Speed, Trainee
from frem_search.data.dataset import load_dataset
from frem_search.errors import ContractError, DeviceMemoryError, UsageError
from frem_search.search.begin import open_worker
from frem_search.study.file import load_study_file
from frem_search.study.stored import keep_cohort, make_contract, open_study

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE, THREADS, STACKED = (
    Arrangement(),
    Arrangement(cohort=4, layout="threads"),
    Arrangement(cohort=4, layout="stacked"),
)


@pytest.fixture
def trainee(tiny_study):
    study_file = load_study_file(str(tiny_study), n_trials=40)
    return Trainee(study_file, load_dataset(study_file.dataset), CPU, "fp32")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch, home):
    monkeypatch.setattr(arrangement_module, "n_cores", lambda: 4)


@pytest.fixture
def speeds(monkeypatch):
    """Arrangements and their speeds instead of real measurements; `speeds.measured` lists what was asked for."""

    class Speeds(dict):
        measured: ClassVar[list]

    known = Speeds()

    def measure(subject, arrangement, *, seconds):
        known.measured.append(arrangement)
        got = known.get(arrangement, 1.0)
        return got if isinstance(got, Speed) else Speed(arrangement, got)

    known.measured = []
    monkeypatch.setattr(arrangement_module, "measure", measure)
    return known


@pytest.mark.parametrize("text", ["0", "-1", "65", "two", "", "1.5", "²", "AUTO"])
def test_a_cohort_that_is_none_is_told(text):
    with pytest.raises(UsageError, match="--cohort: expected auto or a number of trials from 1 to 64, but got"):
        parse_cohort(text)


def test_a_cohort_that_is_none_begins_no_study(tiny_study, storage, tmp_path):
    with (
        pytest.raises(UsageError, match="--cohort"),
        open_worker(load_study_file(str(tiny_study)), storage, device="cpu", artifacts=str(tmp_path), cohort="two"),
    ):
        pass
    assert optuna.get_all_study_names(storage.optuna) == []


def test_candidates_on_the_cpu_begin_with_the_simplest_and_have_processes(trainee):
    assert list(candidates(trainee)) == [
        ALONE,
        THREADS,
        STACKED,
        Arrangement(cohort=8, layout="stacked"),
        Arrangement(workers=4),
    ]
    assert list(candidates(trainee, cohort=1, workers=1)) == [ALONE]
    assert list(candidates(trainee, cohort=4)) == [THREADS, STACKED]
    assert {each.workers for each in candidates(trainee, workers=2)} == {2}


def test_a_small_budget_is_not_drawn_all_at_once(trainee):
    small = replace(trainee, study_file=replace(trainee.study_file, n_trials=8))
    assert max(each.workers * each.cohort for each in candidates(small)) == 2


def test_candidates_on_a_gpu_have_no_processes(trainee):
    found = list(candidates(replace(trainee, device=GPU)))
    assert {each.workers for each in found} == {1}
    assert {each.layout for each in found} == {"in_turn", "stacked", "graphs"}
    assert [each.cohort for each in found if each.layout == "graphs"] == [1, 2, 4, 8]


def test_the_fastest_is_chosen_measured_once_and_remembered(trainee, speeds, home):
    speeds.update({ALONE: 100.0, THREADS: 180.0, STACKED: 150.0})
    told = []
    assert choose(trainee, tell=told.append) == THREADS
    assert len(told) == 2
    n_measured = len(speeds.measured)
    assert choose(trainee, tell=told.append) == THREADS
    assert (len(speeds.measured), len(told)) == (n_measured, 2)
    (entry,) = json.loads((home / "arrangements.json").read_text()).values()
    assert [each["images_per_s"] for each in entry["measured"]][:3] == [100.0, 180.0, 150.0]


def test_what_is_measured_depends_on_network_images_batch_and_precision(trainee, speeds):
    choose(trainee)
    n_measured = len(speeds.measured)
    for other in (
        replace(trainee, precision="bf16"),
        replace(trainee, dataset=replace(trainee.dataset, images=trainee.dataset.images[:, :, :16, :16])),
        replace(trainee, study_file=replace(trainee.study_file, n_trials=16)),
    ):
        choose(other)
        assert len(speeds.measured) > n_measured
        n_measured = len(speeds.measured)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
def test_a_torn_file_of_measurements_is_measured_anew(trainee, speeds, home, content):
    (home / "arrangements.json").write_bytes(content)
    speeds[THREADS] = 50.0
    assert choose(trainee) == THREADS


def test_hardly_faster_is_not_worth_more_than_the_simplest(trainee, speeds):
    speeds.update({ALONE: 100.0, THREADS: 104.0})
    assert choose(trainee) == ALONE


def test_what_cannot_be_trained_here_is_not_chosen(trainee, speeds, home):
    speeds.update({ALONE: 100.0, THREADS: Speed(THREADS, 0.0, error="RuntimeError: no such kernel"), STACKED: 150.0})
    assert choose(trainee) == STACKED
    assert "no such kernel" in (home / "arrangements.json").read_text()


def test_a_device_without_memory_for_one_trial_is_told(trainee, speeds):
    for each in candidates(trainee):
        speeds[each] = Speed(each, 0.0, error="cpu: out of memory")
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        choose(trainee)


def on_gpu(trainee, monkeypatch, *, total):
    properties = type("Properties", (), {"total_memory": total})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return replace(trainee, device=GPU)


def test_two_probes_say_how_many_trials_a_gpu_has_room_for(trainee, speeds, monkeypatch):
    subject = on_gpu(trainee, monkeypatch, total=100)
    graphs = [Arrangement(cohort=k, layout="graphs") for k in (1, 2, 4, 8)]
    for each in graphs:  # 10 for the images and 10 for each: 8 would need 90, which is all that may be planned with
        speeds[each] = Speed(each, 100.0 * each.cohort, 10 + 10 * each.cohort)
    measure_all(subject, graphs)
    assert speeds.measured == graphs[:3]


def test_larger_cohorts_are_tried_as_long_as_they_gain(trainee, speeds, monkeypatch):
    subject = on_gpu(trainee, monkeypatch, total=1000)
    graphs = [Arrangement(cohort=k, layout="graphs") for k in (1, 2, 4, 8, 16)]
    speeds.update(zip(graphs, [100.0, 190.0, 195.0, 400.0, 800.0], strict=True))
    measure_all(subject, graphs)
    assert speeds.measured == graphs[:3]


def test_measuring_ends_when_its_time_is_over(trainee, speeds, monkeypatch):
    monkeypatch.setattr(arrangement_module, "SECONDS_IN_ALL", -1.0)
    assert choose(trainee) == ALONE
    assert speeds.measured == [ALONE]


@pytest.fixture
def begin(storage, trainee):
    def begin():
        file, dataset = trainee.study_file, trainee.dataset
        contract = make_contract(
            file,
            precision="fp32",
            dataset=dataset.name,
            dataset_fingerprint=dataset.fingerprint,
            class_names=dataset.class_names,
        )
        return open_study(storage, file, contract)

    return begin


def test_without_options_a_study_begins_on_the_cpu_with_one_trial_at_a_time_and_unmeasured(begin, trainee, speeds):
    assert settle(begin(), trainee) == ALONE
    assert settle(begin(), trainee, workers=3) == Arrangement(workers=3)
    assert speeds.measured == []
    assert begin().cohort == {"cohort": 1, "layout": "in_turn"}


def test_the_cohort_that_a_study_began_with_is_kept(begin, trainee, speeds):
    speeds[STACKED] = 50.0
    assert settle(begin(), trainee, cohort="4") == STACKED
    for cohort in (None, "auto", "4"):
        assert settle(begin(), trainee, cohort=cohort, workers=2) == replace(STACKED, workers=2)
    with pytest.raises(ContractError, match=r"begun with --cohort 4, but --cohort 2 .* study fork"):
        settle(begin(), trainee, cohort="2")


def test_one_trial_at_a_time_is_one_process(begin, trainee, speeds):
    speeds[Arrangement(workers=4)] = 50.0
    assert settle(begin(), trainee, cohort="1") == ALONE
    assert speeds.measured == []


def test_of_two_workers_that_begin_a_study_the_first_decides(begin, trainee, speeds):
    late = begin()
    assert keep_cohort(begin(), {"cohort": 2, "layout": "threads"}) == {"cohort": 2, "layout": "threads"}
    assert settle(late, trainee) == Arrangement(cohort=2, layout="threads")


def test_on_another_kind_of_device_the_cohort_stays_and_the_layout_is_measured(begin, trainee, speeds):
    keep_cohort(begin(), {"cohort": 4, "layout": "graphs"})
    speeds[STACKED] = 50.0
    assert settle(begin(), trainee) == STACKED


def test_on_a_gpu_a_study_begins_with_what_is_the_fastest_there(begin, trainee, speeds, monkeypatch):
    subject, fastest = on_gpu(trainee, monkeypatch, total=1000), Arrangement(cohort=4, layout="graphs")
    monkeypatch.setattr(arrangement_module, "describe_device", str)
    speeds.update({ALONE: 10.0, Arrangement(cohort=2, layout="graphs"): 30.0, fastest: 50.0})
    assert settle(begin(), subject) == fastest
