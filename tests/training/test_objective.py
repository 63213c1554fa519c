"""The objective: what it refuses before the first trial, and what a trial leaves behind."""

import errno
import gc
import hashlib
import json
import os
import platform
import shutil
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from frem_search import __version__
from frem_search.data.augmentation.turns import Augmentation
from frem_search.data.dataset import load_dataset
from frem_search.errors import ArtifactError, DeviceError, DeviceMemoryError, ParameterError, StudyFileError, UsageError
from frem_search.seeds import derive
from frem_search.segmentation.evaluate import evaluate
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.metrics.iou import mean_iou_score
from frem_search.segmentation.networks import build_network
from frem_search.segmentation.predict import predict_image
from frem_search.segmentation.weights import load_weights
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import load_study_file
from frem_search.study.parameters import TrainingParams
from frem_search.study.space import parse_space
from frem_search.training import image_cache, results
from frem_search.training import recipe as parameters
from frem_search.training.objective import Objective
from frem_search.training.recipe import check, first_image_size, left_out, split_params

CPU = torch.device("cpu")
LEFT = ["learning_curve.csv", "predictions.npz", "predictions.png"]
PARAMS = {"image_size": 32, "base_channels": 4, "depth": 2, "batch_size": 4, "B": 3, "X": 20.0}


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def study_file(tiny_study):
    return load_study_file(str(tiny_study))


@pytest.fixture
def with_params(study_file):
    """The tiny study with other parameters; None removes one."""

    def with_params(**changes):
        names = {"weight": "lambda"}
        space = dict(study_file.space)
        for name, value in changes.items():
            space.pop(names.get(name, name), None)
            if value is not None:
                space |= parse_space({names.get(name, name): value}, where="s")
        return replace(study_file, space=space)

    return with_params


@pytest.fixture
def make_objective(tmp_path, study_file):
    def make(file=study_file, *, uid="u", artifacts=tmp_path / "artifacts", n_test=None, **settings):
        dataset = load_dataset(file.dataset, image_size=first_image_size(file))
        if n_test is not None:
            split = dataset.splits[0]
            dataset = replace(dataset, splits=(replace(split, test=split.test[:n_test]),))
        store = Artifacts(str(artifacts), "study")
        return Objective(file, dataset, device=CPU, precision="fp32", artifacts=store, study_uid=uid, **settings)

    return make


