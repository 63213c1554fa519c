"""The papers' studies: what their files say, and trainings on their images and on images that are not as usual."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import optuna
import pytest
import torch
from places import REAL_DATA

from frem_search.data.cases import Case
from frem_search.data.catalogue import prepare
from frem_search.data.folds import Split
from frem_search.data.nnunet import write_folder
from frem_search.segmentation.inference import predict
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.networks import build_network
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import list_study_files, load_study_file
from frem_search.study.samplers import distributions, make_sampler
from frem_search.study.space import Choice, corners, resolve, searched
from frem_search.training.objective import Objective
from frem_search.training.recipe import load_images, split_params
from frem_search.training.schedule import factor_at
from frem_search.training.single import settle

CPU = torch.device("cpu")
# Read here, since a test has no FREM_SEARCH_ variable of the environment.
# Study, archive, parameters, epochs, and what is asked above what needs no training: half of the least of three seeds.
TRAININGS = {
    "drosophila": ("drosophila_feedback_lstm", "groundtruth-drosophila-vnc", {"image_size": 32, "depth": 3}, 4, 0.07),
    "isbi2012": ("isbi_gating_mask", "ISBI-2012-challenge", {"image_size": 128, "crop_size": 64}, 16, 0.2),
    "h1299": ("h1299_curriculum", "h1299", {"image_size": (256, 320), "crop_size": 64}, 8, 0.23),
}


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def begin(study_file, tmp_path):
    """Return the objective of a study whose parameters are fixed, and its first trial's only member."""
    store = Artifacts(str(tmp_path / "artifacts"), "study")
    objective = Objective(
        study_file, load_images(study_file), device=CPU, precision="fp32", artifacts=store, study_uid="u"
    )
    return objective, objective.admit(0, resolve(study_file.space, {})).members[0]


def shipped(study, *, dataset, n_epochs, **params):
    """Return a shipped quick study of one fold with other settings."""
    quick = load_study_file(study, quick=True, dataset=str(dataset), n_epochs=n_epochs)
    return settle(replace(quick, n_folds=None), params)


def without_training(member, metric):
    """Return the best score of the untrained network and of each class everywhere."""
    part, k = member.data.val, member.data.n_classes
    untrained = predict(member.network, part.images, precision="fp32", takes=metric.takes)
    one_class = [torch.full_like(part.labels, label) for label in range(k)]
    if metric.takes == "probabilities":
        one_class = [torch.nn.functional.one_hot(each.long(), k).movedim(-1, 1).float() for each in one_class]
    return max(metric.function(pred, part.labels, n_classes=k).value.item() for pred in (untrained, *one_class))


@pytest.mark.parametrize("dataset", TRAININGS)
def test_a_short_training_on_real_images_learns(dataset, tmp_path):
    study, archive, params, n_epochs, gain = TRAININGS[dataset]
    if not (REAL_DATA / archive).is_dir():
        pytest.skip(f"no {archive} in {REAL_DATA}; set FREM_SEARCH_TEST_DATA")
    prepare(dataset, REAL_DATA / archive)
    file = shipped(study, dataset=dataset, n_epochs=n_epochs, **params)
    objective, member = begin(file, tmp_path)
    before = without_training(member, METRICS[file.score])
    reports = list(objective.epochs())
    assert len(reports) == n_epochs
    assert all(report.is_finite for report in reports)
    assert objective.finish(0).score > before + gain


def usual(i, n_classes):
    """Return grey values of 16 bit, and labels: two cells away from the border, and their edges as a third class."""
    rng = np.random.default_rng(i)
    label = np.zeros((32, 32), dtype=np.uint8)
    for row, column in ((4 + i % 3, 5), (18, 14 + i % 4)):
        label[row : row + 9, column : column + 9] = n_classes - 1
        label[row + 1 : row + 8, column + 1 : column + 8] = 1
    return rng.poisson(100 + 300 * (label == 1)).astype(np.uint16), label


def without_last_class(label):
    return np.where(label == label.max(), 0, label)


def with_bright_pixel(image):
    changed = image.copy()
    changed[30, 1] = 65535
    return changed


def rolled(array):
    """Move both cells, so that they touch the border."""
    return np.roll(array, (-6, -7), axis=(0, 1))


