"""Cross-validation: a trial is scored as the mean over folds that train side by side, or one after another."""

import json
import re
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from frem_search.data.cases import Case
from frem_search.data.dataset import load_dataset
from frem_search.data.folds import Split, cyclic_folds
from frem_search.data.nnunet import write_folder
from frem_search.errors import DatasetError, UsageError
from frem_search.segmentation.inference import predict
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.weights import load_weights
from frem_search.storage.artifacts import Artifacts
from frem_search.study.file import load_study_file
from frem_search.study.space import resolve
from frem_search.training.objective import Objective
from frem_search.training.recipe import load_images
from frem_search.training.side_by_side.layouts import LAYOUTS
from frem_search.training.trial import MOST_IMAGE_SCORES, Folds, grouped

CPU = torch.device("cpu")
DRAWN = {"B": 3, "X": 20.0}
N_FOLDS = 3
LAYOUTS_HERE = [name for name, layout in LAYOUTS.items() if "cpu" in layout.devices]


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def study_file(tiny_study):
    return replace(load_study_file(str(tiny_study)), n_folds=N_FOLDS)


@pytest.fixture
def in_sequence(study_file):
    return replace(study_file, pruner="wilcoxon", pruner_settings={"n_startup_images": 2})


@pytest.fixture
def make_objective(tmp_path):
    def make(file, *, dataset=None, artifacts=tmp_path / "artifacts", **settings):
        store = Artifacts(str(artifacts), "study")
        return Objective(
            file, dataset or load_images(file), device=CPU, precision="fp32", artifacts=store, study_uid="u", **settings
        )

    return make


def train(trained, file, *, number=0, until=None):
    """Return the reports of a trial."""
    trained.admit(number, resolve(file.space, DRAWN))
    reports = []
    for report in trained.epochs():
        reports.append(report)
        if report.epoch == until:
            break
    return reports


def one_fold(make_objective, file, fold, tmp_path):
    """Return a fold's result and curve when it is trained as the only one of a study without folds."""
    without_folds = replace(file, n_folds=None, fold=fold, pruner="none")
    alone = make_objective(without_folds, dataset=load_images(file), artifacts=tmp_path / f"alone{fold}")
    train(alone, file)
    return alone.finish(0), alone.trial(0).curve


@pytest.mark.parametrize(
    ("n", "n_test", "n_val", "n_folds"), [(50, 10, 5, 8), (50, 10, 5, 5), (7, 2, 1, 3), (3, 1, 1, 3)]
)
def test_cyclic_folds_have_the_sizes_asked_for_and_overlap_evenly(n, n_test, n_val, n_folds):
    cases = [f"case{i:02d}" for i in range(n)]
    folds = cyclic_folds(cases, n_folds=n_folds, n_test=n_test, n_val=n_val, seed=0)
    assert len(folds) == n_folds
    for fold in folds:
        assert [len(part) for part in (fold.train, fold.val, fold.test)] == [n - n_test - n_val, n_val, n_test]
        assert sorted(fold.train + fold.val + fold.test) == cases
    tested = [sum(case in fold.test for fold in folds) for case in cases]
    assert max(tested) - min(tested) <= 1
    assert sum(tested) == n_folds * n_test


@pytest.mark.parametrize("asked", [{"n_folds": 1}, {"n_folds": 9}, {"n_test": 6}])
def test_folds_that_cannot_be_are_refused(asked):
    with pytest.raises(DatasetError, match="Choose fewer folds"):
        cyclic_folds(list("abcdefgh"), **{"n_folds": 2, "n_test": 2, "n_val": 2, "seed": 0} | asked)


def test_a_dataset_keeps_its_own_folds_if_it_has_as_many(tiny_dataset):
    own = load_dataset(str(tiny_dataset), image_size=32)
    assert load_dataset(str(tiny_dataset), image_size=32, n_folds=len(own.splits)).splits == own.splits