def train(trained, number=0, params=PARAMS, *, until=None):
    trained.admit(number, params)
    for report in trained.epochs():
        if report.epoch == until:
            return


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"B": {"low": 0, "high": 17}}, "params.B: expected 0 to 16, the bottleneck's maps, but got 17."),
        ({"B": 17}, "params.B: expected 0 to 16, the bottleneck's maps, but got 17."),
        ({"B": [0, 16, 17]}, "params.B: expected 0 to 16, the bottleneck's maps, but got 17."),
        ({"base_channels": [8, 4], "B": 32}, "params.B: expected 0 to 16, the bottleneck's maps, but got 32."),
        ({"B": -1}, "params.B: expected 0 to 16, the bottleneck's maps, but got -1."),
        ({"B": {"low": 0.0, "high": 16.0}}, "params.B: expected a value of type int, but got 0.0."),
        ({"B": True}, "params.B: expected a value of type int, but got True."),
        ({"X": {"low": 0, "high": 10}}, "params.X: expected a finite factor above 0, but got 0."),
        ({"X": 1e39}, "params.X: expected a finite factor above 0, but got 1e+39."),
        ({"X": {"low": 1.0, "high": 1e7}}, "params.X: expected a finite factor above 0, at most 1e6, as sums of"),
        ({"X": "big"}, "params.X: expected a value of type float, but got 'big'."),
        ({"depth": 0}, "params.depth: expected at least 1, but got 0."),
        ({"depth": [2, 60]}, "params: expected sizes that a tensor can have, but got"),
        ({"base_channels": 2**62}, "params: expected sizes that a tensor can have, but got"),
        (
            {"normalization": "x"},
            "params.normalization: expected 'batch_norm' or 'batch_renorm' or 'none', but got 'x'.",
        ),
        ({"concatenation": "x"}, "params.concatenation: expected 'plain' or 'batch_norm' or"),
        ({"seed": -1}, "params.seed: expected an integer of at least 0, but got -1."),
        ({"recalibrate": 1}, "params.recalibrate: expected true or false, but got 1."),
        ({"supervision": 1}, "params.supervision: expected a value of type bool, but got 1."),
        ({"weight": 0.3}, "params.lambda: expected a network with an auxiliary output (supervision = true), but"),
        ({"weight": 1.1, "supervision": True}, "params.lambda: expected a weight from 0 to 1, but got 1.1."),
        ({"weight": {"low": 0.0, "high": 2.0}, "supervision": True}, "params.lambda: expected a weight from 0 to 1"),
        ({"weight": "a", "supervision": True}, "params.lambda: expected a weight from 0 to 1, but got 'a'."),
        ({"weight": True, "supervision": True}, "params.lambda: expected a weight from 0 to 1, but got True."),
        ({"learning_rate": 0}, "params.learning_rate: expected a finite number above 0, but got 0."),
        ({"learning_rate": -1e-3}, "params.learning_rate: expected a finite number above 0, but got -0.001."),
        ({"learning_rate": "1e-3"}, "params.learning_rate: expected a finite number above 0, but got '1e-3'."),
        ({"learning_rate": True}, "params.learning_rate: expected a finite number above 0, but got True."),
        ({"learning_rate": {"low": 0.0, "high": 1.0}}, "params.learning_rate: expected a finite number above 0, but"),
        ({"batch_size": 0}, "params.batch_size: expected an integer of at least 1, but got 0."),
        ({"batch_size": 4.0}, "params.batch_size: expected an integer of at least 1, but got 4.0."),
        ({"batch_size": [4, "8"]}, "params.batch_size: expected an integer of at least 1, but got '8'."),
        ({"image_size": 0}, "params.image_size: expected pixels, or [rows, columns], but got 0."),
        ({"image_size": 32.0}, "params.image_size: expected pixels, or [rows, columns], but got 32.0."),
        ({"image_size": "32"}, "params.image_size: expected pixels, or [rows, columns], but got '32'."),
        ({"image_size": {"value": [32]}}, "params.image_size: expected pixels, or [rows, columns], but got (32,)."),
        (
            {"image_size": [[32, 32], [32, 0]]},
            "params.image_size: expected pixels, or [rows, columns], but got (32, 0)",
        ),
        ({"augmentation": "no"}, "params.augmentation: expected true or false, but got 'no'."),
        ({"rotation": 1}, "params.rotation: expected true or false, but got 1."),
        ({"eightfold": 8}, "params.eightfold: expected true or false, but got 8."),
        ({"elastic_share": 1.5}, "params.elastic_share: expected a share from 0 to 1, but got 1.5."),
        ({"fixed_alpha": 1}, "params.fixed_alpha: expected true or false, but got 1."),
        ({"alpha": {"low": -1.0, "high": 5.0}}, "params.alpha: expected a finite number of at least 0, but got -1.0."),
        ({"sigma_elastic": 0.0}, "params.sigma_elastic: expected pixels from 0.1 to 1000, but got 0.0."),
        ({"elastic_from": 70}, "params.elastic_from: expected a score from 0 to 1, but got 70."),
        ({"mirror_quarters": "0.1"}, "params.mirror_quarters: expected a share from 0 to 1, but got '0.1'."),
        ({"crop_size": [32, 0]}, "params.crop_size: expected pixels, or [rows, columns], but got 0."),
        ({"weight_decay": -1e-4}, "params.weight_decay: expected a finite number of at least 0, but got -0.0001."),
        ({"patience": 0}, "params.patience: expected an integer of at least 1, but got 0."),
        ({"steps_per_epoch": 2.5}, "params.steps_per_epoch: expected an integer of at least 1, but got 2.5."),
        ({"tiles": [1, 0]}, "params.tiles: expected an integer of at least 1, but got 0."),
        *(
            (
                {"schedule": {"value": schedule}},
                "params.schedule: expected { value = [[epoch, factor], ...] } with rising epochs from 1 on and",
            )
            for schedule in (0.5, [1, 0.5], [[0, 0.5]], [[1, 0.0]], [[5, 0.5], [5, 0.1]], [[2, 0.5, 1]], [[1, "1"]])
        ),
        ({"learning_rat": 1e-3}, "params.learning_rat: expected one of the parameters of unet, its loss and training:"),
    ],
)
def test_a_wrong_parameter_is_told_before_anything_is_trained(with_params, changes, says):
    file = with_params(**changes)
    with pytest.raises(StudyFileError) as raised:
        check(file)
    assert str(raised.value).startswith(f"{file.path}: {says}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"B": 0, "X": 1},
        {"image_size": None},
        {"image_size": {"value": [32, 48]}},
        {"image_size": [[32, 48], [16, 16]]},
        {"image_size": [16, 32]},
        {"supervision": True, "weight": {"low": 0.0, "high": 1.0}},
        {"supervision": True},
        {"supervision": [True, False]},
        {"learning_rate": 1, "augmentation": False},
        {"normalization": ["batch_norm", "batch_renorm"], "squeeze_excite": [True, False]},
        {"alpha": {"low": 0.0, "high": 100.0}, "sigma_elastic": {"low": 1.0, "high": 10.0}, "elastic_from": [0.0, 0.7]},
        {"schedule": {"value": [[1, 1.0], [21, 0.5], [101, 0.1]]}, "weight_decay": 1e-4, "patience": 10},
        {"schedule": [[[1, 1.0]], [[1, 0.5], [2, 0.25]]], "steps_per_epoch": 6, "tiles": 2, "eightfold": True},
        {"rotation": True, "mirror_quarters": 0.1, "crop_size": {"value": [16, 24]}},
    ],
)
def test_what_can_be_trained_passes(with_params, changes):
    check(with_params(**changes))


LOSS_CASES = [
    (
        "feedback_cross_entropy",
        {},
        'lambda: expected a network with an auxiliary output (network = "feedback_unet"), but',
    ),
    ("feedback_cross_entropy", {"weight": 0.5}, "lambda: expected a network with an auxiliary output (network = "),
    (
        "feedback_cross_entropy",
        {"weight": 1.5, "supervision": True},
        "lambda: expected a weight from 0 to 1, but got 1.5",
    ),
    (
        "border_cross_entropy",
        {"weight": 0.5},
        "lambda: expected one of the parameters of unet, its loss and training: ",
    ),
    ("border_cross_entropy", {"omega_0": -1.0}, "omega_0: expected a weight from 0 to 1000, but got -1.0."),
    ("border_cross_entropy", {"sigma_border": 0}, "sigma_border: expected pixels from 0.1 to 1000, but got 0."),
    ("smooth_l1", {"omega_0": 1.0}, "omega_0: expected one of the parameters of unet, its loss and training: "),
]