# What becomes of image and labels of case i: cases 0 to 5 train, 6 and 7 validate, 8 and 9 test.
UNUSUAL = {
    "a class is nowhere": lambda i, image, label: (image, without_last_class(label)),
    "no image has a cell": lambda i, image, label: (image, 0 * label),
    "some images have no cell": lambda i, image, label: (image, label * (i % 2)),
    "an image is one cell": lambda i, image, label: (image, 0 * label + 1 if i in (0, 6) else label),
    "cells touch the border": lambda i, image, label: (rolled(image), rolled(label)),
    "one pixel is very bright": lambda i, image, label: (with_bright_pixel(image), label),
    "a class is not in training": lambda i, image, label: (image, without_last_class(label) if i < 6 else label),
    "a class is not in validation": lambda i, image, label: (image, without_last_class(label) if 6 <= i < 8 else label),
}
SMALL = {"base_channels": 2, "batch_size": 3}
STUDIES = {
    "drosophila_feedback_lstm": (3, {"depth": 2, "image_size": 32}),
    "drosophila_unet_narrow": (3, {"depth": 2, "image_size": 32}),
    "isbi_gating_mask": (2, {"depth": 3, "image_size": 32, "crop_size": 24}),
    "h1299_curriculum": (3, {"crop_size": 24, "elastic_from": 0.0}),
    "h1299_tiles": (3, {"crop_size": 16, "elastic_from": 0.0}),
}


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("kind", UNUSUAL)
def test_images_that_are_not_as_usual_are_trained_on_and_scored(study, kind, tmp_path):
    n_classes, params = STUDIES[study]
    folder = tmp_path / "unusual"
    folder.mkdir()
    pairs = [UNUSUAL[kind](i, *usual(i, n_classes)) for i in range(10)]
    cases = [Case(f"case{i}", image, label.astype(np.uint8)) for i, (image, label) in enumerate(pairs)]
    names = [case.name for case in cases]
    split = Split(tuple(names[:6]), tuple(names[6:8]), tuple(names[8:]))
    write_folder(folder, cases, class_names=("ground", "cell", "edge")[:n_classes], splits=[split])

    objective, member = begin(shipped(study, dataset=folder, n_epochs=2, **SMALL, **params), tmp_path)
    initial = [value.clone() for value in member.network.parameters()]
    reports = list(objective.epochs())
    assert [(report.error, report.is_finite, 0 <= report.score <= 1) for report in reports] == [(None, True, True)] * 2
    assert all(value.isfinite().all() for value in member.network.state_dict().values())
    assert any((value != before).any() for value, before in zip(member.network.parameters(), initial, strict=True))
    result = objective.finish(0).result
    for part in ("val", "test"):
        told = [value for name, value in result[part].items() if name != "per_class"]
        told += [value for value in result[part]["per_class"].values() if value is not None]
        told += [each[part] for each in result.get("extra", {}).values()]
        assert told
        assert all(0 <= value <= 1 for value in told), result


@pytest.mark.parametrize("epoch", [1, 20, 21, 100, 101, 150, 151, 200, 201, 250, 251, 400])
def test_h1299_has_the_learning_rates_of_its_table(epoch):
    table = {20: 1e-3, 100: 5e-4, 150: 1e-4, 200: 5e-5, 250: 1e-5, 400: 5e-6}
    expected = next(rate for last, rate in table.items() if epoch <= last)
    studies = [load_study_file(path.stem) for path in list_study_files() if path.stem.startswith("h1299_")]
    assert len(studies) == 6
    for file in studies:
        training = split_params(file, next(corners(file.space))).training
        assert training.learning_rate * factor_at(training.schedule, epoch) == pytest.approx(expected)
        assert file.n_epochs == 400


def test_isbi_studies_train_the_authors_network_and_one_that_of_the_text():
    counts = {}
    for path in list_study_files():
        if not path.stem.startswith("isbi_"):
            continue
        file = load_study_file(path.stem)
        split = split_params(file, next(corners(file.space)))
        assert (split.training.alpha, split.training.elastic_share, split.training.fixed_alpha) == (300.0, 0.5, True)
        assert (file.score, file.extra_scores) == ("v_rand", ("v_info", "v_rand_multicut", "v_info_multicut"))
        network = build_network("clmser", in_channels=1, n_classes=2, seed=0, params=split.network, device="meta")
        counts[path.stem] = sum(each.numel() for each in network.parameters())
    assert counts == {
        "isbi_clmser": 8_293_704,
        "isbi_channel_gating": 8_306_178,
        "isbi_pixel_gating": 8_306_205,
        "isbi_full_pixel_gating": 8_306_223,
        **dict.fromkeys(("isbi_gating_mask", "isbi_gating", "isbi_gamma"), 8_308_941),
        "isbi_mirrored": 8_334_243,
    }


def test_h1299_waits_until_a_step_of_its_schedule_can_have_shown():
    for file in (load_study_file(path.stem) for path in list_study_files() if path.stem.startswith("h1299_")):
        training = split_params(file, next(corners(file.space))).training
        steps = [1, *(epoch for epoch, _ in training.schedule)]
        longest = max(later - step for step, later in pairwise(steps))
        # Of a training that got better since one step, the next one and 20 epochs of it are trained.
        assert training.patience >= longest + 20
        assert training.patience < file.n_epochs - steps[-1]  # and within the last one it may end


def test_h1299_tells_the_iou_of_cells_by_the_frame_too():
    for file in (load_study_file(path.stem) for path in list_study_files() if path.stem.startswith("h1299_")):
        assert (file.score, file.extra_scores) == ("cell_iou", ("cell_iou_per_frame", "seg"))


@pytest.mark.parametrize("quick", [False, True])
def test_a_study_of_a_tables_rows_tries_each_row_once(quick):
    files = [load_study_file(path.stem, quick=quick) for path in list_study_files()]
    of_rows = [file for file in files if file.sampler.name == "grid"]
    names = {"drosophila_feedback_lstm_at", "mouse_feedback_lstm_at", "isbi_gating", "h1299_batch_size"}
    assert {file.path.stem for file in of_rows} == names
    for file in of_rows:
        (name,) = searched(file.space)
        rows = file.space[name]
        assert isinstance(rows, Choice)
        space = distributions(file.space)
        sampler = make_sampler("grid", space=space, seed=file.sampler.seed, n_startup_trials=10)
        study = optuna.create_study(sampler=sampler)
        drawn = [study.ask(space).params[name] for _ in range(file.n_trials)]
        assert sorted(map(str, drawn)) == sorted(map(str, rows.choices))