def test_of_a_dataset_with_more_folds_the_first_are_taken(tmp_path):
    cases = [Case(f"case{i}", np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)) for i in range(6)]
    pairs = [(f"case{i}", f"case{i + 1}") for i in (0, 2, 4)]  # kept together, as tiles of a section are
    own = [Split(train, val, test) for train, val, test in (pairs, pairs[1:] + pairs[:1], pairs[2:] + pairs[:2])]
    write_folder(tmp_path, cases, class_names=("ground", "cell"), splits=own)
    assert load_dataset(str(tmp_path), n_folds=2).splits == tuple(own[:2])


def test_the_mouse_folds_are_those_of_feedback_u_net():
    dataset = load_dataset("mouse_synthetic", image_size=16, n_folds=8)
    assert [(len(f.train), len(f.val), len(f.test)) for f in dataset.splits] == [(35, 5, 10)] * 8
    assert {case for fold in dataset.splits for case in fold.test} == set(dataset.cases)


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_side_by_side_each_fold_is_trained_as_if_it_were_the_only_one(make_objective, study_file, tmp_path, layout):
    trained = make_objective(study_file, layout=layout)
    reports = train(trained, study_file)
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert [report.is_done for report in reports] == [False, False, True]
    alone = [one_fold(make_objective, study_file, fold, tmp_path) for fold in range(N_FOLDS)]
    tolerance = 2e-3 if layout == "stacked" else 0
    outcome = trained.finish(0)
    for own, (result, curve), member in zip(outcome.result["folds"], alone, trained.trial(0).members, strict=True):
        assert member.curve["train_loss"] == pytest.approx(curve["train_loss"], abs=tolerance, rel=0)
        if layout != "stacked":
            assert own == result.result
    if layout != "stacked":
        assert outcome.score == pytest.approx(statistics.mean(result.score for result, _ in alone))
    assert len({curve["train_loss"][0] for _, curve in alone}) == N_FOLDS, "equal folds would prove nothing"


def test_the_curve_is_the_mean_over_folds(make_objective, study_file):
    trained = make_objective(study_file)
    reports = train(trained, study_file)
    trial = trained.trial(0)
    for name in ("train_loss", "score", "best_score"):
        means = [statistics.mean(values) for values in zip(*(m.curve[name] for m in trial.members), strict=True)]
        assert trial.curve[name] == pytest.approx(means)
    assert [report.best_score for report in reports] == trial.curve["best_score"]
    assert trial.best_score == pytest.approx(trial.curve["best_score"][-1])


def test_each_fold_leaves_weights_and_predictions(make_objective, study_file, tmp_path):
    trained = make_objective(study_file)
    train(trained, study_file)
    result = trained.finish(0).result
    for part in ("val", "test"):
        folds = [fold[part]["mean_iou"] for fold in result["folds"]]
        assert result[part]["mean_iou"] == pytest.approx(statistics.mean(folds))
    for fold in range(N_FOLDS):
        folder = tmp_path / f"artifacts/study/0/fold{fold}"
        kept = load_weights((folder / "weights.pt").read_bytes(), where="here")
        assert (kept.fold, kept.n_folds) == (fold, N_FOLDS)
        assert (folder / "predictions.npz").exists()
    trained.discard(0, weights=True)
    assert not list((tmp_path / "artifacts/study/0").glob("*/weights.pt"))


def test_an_extra_score_without_its_package_is_null_in_every_fold(make_objective, study_file, monkeypatch):
    def load():
        message = "no package"
        raise UsageError(message)

    monkeypatch.setitem(METRICS, "seg", METRICS["seg"]._replace(load=load))
    file = replace(study_file, extra_scores=("seg",))
    trained = make_objective(file)
    train(trained, file)
    result = trained.finish(0).result
    assert [each["extra"] for each in (result, *result["folds"])] == [{"seg": {"val": None, "test": None}}] * 4