@pytest.mark.parametrize(("loss", "changes", "says"), LOSS_CASES)
def test_a_wrong_coefficient_is_told_before_anything_is_trained(with_params, loss, changes, says):
    file = replace(with_params(**changes), loss=loss)
    with pytest.raises(StudyFileError) as raised:
        check(file)
    assert str(raised.value).startswith(f"{file.path}: params.{says}")


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("feedback_cross_entropy", {"supervision": True}),
        ("feedback_cross_entropy", {"supervision": True, "weight": {"low": 0.0, "high": 1.0}}),
        ("border_cross_entropy", {"omega_0": {"low": 0, "high": 50}, "sigma_border": {"low": 1.0, "high": 20.0}}),
        ("weighted_cross_entropy", {}),
        ("smooth_l1", {}),
    ],
)
def test_coefficients_that_a_loss_takes_pass(with_params, loss, changes):
    check(replace(with_params(**changes), loss=loss))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"image_size": {"value": [32, 48]}, "eightfold": True},
            "eightfold: expected false, or a square image_size, for images of 32 x 48 pixels, but got True.",
        ),
        ({"tiles": [2, 3]}, "tiles: expected a divisor of height and width of images of 32 x 32 pixels, but got 3."),
        ({"crop_size": 33}, "crop_size: expected at most the size of images of 32 x 32 pixels, but got 33."),
        (
            {"crop_size": {"value": [8, 20]}, "tiles": 2},
            "crop_size: expected at most the size of images of 32 x 32 pixels cut into 2 x 2, but got (8, 20).",
        ),
        (
            {"image_size": [32, 24], "crop_size": 32},
            "crop_size: expected at most the size of images of 24 x 24 pixels,",
        ),
    ],
)
def test_images_that_cannot_be_cut_as_a_study_says_are_told_before_anything_is_trained(
    make_objective, with_params, changes, says
):
    file = with_params(**changes)
    check(file)
    with pytest.raises(StudyFileError) as raised:
        make_objective(file)
    assert str(raised.value).startswith(f"{file.path}: params.{says}")


def test_a_loss_or_score_of_two_classes_is_told_that_there_are_three(make_objective, study_file):
    with pytest.raises(UsageError) as raised:
        make_objective(replace(study_file, loss="smooth_l1"))
    told = "tiny: expected images of 2 classes, as smooth_l1 needs them, but tiny has 3 (ground, disc, square). Choose"
    assert str(raised.value).startswith(told)
    with pytest.raises(UsageError, match="v_rand"):
        make_objective(replace(study_file, score="v_rand"))


def test_the_edges_of_every_parameter_are_checked_however_many_there_are(with_params):
    many = {name: [0.5, 0.25, 0.125, 0.0625] for name in ("learning_rate", "X")}
    many |= {"batch_size": [1, 2, 3, 4], "se_reduction": [1, 2, 3, 4], "image_size": [8, 16, 24, 32]}
    with pytest.raises(StudyFileError, match=r"params\.B: expected 0 to 16"):
        check(with_params(**many, B={"low": 0, "high": 17}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("network", "unte", "network: Unknown network 'unte'. Did you mean 'unet'? Known: unet"),
        ("network", "xyz", "network: Unknown network 'xyz'. Known: unet"),
        ("loss", "dice", f"loss: expected one of {', '.join(LOSSES)}, but got 'dice'."),
        ("score", "miou", f"score: expected one of {', '.join(METRICS)}, but got 'miou'."),
    ],
)
def test_an_unknown_name_is_told_with_what_is_known(study_file, key, value, says):
    file = replace(study_file, **{key: value})
    with pytest.raises(StudyFileError) as raised:
        check(file)
    assert str(raised.value).startswith(f"{file.path}: {says}")


def test_checking_takes_no_memory_for_weights(with_params, monkeypatch):
    devices = []
    build = parameters.build_network

    def watched(*args, **kwargs):
        devices.append(kwargs.get("device"))
        return build(*args, **kwargs)

    monkeypatch.setattr(parameters, "build_network", watched)
    check(with_params(base_channels=1024))
    assert set(devices) == {"meta"}


def test_parameters_go_to_whom_they_concern(study_file):
    split = split_params(study_file, PARAMS | {"image_size": [32, 48], "lambda": 0.7, "supervision": True})
    assert split.network == {"base_channels": 4, "depth": 2, "B": 3, "X": 20.0, "supervision": True}
    assert split.coefficients == {"lambda": 0.7}
    assert split.training == TrainingParams(batch_size=4, image_size=(32, 48))


def test_what_a_study_leaves_out_has_its_usual_value(study_file):
    split = split_params(study_file, {})
    assert (split.network, split.coefficients) == ({}, {"lambda": 0.3})
    assert split.training == TrainingParams()


def test_an_unknown_parameter_is_told_with_all_that_are_known(study_file):
    with pytest.raises(ParameterError, match=r"^lr: expected one of .*B, X, .*lambda, learning_rate"):
        split_params(study_file, {"lr": 1})


def test_a_study_with_everything_reaches_its_members(make_objective, with_params, study_file):
    given = {
        "augmentation": False, "rotation": True, "alpha": 50.0, "fixed_alpha": True, "elastic_share": 0.5,
        "sigma_elastic": 3.0, "elastic_from": 0.7,
        "mirror_quarters": 0.1, "crop_size": 8, "weight_decay": 1e-4, "schedule": [[1, 1.0], [21, 0.5]], "patience": 9,
        "steps_per_epoch": 6, "tiles": 2, "eightfold": True, "seed": 3, "recalibrate": True,
    }  # fmt: skip
    trained = make_objective(replace(study_file, loss="border_cross_entropy"))
    member = trained.build_member(0, PARAMS | given, fold=0)
    assert member.augmentation == Augmentation(
        turns=False,
        rotation=True,
        alpha=50.0,
        fixed_alpha=True,
        elastic_share=0.5,
        sigma_elastic=3.0,
        elastic_from=0.7,
        mirror_quarters=0.1,
        crop_size=(8, 8),
    )
    assert (member.weight_decay, member.schedule, member.patience) == (1e-4, ((1, 1.0), (21, 0.5)), 9)
    assert (member.steps_per_epoch, member.tiles, member.n_epochs) == (6, 2, study_file.n_epochs)
    assert (len(member.data.train), len(member.data.val)) == (8 * 8 * 4, 2 * 8)
    assert member.data.train.border.shape == (8 * 8 * 4, 16, 16)
    assert member.coefficients == {"omega_0": 10.0, "sigma_border": 5.0}
    assert (member.seed, member.recalibrate) == (derive(0, "training", 3), True)
    plain = trained.build_member(1, PARAMS, fold=0)
    assert plain.augmentation == Augmentation()
    assert (plain.seed, plain.recalibrate) == (study_file.sampler.seed, False)
    assert (len(plain.data.train), plain.data.train.labels.shape[1:]) == (8, (32, 32))
    assert plain.data is not member.data


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        ("weighted_cross_entropy", {}),
        ("feedback_cross_entropy", {"supervision": True}),
        ("border_cross_entropy", {"learning_rate": 1e-2}),
    ],
)
def test_trials_train_with_every_loss(make_objective, study_file, loss, given):
    trained = make_objective(replace(study_file, loss=loss))
    trained.admit(0, PARAMS | given)
    reports = list(trained.epochs())
    assert [(report.error, report.is_finite) for report in reports] == [(None, True)] * study_file.n_epochs
    assert reports[-1].train_loss < reports[0].train_loss


