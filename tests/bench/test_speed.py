"""Images per second: every arrangement trains as a search would, and what cannot be trained is told."""

from dataclasses import replace

import pytest
import torch

from frem_search.bench import speed as speed_module
from frem_search.bench.speed import Arrangement, Speed, Trainee, best, measure
from frem_search.data.dataset import load_dataset
from frem_search.errors import DeviceError, DeviceMemoryError
from frem_search.segmentation.networks.unet import UNet
from frem_search.study.file import load_study_file
from frem_search.study.space import Fixed


@pytest.fixture
def trainee(tiny_study):
    study_file = load_study_file(str(tiny_study))
    return Trainee(study_file, load_dataset(study_file.dataset), torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    "arrangement",
    [
        Arrangement(),
        Arrangement(cohort=2, layout="threads"),
        Arrangement(cohort=3, layout="stacked"),
        Arrangement(workers=2),
    ],
    ids=str,
)
def test_every_arrangement_has_a_speed(trainee, arrangement):
    n_threads = torch.get_num_threads()
    speed = measure(trainee, arrangement, seconds=0)
    assert (speed.error, speed.arrangement) == ("", arrangement)
    assert speed.images_per_s > 0
    assert torch.get_num_threads() == n_threads


def test_a_trial_that_would_come_to_its_end_trains_on_while_it_is_timed(trainee, monkeypatch):
    trained, take = [], speed_module._take

    def counted(reports, n):
        return take((trained.append(report) or report for report in reports), n)

    monkeypatch.setattr(speed_module, "_take", counted)
    space = trainee.study_file.space | {"patience": Fixed(1), "learning_rate": Fixed(1e-9)}
    impatient = replace(trainee, study_file=replace(trainee.study_file, space=space))
    assert measure(impatient, Arrangement(), seconds=0.3).error == ""
    assert len(trained) > 4
    assert not any(report.is_done for report in trained)


def test_what_cannot_be_trained_has_no_speed_and_says_why(trainee, monkeypatch):
    def fail(self, x):
        message = "no such kernel"
        raise RuntimeError(message)

    monkeypatch.setattr(UNet, "forward", fail)
    speed = measure(trainee, Arrangement(), seconds=0)
    assert (speed.images_per_s, speed.error) == (0.0, "RuntimeError: no such kernel")


def test_a_device_without_memory_has_no_speed(trainee, monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(UNet, "forward", fail)
    error = measure(trainee, Arrangement(cohort=2, layout="stacked"), seconds=0).error
    assert error == f"cpu: out of memory: OutOfMemoryError. {DeviceMemoryError.remedy}"


def test_a_gpu_that_failed_is_told_and_nothing_more_is_timed_on_it(trainee, monkeypatch):
    def fail():
        message = "CUDA error: unspecified launch failure"
        raise torch.AcceleratorError(message)

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    with pytest.raises(DeviceError, match=r"^cuda:99: failed: CUDA error: unspecified launch failure\. "):
        measure(replace(trainee, device=torch.device("cuda:99")), Arrangement(), seconds=0)


def test_a_shortened_epoch_has_two_batches_and_as_large_a_share_to_validate(trainee):
    study_file = replace(trainee.study_file, space=trainee.study_file.space)
    short = replace(trainee, study_file=study_file).shortened().dataset
    batch = trainee.params.get("batch_size", 8)
    split = trainee.dataset.splits[0]
    n_train = min(2 * batch, len(split.train))
    assert len(short.indices("train", fold=0)) == n_train
    assert len(short.indices("val", fold=0)) == max(1, round(n_train * len(split.val) / len(split.train)))
    assert len(short.indices("test", fold=0)) == 0


def test_the_best_is_the_first_of_those_that_are_about_as_fast():
    speeds = [Speed(Arrangement(cohort=k), value) for k, value in ((1, 100.0), (2, 104.0), (4, 130.0), (8, 132.0))]
    assert best(speeds).arrangement.cohort == 4
    with pytest.raises(ValueError, match="at least one"):
        best([])