@pytest.mark.parametrize("until", [1, 2])
def test_a_checkpoint_takes_all_folds_on(make_objective, study_file, tmp_path, until):
    straight = make_objective(study_file, artifacts=tmp_path / "straight")
    train(straight, study_file)
    first = make_objective(study_file)
    train(first, study_file, until=until)
    first.save_checkpoint(0)
    second = make_objective(study_file)
    reports = train(second, study_file)
    assert [report.epoch for report in reports] == list(range(until + 1, 4))
    assert second.finish(0) == straight.finish(0)


def test_a_fold_whose_network_raises_ends_the_trial(make_objective, study_file):
    trained = make_objective(study_file)
    trial = trained.admit(0, resolve(study_file.space, DRAWN))
    trial.members[1].network.head.forward = lambda _: 1 / 0
    report = next(report for report in trained.epochs() if report.error is not None)
    assert (report.key, type(report.error)) == (0, ZeroDivisionError)
    trained.release(0)
    assert list(trained.epochs()) == []


def test_folds_that_end_early_count_with_their_best(make_objective, study_file):
    trained = make_objective(study_file)
    trial = trained.admit(0, resolve(study_file.space, DRAWN))
    trial.members[0].n_epochs = 1
    reports = list(trained.epochs())
    assert [(report.epoch, report.is_done) for report in reports] == [(1, False), (2, False), (3, True)]
    bests = [member.curve["best_score"][-1] for member in trial.members]
    assert reports[-1].best_score == pytest.approx(statistics.mean(bests))


def test_in_sequence_a_fold_begins_when_the_one_before_is_done(make_objective, in_sequence, study_file, tmp_path):
    trained = make_objective(in_sequence)
    trained.admit(0, resolve(in_sequence.space, DRAWN))
    seen = [
        (report.epoch, [member.epoch for member in trained.trial(0).members], report.is_done)
        for report in trained.epochs()
    ]
    assert seen == [
        (1, [1, 0, 0], False), (2, [2, 0, 0], False), (3, [3, 0, 0], False),
        (4, [3, 1, 0], False), (5, [3, 2, 0], False), (6, [3, 3, 0], False),
        (7, [3, 3, 1], False), (8, [3, 3, 2], False), (9, [3, 3, 3], True),
    ]  # fmt: skip
    side_by_side = make_objective(study_file, artifacts=tmp_path / "other")
    train(side_by_side, study_file)
    assert trained.finish(0) == side_by_side.finish(0)
    assert trained.trial(0).curve["epoch"] == list(range(1, 10))


def test_in_sequence_the_images_are_scored_one_by_one(make_objective, in_sequence):
    trained = make_objective(in_sequence)
    train(trained, in_sequence)
    trial = trained.trial(0)
    expected = []
    for member in trial.members:
        member.network.load_state_dict(member.best_weights)
        pred = predict(member.network, member.data.val.images, precision="fp32")
        expected += [
            METRICS["mean_iou"].function(p[None], label[None], n_classes=3).value.item()
            for p, label in zip(pred, member.data.val.labels, strict=True)
        ]
    assert trial.image_scores == pytest.approx(expected)


def test_in_sequence_a_checkpoint_takes_the_images_scores_along(make_objective, in_sequence, tmp_path):
    straight = make_objective(in_sequence, artifacts=tmp_path / "straight")
    train(straight, in_sequence)
    first = make_objective(in_sequence)
    train(first, in_sequence, until=5)
    first.save_checkpoint(0)
    second = make_objective(in_sequence)
    reports = train(second, in_sequence)
    assert [report.epoch for report in reports] == [6, 7, 8, 9]
    assert second.trial(0).image_scores == straight.trial(0).image_scores
    assert second.finish(0) == straight.finish(0)


def test_no_trial_reports_more_images_than_a_study_can_bear():
    scores = [i / 1000 for i in range(320)]
    means = grouped(scores, most=MOST_IMAGE_SCORES)
    assert len(means) == MOST_IMAGE_SCORES
    assert statistics.mean(means) == pytest.approx(statistics.mean(scores), rel=0.01)
    assert grouped([0.5], most=50) == [0.5]