def test_a_network_trained_in_regions_of_turned_images_is_scored_so_from_its_weights(
    make_objective, study_file, tmp_path
):
    params = PARAMS | {"tiles": 2, "eightfold": True, "learning_rate": 1e-2}
    trained = make_objective()
    train(trained, params=params)
    outcome = trained.finish(0)
    assert trained.provenance(0)["images"] == study_file.n_epochs * 8 * 8 * 4
    weights = load_weights((tmp_path / "artifacts/study/0/weights.pt").read_bytes(), where="w")
    assert (weights.tiles, weights.is_eightfold) == (2, True)
    scored = evaluate(weights, dataset=study_file.dataset, device="cpu")
    assert (scored.n_images, scored.value) == (16, outcome.result["test"]["mean_iou"])
    with np.load(tmp_path / "artifacts/study/0/predictions.npz") as stored:
        images = trained.trial(0).members[0].data.test.images
        for image, pred in zip(images.numpy()[:2], stored["pred"][:2], strict=True):
            np.testing.assert_array_equal(predict_image(weights.build(CPU), image, weights=weights), pred)


def test_a_trial_leaves_its_scores_weights_and_predictions(make_objective, tmp_path):
    trained = make_objective()
    train(trained, 7)
    member = trained.trial(7).members[0]
    outcome = trained.finish(7)
    folder = tmp_path / "artifacts" / "study" / "7"
    assert sorted(path.name for path in folder.iterdir()) == [*LEFT, "weights.pt"]
    assert outcome.score == member.best_score == outcome.result["val"]["mean_iou"]
    assert set(outcome.result) == {"best_epoch", "val", "test", "phases"}
    assert list(outcome.result["test"]["per_class"]) == ["ground", "disc", "square"]
    assert json.loads(json.dumps(outcome.result, allow_nan=False)) == outcome.result
    with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
        assert stored["cases"].tolist() == ["case10", "case11"]
        assert (stored["pred"].shape, stored["pred"].dtype) == ((2, 32, 32), np.uint8)


def test_a_trial_with_frem_is_scored_in_both_test_phases_by_the_weights_of_one_epoch(make_objective, study_file):
    longer = replace(study_file, n_epochs=20)
    plain, enhanced = make_objective(longer), make_objective(longer, uid="enhanced")
    train(plain, 0, PARAMS | {"X": 300.0, "learning_rate": 1e-2})
    result = plain.finish(0).result
    assert result["phases"]["plain"] == {"val": result["val"], "test": result["test"]}
    assert result["phases"]["enhanced"] != result["phases"]["plain"]
    train(enhanced, 0, PARAMS | {"X": 300.0, "learning_rate": 1e-2, "enhanced_in_test": True})
    member = enhanced.trial(0).members[0]
    member.best_weights = plain.trial(0).members[0].best_weights
    assert enhanced.finish(0).result["phases"] == result["phases"]


@pytest.mark.parametrize("params", [{"B": 0}, {"X": 1.0}])
def test_a_trial_that_enhances_nothing_has_one_phase(make_objective, params):
    trained = make_objective()
    train(trained, 0, PARAMS | params)
    assert "phases" not in trained.finish(0).result