def test_an_untrained_trial_has_no_score(make_objective, study_file):
    trained = make_objective(study_file)
    members = trained.admit(0, resolve(study_file.space, DRAWN)).members
    assert Folds(0, members).best_score == float("-inf")


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
@pytest.mark.parametrize("diverging", [0, 2])
def test_a_fold_whose_loss_is_no_number_ends_the_trial_and_leaves_a_curve(
    make_objective, study_file, layout, diverging
):
    trained = make_objective(study_file, layout=layout)
    trial = trained.admit(0, resolve(study_file.space, DRAWN))
    with torch.no_grad():
        trial.members[diverging].network.head.bias.fill_(torch.nan)
    report = next(report for report in trained.epochs() if not report.is_finite)
    assert (report.key, report.error, report.is_done) == (0, None, False)
    assert len(trial.curve["epoch"]) == trial.epoch == 1
    assert trained.provenance(0)["seconds"] > 0
    trained.release(0)


def test_in_sequence_a_loss_that_is_no_number_in_the_last_epoch_is_told(make_objective, in_sequence):
    file = replace(in_sequence, n_epochs=1)
    trained = make_objective(file)
    trial = trained.admit(0, resolve(file.space, DRAWN))
    with torch.no_grad():
        trial.members[0].network.head.bias.fill_(torch.nan)
    report = next(report for report in trained.epochs() if not report.is_finite)
    assert (report.key, report.epoch, report.error) == (0, 1, None)
    assert trial.image_scores == []


def test_in_sequence_what_a_metric_raises_on_one_image_ends_the_trial_alone(make_objective, in_sequence, monkeypatch):
    whole = METRICS["mean_iou"]

    def fails_on_one(pred, target, *, n_classes):
        return whole.function(pred, target, n_classes=n_classes) if len(pred) > 1 else 1 / 0

    monkeypatch.setitem(METRICS, "mean_iou", whole._replace(function=fails_on_one))
    trained = make_objective(in_sequence)
    for number in (0, 1):
        trained.admit(number, resolve(in_sequence.space, DRAWN))
    errors = []
    for report in trained.epochs():
        if report.error is not None:
            errors.append((report.key, type(report.error)))
            trained.release(report.key)
    assert errors == [(0, ZeroDivisionError), (1, ZeroDivisionError)]