def test_a_seed_of_its_own_changes_weights_and_batches_of_a_trial_and_nothing_else(make_objective):
    trained = make_objective()
    for number, seed in enumerate([None, 0, 1]):
        train(trained, number, PARAMS if seed is None else PARAMS | {"seed": seed})
    curves = [trained.trial(number).curve["train_loss"] for number in range(3)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_the_test_images_are_scored_once_with_the_best_weights(make_objective, study_file, tmp_path, monkeypatch):
    predicted = []
    predict = results.predict

    def watched(network, images, **kwargs):
        predicted.append(len(images))
        return predict(network, images, **kwargs)

    monkeypatch.setattr(results, "predict", watched)
    trained = make_objective(replace(study_file, n_epochs=20))
    train(trained, params=PARAMS | {"learning_rate": 1e-2})
    member = trained.trial(0).members[0]
    best = {name: value.clone() for name, value in member.best_weights.items()}
    with torch.no_grad():
        member.network.head.weight.zero_()  # the last epoch's weights are not to be looked at
    outcome = trained.finish(0)
    assert predicted == [2, 2, 2], "the test images once in each phase, and the validation images in the other one"

    dataset = load_dataset(study_file.dataset, image_size=32)
    content = torch.load(tmp_path / "artifacts/study/0/weights.pt", weights_only=True)
    network = build_network("unet", in_channels=1, n_classes=3, seed=9, params=content["network_params"])
    network.load_state_dict(content["state"])
    network.eval()
    for part, scored in (("val", outcome.result["val"]), ("test", outcome.result["test"])):
        indices = dataset.indices(part, fold=0)
        images, labels = torch.from_numpy(dataset.images[indices]), torch.from_numpy(dataset.labels[indices])
        with torch.inference_mode():
            pred = network(images.contiguous(memory_format=torch.channels_last)).logits.argmax(dim=1)
        score = mean_iou_score(pred, labels, n_classes=3)
        assert scored["mean_iou"] == score.value.item()
        expected = dict(zip(dataset.class_names, score.per_class.tolist(), strict=True))
        assert scored["per_class"] == {name: None if iou != iou else iou for name, iou in expected.items()}
    assert len(pred.unique()) > 1, "the test needs a network that sees more than one class"
    with np.load(tmp_path / "artifacts/study/0/predictions.npz") as stored:
        np.testing.assert_array_equal(stored["pred"], pred.numpy())
    assert all(torch.equal(content["state"][name], value) for name, value in best.items())


def test_the_weights_file_says_where_it_comes_from(make_objective, study_file, tmp_path):
    trained = make_objective()
    train(trained, 4)
    trained.finish(4)
    path = tmp_path / "artifacts/study/4/weights.pt"
    kept = load_weights(path.read_bytes(), where=str(path))
    assert (kept.network, kept.study, kept.trial, kept.params) == ("unet", "tiny", 4, PARAMS)
    assert (kept.class_names, kept.in_channels, kept.image_size) == (("ground", "disc", "square"), 1, 32)
    assert (kept.dataset, kept.fold, kept.score, kept.precision) == ("tiny", 0, "mean_iou", "fp32")


def test_without_test_images_there_are_no_predictions(make_objective, tmp_path):
    trained = make_objective(n_test=0)
    train(trained)
    assert set(trained.finish(0).result) == {"best_epoch", "val", "phases"}
    folder = tmp_path / "artifacts/study/0"
    assert not (folder / "predictions.npz").exists()
    # The picture is of validation images then.
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_extra_scores_are_told_of_validation_and_test_images(make_objective, study_file):
    trained = make_objective(replace(study_file, extra_scores=("cell_iou", "seg")))
    train(trained)
    result = trained.finish(0).result
    member = trained.trial(0).members[0]
    for part in ("val", "test"):
        images = getattr(member.data, part)
        pred = member.network.eval()(images.images).logits.argmax(dim=1).to(torch.uint8)
        for name in ("cell_iou", "seg"):
            expected = METRICS[name].function(pred, images.labels, n_classes=3).value.item()
            assert result["extra"][name][part] == pytest.approx(expected)
    assert result["extra"]["cell_iou"]["val"] == pytest.approx(result["val"]["per_class"]["disc"])


def test_an_extra_score_without_its_package_is_told_as_null(make_objective, study_file, monkeypatch):
    def load():
        message = "no package"
        raise UsageError(message)

    monkeypatch.setitem(METRICS, "seg", METRICS["seg"]._replace(load=load))
    file = replace(study_file, extra_scores=("cell_iou", "seg"))
    assert left_out(file) == "tiny: left out and stored as null: seg. no package"
    assert left_out(replace(file, extra_scores=("cell_iou",))) is None
    trained = make_objective(file)
    train(trained)
    extra = trained.finish(0).result["extra"]
    assert extra["seg"] == {"val": None, "test": None}
    assert all(0 <= value <= 1 for value in extra["cell_iou"].values())


def test_an_extra_score_that_there_is_not_is_told_before_training(study_file):
    with pytest.raises(StudyFileError, match=r"extra_scores: expected one of mean_iou, .*, but got 'dice'"):
        check(replace(study_file, extra_scores=("seg", "dice")))


def test_a_checkpoint_takes_the_trial_on_in_another_worker(make_objective):
    straight = make_objective(uid="straight", artifacts="memory://straight")
    train(straight)
    first = make_objective()
    train(first, until=2)
    first.save_checkpoint(0)
    second = make_objective()
    train(second)
    assert second.trial(0).curve["epoch"] == [1, 2, 3]
    assert second.trial(0).curve["score"] == straight.trial(0).curve["score"]
    assert second.finish(0) == straight.finish(0)


@pytest.mark.parametrize(
    "spoil", ["torn", "no checkpoint", "of another study", "of another trial", "of other parameters"]
)
def test_a_checkpoint_that_cannot_be_used_is_set_aside(make_objective, tmp_path, spoil):
    first = make_objective()
    train(first, until=1)
    first.save_checkpoint(0)
    path = tmp_path / "artifacts/study/0/checkpoint.pt"
    if spoil == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    if spoil == "no checkpoint":
        content = b"whole, but nothing that torch.load could read"
        path.write_bytes(content + hashlib.sha256(content).digest())
    if spoil == "of another trial":
        path = shutil.copytree(path.parent, path.parent.with_name("1")) / path.name
    second = make_objective(uid="v" if spoil == "of another study" else "u")
    trial = second.admit(
        int(spoil == "of another trial"), PARAMS | ({"X": 21.0} if spoil == "of other parameters" else {})
    )
    assert (trial.epoch, trial.curve["epoch"]) == (0, [])
    assert not path.exists()
    assert trial.set_aside == f"{path}.unusable"
    assert path.with_name("checkpoint.pt.unusable").exists()


def test_only_a_checkpoint_that_cannot_be_used_is_told_as_set_aside(make_objective):
    first = make_objective()
    assert first.admit(0, PARAMS).set_aside == ""
    first.save_checkpoint(0)
    assert make_objective().admit(0, PARAMS).set_aside == ""


def test_a_trial_whose_checkpoint_cannot_be_set_aside_can_be_let_go(make_objective, tmp_path, monkeypatch):
    first = make_objective()
    first.admit(0, PARAMS)
    first.save_checkpoint(0)
    second = make_objective(uid="v")
    monkeypatch.setattr(second._artifacts._files, "mv", raise_code_error)
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: cannot be renamed: a bug"):
        second.admit(0, PARAMS)
    second.release(0)
    assert list(second.epochs()) == []


def test_discarding_removes_the_checkpoints_and_on_request_the_weights(make_objective, tmp_path):
    trained = make_objective()
    train(trained)
    trained.save_checkpoint(0)
    trained.finish(0)
    folder = tmp_path / "artifacts/study/0"
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint.pt.unusable")
    trained.discard(0, weights=False)
    assert sorted(path.name for path in folder.iterdir()) == [*LEFT, "weights.pt"]
    trained.discard(0, weights=True)
    trained.discard(0, weights=True)
    assert sorted(path.name for path in folder.iterdir()) == LEFT


HALF_WRITTEN = [f"{i}/{name}.{i:032x}" for i in (0, 1) for name in (".checkpoint.pt", "fold1/.weights.pt")]


@pytest.mark.parametrize("store", ["folder", "memory"])
def test_a_sweep_removes_what_finished_trials_need_no_longer_and_nothing_else(make_objective, tmp_path, store):
    url = f"{tmp_path}/artifacts" if store == "folder" else f"memory://{tmp_path}"
    swept, files = make_objective(artifacts=url), Artifacts(url, "study")
    kept = ["0/weights.pt", "0/fold1/predictions.npz", "0/.checkpoint.pt.mine", "other/checkpoint.pt", "notes"]
    unfinished = [name for name in HALF_WRITTEN if name.startswith("1/")] + ["1/checkpoint.pt", "10/checkpoint.pt"]
    done_with = ["0/checkpoint.pt", "0/checkpoint.pt.unusable", "12/checkpoint.pt", HALF_WRITTEN[0], HALF_WRITTEN[1]]
    for name in (*kept, *unfinished, *done_with):
        files.write(name, b"1")
    another = Artifacts(url, "study-of-others")
    another.write("0/checkpoint.pt", b"1")
    swept.sweep([0, 12, 13])
    assert sorted(files.names()) == sorted(kept + unfinished)
    swept.sweep([])
    assert sorted(files.names()) == sorted(kept + unfinished)
    assert another.names() == ["0/checkpoint.pt"]
    files.remove_all()
    another.remove_all()


def test_a_writer_that_was_killed_leaves_nothing_after_a_sweep(make_objective, tmp_path, monkeypatch):
    trained = make_objective()
    trained.admit(0, PARAMS)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: None)  # killed before it
    trained.save_checkpoint(0)
    (left,) = (tmp_path / "artifacts/study/0").iterdir()
    assert left.name.startswith(".checkpoint.pt.")
    trained.sweep([0])
    assert not left.exists()


def test_a_sweep_is_one_listing_and_quiet_where_there_is_none(make_objective, monkeypatch):
    trained = make_objective(artifacts="memory://swept")
    trained.sweep([0])  # no folder yet
    for number in range(20):
        trained._artifacts.write(f"{number}/checkpoint.pt", b"1")
    listed, find = [], trained._artifacts._files.find
    monkeypatch.setattr(trained._artifacts._files, "find", lambda *args: listed.append(args) or find(*args))
    monkeypatch.setattr(trained._artifacts._files, "rm_file", raise_code_error)
    trained.sweep(range(20))
    assert len(listed) == 1
    monkeypatch.setattr(trained._artifacts._files, "find", raise_code_error)
    trained.sweep(range(20))
    monkeypatch.undo()
    trained._artifacts.remove_all()


def test_a_full_disk_is_told_with_the_remedy_and_leaves_no_torn_file(make_objective, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trained = make_objective()
    train(trained, until=1)
    monkeypatch.setattr("frem_search.storage.artifacts.os.fsync", full)
    with pytest.raises(ArtifactError) as raised:
        trained.save_checkpoint(0)
    path = tmp_path / "artifacts/study/0/checkpoint.pt"
    assert str(raised.value).startswith(f"{path}: cannot be written (")
    assert str(raised.value).endswith(
        " bytes): No space left on device. Free space, mend the permissions or credentials, or set "
        "FREM_SEARCH_ARTIFACTS to another place, and run the same command again."
    )
    assert list(path.parent.iterdir()) == []


def test_artifacts_below_a_file_are_told_before_anything_is_trained(make_objective, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ArtifactError, match=r"file/study/0/checkpoint\.pt: cannot be read: Not a directory\."):
        make_objective(artifacts=tmp_path / "file").admit(0, PARAMS)


def test_provenance_says_how_a_trial_was_trained(make_objective):
    trained = make_objective()
    train(trained, until=2)
    provenance = trained.provenance(0)
    assert provenance["frem_search"] == __version__
    assert provenance["torch"] == torch.__version__
    assert provenance["python"] == platform.python_version()
    assert provenance["device"] == "cpu, 1 thread"
    assert provenance["host"] == platform.node()
    assert (provenance["precision"], provenance["images"]) == ("fp32", 2 * 8)
    assert (provenance["cohort"], provenance["layout"]) == (1, "in_turn")
    assert provenance["seed"] == 0
    assert provenance["seconds"] > 0
    assert provenance["peak_memory_mb"] == provenance["peak_memory_mb_per_member"] > 10
    json.dumps(provenance, allow_nan=False)


@pytest.mark.parametrize("layout", ["in_turn", "threads", "stacked"])
def test_trials_side_by_side_are_what_they_are_alone_and_say_how_they_were_trained(make_objective, layout):
    trained, params = make_objective(layout=layout), (PARAMS, PARAMS | {"B": 9, "X": 3.0})
    for number, each in enumerate(params):
        trained.admit(number, each)
    assert sorted((report.key, report.epoch) for report in trained.epochs()) == [
        (n, e) for n in (0, 1) for e in (1, 2, 3)
    ]
    for number, each in enumerate(params):
        provenance = trained.provenance(number)
        assert (provenance["cohort"], provenance["layout"], provenance["images"]) == (2, layout, 3 * 8)
        assert provenance["peak_memory_mb_per_member"] == pytest.approx(provenance["peak_memory_mb"] / 2, abs=1)
        alone = make_objective(uid="alone")
        train(alone, number, each)
        losses = alone.trial(number).curve["train_loss"]
        # What rounding comes to in a stack: tests/training/side_by_side/test_layouts.py.
        tolerance = 2e-3 if layout == "stacked" else 0
        assert trained.trial(number).curve["train_loss"] == pytest.approx(losses, rel=0, abs=tolerance)


def test_threads_take_one_core_each(make_objective):
    torch.set_num_threads(2)
    make_objective(layout="stacked")
    assert torch.get_num_threads() == 2
    make_objective(layout="threads")
    assert torch.get_num_threads() == 1
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1]