def test_in_sequence_the_orientations_of_an_image_are_one_image(make_objective, in_sequence):
    trained = make_objective(in_sequence)
    trial = trained.admit(0, resolve(in_sequence.space, DRAWN) | {"eightfold": True, "augmentation": False})
    list(trained.epochs())
    assert len(trial.image_scores) == sum(len(member.data.val) // 8 for member in trial.members)
    member = trial.members[0]
    pred = predict(member.network, member.data.val.images, precision="fp32")
    each = [
        METRICS["mean_iou"].function(p[None], label[None], n_classes=3).value.item()
        for p, label in zip(pred, member.data.val.labels, strict=True)
    ]
    of_image = [case.rpartition("_")[0] for case in member.data.val.cases]
    means = [
        statistics.mean(score for score, of in zip(each, of_image, strict=True) if of == case)
        for case in dict.fromkeys(of_image)
    ]
    assert trial.image_scores[: len(means)] == pytest.approx(means)


def test_folds_share_one_copy_of_the_images(make_objective, study_file):
    trained = make_objective(study_file)
    trials = [trained.admit(number, resolve(study_file.space, DRAWN)) for number in (0, 1)]
    data = [member.data for trial in trials for member in trial.members]
    assert len({id(part.whole) for each in data for part in (each.train, each.val, each.test)}) == 1


def test_with_patience_a_trial_is_done_when_its_last_fold_is(make_objective, study_file):
    file = replace(study_file, n_epochs=30)
    trained = make_objective(file)
    trial = trained.admit(0, resolve(file.space, DRAWN) | {"patience": 2, "learning_rate": 1e-9})
    reports = list(trained.epochs())
    assert [report.is_done for report in reports] == [False] * (len(reports) - 1) + [True]
    assert reports[-1].epoch == max(member.epoch for member in trial.members) < 30


def test_for_want_of_memory_folds_train_in_turn(make_objective, study_file):
    trained = make_objective(study_file, layout="stacked")
    assert trained.train_in_turn()
    assert not trained.train_in_turn()
    assert train(trained, study_file)[-1].is_done
    assert trained.provenance(0)["layout"] == "in_turn"
    without_folds = make_objective(replace(study_file, n_folds=None), layout="stacked")
    assert not without_folds.train_in_turn()
    train(without_folds, study_file)
    assert without_folds.provenance(0)["layout"] == "stacked"


def test_more_folds_than_a_dataset_has_of_its_own_are_refused(tmp_path, tiny_dataset):
    folder = shutil.copytree(tiny_dataset, tmp_path / "folded")
    file = folder / "splits_final.json"
    (own,) = json.loads(file.read_text())
    swapped = {"train": own["train"][2:] + own["val"], "val": own["train"][:2], "test": own["test"]}
    file.write_text(json.dumps([own, swapped]))
    assert len(load_dataset(str(folder), image_size=16, n_folds=2).splits) == 2
    with pytest.raises(DatasetError, match="expected at most 2 folds, those of the dataset, but got 3"):
        load_dataset(str(folder), image_size=16, n_folds=3)


def test_images_for_testing_only_test_in_every_fold(tmp_path, tiny_dataset):
    folder = shutil.copytree(tiny_dataset, tmp_path / "held")
    for part, ending in (("images", "_0000.png"), ("labels", ".png")):
        (folder / f"{part}Ts").mkdir()
        shutil.copy(folder / f"{part}Tr/case00{ending}", folder / f"{part}Ts/held{ending}")
    for fold in load_dataset(str(folder), image_size=16, n_folds=3).splits:
        assert "held" in fold.test
        assert len(fold.test) == 3


def test_a_search_with_folds_from_the_command(run_cli, tiny_study):
    text = tiny_study.read_text()
    tiny_study.write_text(text + "\n[folds]\nn = 2\n")
    run_cli("run", "--study", str(tiny_study))
    trials = json.loads(run_cli("trials", "--study", str(tiny_study), "--format", "json").stdout)
    for trial in trials:
        folds = trial["user_attrs"]["result"]["folds"]
        assert trial["value"] == pytest.approx(statistics.mean(fold["val"]["mean_iou"] for fold in folds))
    best = max(trials, key=lambda trial: trial["value"])
    for fold in (0, 1):
        told = json.loads(
            run_cli("evaluate", "--study", str(tiny_study), "--fold", str(fold), "--part", "val", "--json").stdout
        )
        own = best["user_attrs"]["result"]["folds"][fold]["val"]["mean_iou"]
        assert (told["fold"], told["value"]) == (fold, pytest.approx(own))
    assert "same in every bit" in run_cli("rerun", "--study", str(tiny_study), "--trial", "0").stdout


def test_wilcoxon_spares_folds_of_trials_that_are_worse_image_by_image(run_cli, tiny_study):
    table = re.sub(r"(?m)^(B|X|n_epochs|n_trials) = .*\n", "", tiny_study.read_text())
    table = table.replace("[budget]\n", "[budget]\nn_trials = 2\nn_epochs = 12\n")
    table = table.replace("[params]\n", "[params]\nlearning_rate = [2e-2, 1e-9]\n")
    folds = '\n[sampler]\nname = "grid"\n\n[folds]\nn = 6\n\n[pruner]\nname = "wilcoxon"\nn_startup_images = 5\n'
    tiny_study.write_text(table + folds)
    run_cli("run", "--study", str(tiny_study))
    good, bad = json.loads(run_cli("trials", "--study", str(tiny_study), "--format", "json").stdout)
    assert (good["state"], bad["state"]) == ("complete", "pruned")
    assert bad["user_attrs"]["provenance"]["images"] < good["user_attrs"]["provenance"]["images"]
    assert "below what the pruner asks for" in bad["user_attrs"]["reason"]