def test_trials_of_one_image_size_share_one_copy_of_the_images(make_objective, with_params):
    trained = make_objective(with_params(image_size=[16, 32]))
    trials = [trained.admit(n, PARAMS | {"image_size": size}) for n, size in enumerate((16, 32, 16, 32))]
    members = [trial.members[0] for trial in trials]
    assert members[0].data is members[2].data
    assert members[1].data is members[3].data
    assert members[0].data is not members[1].data
    assert {report.key for report in trained.epochs() if report.is_done and report.error is None} == {0, 1, 2, 3}


def test_a_trial_whose_network_raises_is_told_in_its_report(make_objective):
    trained = make_objective()
    broken, _ = (trained.admit(number, PARAMS) for number in (0, 1))
    broken.members[0].network.head.forward = raise_code_error
    reports = list(trained.epochs())
    assert [(report.key, type(report.error)) for report in reports if report.error] == [(0, ZeroDivisionError)]
    assert [report.epoch for report in reports if report.key == 1] == [1, 2, 3]


def raise_code_error(*_, **__):
    message = "a bug in a network"
    raise ZeroDivisionError(message)


def test_trials_of_different_image_sizes_share_an_objective(make_objective, with_params):
    trained = make_objective(with_params(image_size=[[16, 24], [32, 32]]))
    for number, size in enumerate(([16, 24], [32, 32], [16, 24])):
        train(trained, number, PARAMS | {"image_size": size})
        assert trained.trial(number).epoch == 3
        trained.finish(number)
        trained.release(number)


def test_images_of_a_size_that_nobody_trains_at_leave_the_device(make_objective, with_params, monkeypatch):
    loaded = []
    load = image_cache.load_resident

    def watched(*args, **kwargs):
        folds = load(*args, **kwargs)
        loaded.append(weakref.ref(folds[0].train.whole))
        return folds

    monkeypatch.setattr(image_cache, "load_resident", watched)
    trained = make_objective(with_params(image_size=[16, 24, 32]))
    for number, size in enumerate((16, 24, 24)):
        trained.admit(number, PARAMS | {"image_size": size})
    gc.collect()
    assert [data() is not None for data in loaded] == [True, True]
    trained.release(0)
    trained.admit(3, PARAMS | {"image_size": 32})
    gc.collect()
    assert [data() is not None for data in loaded] == [False, True, True]
    assert {report.key for report in trained.epochs()} == {1, 2, 3}


def test_a_released_trial_is_trained_no_further(make_objective):
    trained = make_objective()
    train(trained, until=1)
    trained.release(0)
    assert list(trained.epochs()) == []
    with pytest.raises(KeyError):
        trained.trial(0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"learning_rate": {"low": 1e-4, "high": 1e-2}}, False),
        ({"normalization": ["batch_norm", "batch_renorm"]}, False),
        ({"base_channels": [2, 4], "B": 0}, True),
        ({"depth": [1, 2], "B": 0}, True),
        ({"batch_size": {"low": 2, "high": 4}}, True),
        ({"image_size": [16, 32]}, True),
        ({"supervision": [True, False]}, True),
        ({"crop_size": [16, 24]}, True),
        ({"tiles": [1, 2]}, True),
        ({"alpha": {"low": 0.0, "high": 10.0}, "elastic_from": [0.0, 0.5], "weight_decay": [0.0, 1e-4]}, False),
    ],
)
def test_a_study_knows_whether_one_trial_may_need_more_memory(make_objective, with_params, changes, expected):
    assert make_objective(with_params(**changes)).searches_shapes is expected


def out_of_memory(*_, **__):
    message = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation of CUDA."
    raise torch.OutOfMemoryError(message)


def broken(*_, **__):
    message = "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in the documentation."
    raise torch.AcceleratorError(message)


WHERE = {
    "built": "frem_search.training.objective.build_network",
    "restored": "frem_search.training.checkpoint.torch.load",
    "trained": "frem_search.training.cohort.score_images",
    "stored": "frem_search.training.checkpoint.torch.save",
    "scored": "frem_search.training.results.predict",
    "packed": "frem_search.training.results.dump_weights",
}


@pytest.mark.parametrize("when", WHERE)
@pytest.mark.parametrize("fails", [out_of_memory, broken])
def test_what_the_device_fails_at_is_told_as_its_fault_and_not_as_the_trials(make_objective, monkeypatch, when, fails):
    if when == "restored":
        before = make_objective()
        train(before, until=1)
        before.save_checkpoint(0)
    trained = make_objective()
    monkeypatch.setattr(WHERE[when], fails)
    with pytest.raises(DeviceError) as raised:  # noqa: PT012 where it happens is what differs
        train(trained)
        trained.save_checkpoint(0)
        trained.finish(0)
    if fails is out_of_memory:
        assert isinstance(raised.value, DeviceMemoryError)
        # The fact alone: it becomes the reason of trials.
        assert str(raised.value) == "cpu: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    else:
        assert not isinstance(raised.value, DeviceMemoryError)
        assert str(raised.value).startswith("cpu: failed: CUDA error: unspecified launch failure. This process cannot")
    assert "\n" not in str(raised.value)


def test_a_checkpoint_is_not_set_aside_for_what_the_device_fails_at(make_objective, tmp_path, monkeypatch):
    first = make_objective()
    train(first, until=1)
    first.save_checkpoint(0)
    monkeypatch.setattr(WHERE["restored"], broken)
    with pytest.raises(DeviceError):
        make_objective().admit(0, PARAMS)
    monkeypatch.undo()
    assert make_objective().admit(0, PARAMS).epoch == 1


def test_a_batch_that_the_network_cannot_normalise_is_a_usage_error(make_objective, with_params):
    trained = make_objective(with_params(image_size=4, batch_size=1))
    trained.admit(0, PARAMS | {"image_size": 4, "batch_size": 1})
    (report,) = trained.epochs()
    with pytest.raises(UsageError, match=r"^batch_size: expected at least 2 for training on images of 4x4"):
        raise report.error


def test_predictions_are_kept_after_the_epochs_that_a_study_names(make_objective, study_file, tmp_path):
    trained = make_objective(replace(study_file, n_epochs=6, predictions_after=(1, 6)))
    train(trained, params=PARAMS | {"learning_rate": 3e-2})
    folder = tmp_path / "artifacts/study/0"
    assert not folder.exists(), "nothing is written before a checkpoint or the end"
    trained.finish(0)
    first, last = (folder / f"predictions_after_{epoch}.png" for epoch in (1, 6))
    assert sorted(path.name for path in folder.glob("predictions_after*")) == [first.name, last.name]
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() != last.read_bytes(), "the test needs a network that changes its mind"


def test_predictions_are_stored_with_the_checkpoint_that_is_behind_them(make_objective, study_file, tmp_path):
    file = replace(study_file, n_epochs=4, predictions_after=(1, 4))
    trained, whole = make_objective(file), make_objective(file, uid="whole", artifacts=tmp_path / "whole")
    train(trained, until=2)
    trained.save_checkpoint(0)
    first = tmp_path / "artifacts/study/0/predictions_after_1.png"
    assert first.exists()
    first.unlink()
    again = make_objective(file)
    train(again)
    again.finish(0)
    assert not first.exists(), "its epoch was trained before the checkpoint"
    train(whole)
    whole.finish(0)
    last = "study/0/predictions_after_4.png"
    assert (tmp_path / "artifacts" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_of_folds_in_sequence_the_first_ones_own_epochs_are_shown(study_file, tmp_path):
    shown = {}
    for n_folds, pruner in ((2, "wilcoxon"), (2, "none")):
        file = replace(study_file, n_epochs=4, n_folds=n_folds, predictions_after=(4,), pruner=pruner)
        dataset = load_dataset(file.dataset, image_size=32, n_folds=n_folds)
        store = Artifacts(str(tmp_path / pruner), "study")
        trained = Objective(file, dataset, device=CPU, precision="fp32", artifacts=store, study_uid="u")
        train(trained, params=PARAMS | {"learning_rate": 3e-2})
        shown[pruner] = dict(trained.trial(0).pictures)
        first = trained.trial(0).members[0]
        assert first.best_epoch < 4, "the test needs a fold whose best epoch is not its last one"
    assert list(shown["none"]) == [4]
    assert shown["wilcoxon"] == shown["none"], "the fourth epoch, and not the best one"


def test_of_a_recalibrated_network_the_prediction_is_that_which_is_scored(make_objective, study_file, tmp_path):
    trained = make_objective(replace(study_file, n_epochs=1, predictions_after=(1,)))
    train(trained, params=PARAMS | {"X": 300.0, "recalibrate": True})
    trained.finish(0)
    folder = tmp_path / "artifacts/study/0"
    assert (folder / "predictions_after_1.png").read_bytes() == (folder / "predictions.png").read_bytes()


def test_a_look_at_a_prediction_changes_nothing_of_a_recalibrated_training(make_objective, study_file):
    curves = []
    for predictions_after in ((), (1, 2)):
        trained = make_objective(replace(study_file, n_epochs=4, predictions_after=predictions_after))
        train(trained, params=PARAMS | {"X": 300.0, "recalibrate": True})
        curves.append({name: column for name, column in trained.trial(0).curve.items() if name != "seconds"})
    assert curves[0] == curves[1]


def test_the_feedback_unet_shows_what_its_first_layer_makes_of_the_second_round(make_objective, study_file, tmp_path):
    params = {"image_size": 32, "base_channels": 4, "depth": 2, "batch_size": 4}
    file = replace(
        study_file,
        network="feedback_unet",
        loss="feedback_cross_entropy",
        space=parse_space(params, where="s"),
        n_epochs=1,
    )
    trained = make_objective(file)
    train(trained, params=params)
    network = trained.trial(0).members[0].network
    trained.finish(0)
    with np.load(tmp_path / "artifacts/study/0/inspected.npz", allow_pickle=False) as stored:
        cases, sums = stored["cases"].tolist(), stored["second_round_sums"]
    assert (cases, sums.shape) == (["case10", "case11"], (2, 32, 32))
    images = trained.trial(0).members[0].data.test.images
    first_layer, calls = network.encoder[0][0], []
    with first_layer.register_forward_hook(lambda *each: calls.append(each[-1])), torch.no_grad():
        network.eval()(images)
    assert len(calls) == 2, "a round each"
    np.testing.assert_allclose(sums, calls[1].sum(dim=1).numpy(), rtol=1e-6)
    assert not np.allclose(sums, calls[0].sum(dim=1).numpy())
