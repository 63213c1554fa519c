import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch

from frem_search.data.dataset import load_dataset
from frem_search.data.images import write_image
from frem_search.data.pages import read_pages
from frem_search.errors import (
    ArtifactError,
    ContractError,
    DatasetError,
    DeviceMemoryError,
    FremSearchError,
    UsageError,
)
from frem_search.search.rerun import repeat_lines, rerun
from frem_search.search.stored_trial import find_trial, stored_study_file, stored_weights, trial_params
from frem_search.segmentation.evaluate import evaluate
from frem_search.segmentation.predict import overlay, predict_files, predict_image
from frem_search.segmentation.weights import FORMAT, dump_weights, load_weights, read_weights
from frem_search.study.file import load_study_file
from frem_search.training.single import check_target, parse_settings, save_weights, settle, train

SETTINGS = {"B": 4, "X": 100.0}
SMALL_STUDY = """
dataset = "{dataset}"
network = "unet"
precision = "fp32"
budget = {{ n_trials = 2, n_epochs = 8 }}
[params]
image_size = 32
base_channels = 4
depth = 2
batch_size = 2
learning_rate = 1e-2
B = {{ low = 0, high = 16 }}
X = {{ low = 1, high = 1000, log = true }}
"""
CPU = torch.device("cpu")


def settled(study, **settings):
    return settle(load_study_file(str(study)), SETTINGS | settings)


def trained(study, **settings):
    study_file = settled(study, **settings)
    size = study_file.space["image_size"].value if "image_size" in study_file.space else None
    return train(study_file, load_dataset(study_file.dataset, image_size=size), device="cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_dataset):
    """The path of a small study whose networks learn more than the most frequent class."""
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(SMALL_STUDY.format(dataset=tiny_dataset))
    return path


@pytest.fixture(scope="module")
def weights(study):
    return load_weights(trained(study).weights[""], where="here")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return str(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def record(postgres, _template, study, artifacts):
    """A search of two trials, in this process and a real database."""
    from frem_search.search.begin import open_worker
    from frem_search.storage.database import open_storage
    from frem_search.study.record import read_record

    with open_storage(postgres.url(postgres.create(template=_template))) as storage:
        study_file = load_study_file(str(study))
        with open_worker(study_file, storage, device="cpu", artifacts=artifacts) as (_, worker, _):
            list(worker.work())
        return read_record(storage, "small", has_curves=False)


def assert_equal(weights, others):
    for field in dataclasses.fields(weights):
        if field.name != "state":
            assert getattr(weights, field.name) == getattr(others, field.name)
    assert weights.state.keys() == others.state.keys()
    assert all(torch.equal(value, others.state[name]) for name, value in weights.state.items())


def random_image(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def test_a_device_without_memory_is_told_with_the_remedy(study, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("frem_search.training.cohort.score_images", fail)
    with pytest.raises(DeviceMemoryError) as raised:
        trained(study)
    assert str(raised.value) == f"cpu: out of memory: OutOfMemoryError. {DeviceMemoryError.remedy}"


@pytest.mark.parametrize("setting", ["B", "B=", "=8", "B=8 9", "B=[1", "B=1\nX=2", "B=1e", "B=a-b"])
def test_setting_of_another_form_is_named(setting):
    with pytest.raises(UsageError, match="--set: expected NAME=VALUE") as error:
        parse_settings([setting])
    assert repr(setting) in str(error.value)


def test_setting_twice_is_refused():
    with pytest.raises(UsageError, match="each name once"):
        parse_settings(["B=1", "B=2"])


def test_searched_parameters_without_a_value_are_named_with_their_range(tiny_study):
    with pytest.raises(UsageError, match=r"B \(0 to 16\), X \(1 to 1000\)\. Add --set"):
        settle(load_study_file(str(tiny_study)), {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("B", 17),
        ("B", 2.5),
        ("X", 0.0),
        ("X", float("nan")),
        ("Q", 1),
        ("depth", "deep"),
        ("batch_size", 0),
        ("lambda", 0.5),
    ],
)
def test_setting_that_nobody_takes_is_refused(tiny_study, name, value):
    with pytest.raises(UsageError, match=rf"^--set: .*{name}"):
        settled(tiny_study, **{name: value})


def test_settings_replace_what_the_study_fixes(tiny_study):
    params = load_weights(trained(tiny_study, base_channels=6, B=24).weights[""], where="here").params
    assert (params["base_channels"], params["B"], params["depth"]) == (6, 24, 2)


def test_training_twice_gives_the_same_bytes(tiny_study):
    assert trained(tiny_study).weights == trained(tiny_study).weights


def test_diverging_training_says_so_and_in_which_epoch(tiny_study):
    with pytest.raises(FremSearchError, match="epoch 1: the loss is no number"):
        trained(tiny_study, learning_rate=1e38)


def test_weights_come_back_as_they_were_written(weights):
    assert_equal(load_weights(dump_weights(weights), where="here"), weights)
    assert weights.trial is None
    assert weights.class_names == ("ground", "disc", "square")


class Stranger:
    """Pickled, it asks whoever loads it to make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", ["empty", "text", "torn", "list", "foreign", "other_format", "other_network", "shapes", "code"]
)
def test_file_that_is_no_whole_weights_file_is_named(weights, tmp_path, kind):
    whole = dump_weights(weights)
    fields = torch.load(io.BytesIO(whole), weights_only=True)
    content = {
        "empty": b"",
        "text": b"no weights\n",
        "torn": whole[: len(whole) // 2],
        "list": saved([1, 2]),
        "foreign": saved({"state_dict": {"weight": torch.zeros(2)}}),
        "other_format": saved(fields | {"format": 99}),
        "other_network": saved(fields | {"network": "unte"}),
        "shapes": saved(fields | {"in_channels": 3}),
        "code": saved({"format": FORMAT, "weights": Stranger(tmp_path / "made")}),
    }[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.pt: expected a weights file"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


def test_weights_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.pt: expected a weights file, but got: No such file"):
        read_weights(tmp_path / "none.pt")


def test_place_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "weights.pt"):
        with pytest.raises(ArtifactError, match=r"^--out .*cannot be written"):
            check_target(path)


def test_weights_that_cannot_be_written_leave_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"before")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(ArtifactError, match="No space left"):
        save_weights({"": b"after"}, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_kept_weights_score_what_the_trial_scored(record, tiny_dataset, artifacts):
    for trial in record.trials:
        kept = stored_weights(record, trial, artifacts=artifacts)
        for part in ("val", "test"):
            scored = evaluate(kept, dataset=str(tiny_dataset), part=part, device="cpu")
            stored = trial.user_attrs["result"][part]
            assert (scored.value, scored.per_class) == (stored["mean_iou"], stored["per_class"])
            assert scored.n_images == 2


def test_enhanced_evaluation_of_a_network_that_enhances_nothing_is_refused(study, tiny_dataset):
    kept = load_weights(trained(study, B=0).weights[""], where="here")
    with pytest.raises(UsageError, match="--enhanced: expected weights of a training with FREM, but unet was"):
        evaluate(kept, dataset=str(tiny_dataset), enhanced=True, device="cpu")


def test_predictions_are_those_that_the_trial_left(record, tiny_dataset, artifacts, tmp_path):
    folder = Path(artifacts) / f"small-{record.uid[:8]}" / "0"
    stored = np.load(folder / "predictions.npz")
    kept = stored_weights(record, record.trials[0], artifacts=artifacts)
    files = [tiny_dataset / "imagesTr" / f"{case}_0000.png" for case in stored["cases"]]
    assert len(np.unique(stored["pred"])) > 1
    written = list(predict_files(kept, files, out=tmp_path / "out", device="cpu"))
    for pred, path in zip(stored["pred"], written[::2], strict=True):
        assert np.array_equal(imagecodecs.png_decode(path.read_bytes()), pred)


def test_trial_trained_from_what_is_stored_has_the_trials_weights(record, tiny_dataset, artifacts):
    trial = find_trial(record, "best")
    kept = stored_weights(record, trial, artifacts=artifacts)
    again = settle(stored_study_file(record, trial, dataset=str(tiny_dataset)), trial_params(record, trial))
    content = train(again, load_dataset(str(tiny_dataset), image_size=32), device="cpu").weights[""]
    assert_equal(load_weights(content, where="here"), dataclasses.replace(kept, trial=None))


def test_weights_that_a_study_does_not_keep_name_the_remedy(record, tmp_path):
    with pytest.raises(ArtifactError, match="frem-search train --study small --trial 1 --out"):
        stored_weights(record, record.trials[1], artifacts=str(tmp_path))


def test_rerun_comes_to_the_same_score_in_every_bit(record, tiny_dataset):
    for trial in record.trials:
        repeat = rerun(record, trial, dataset=str(tiny_dataset), device="cpu")
        assert repeat.repeated == trial.value
        assert not repeat.differing
        assert not repeat.is_fault


def test_rerun_under_other_conditions_tells_them_and_is_no_fault(record, tiny_dataset):
    trial = record.trials[0]
    provenance = trial.user_attrs["provenance"]
    elsewhere = dataclasses.replace(
        trial,
        value=trial.value + 1e-3,
        user_attrs=trial.user_attrs | {"provenance": provenance | {"torch": "2.0", "host": "elsewhere"}},
    )
    repeat = rerun(record, elsewhere, dataset=str(tiny_dataset), device="cpu")
    assert not repeat.is_same
    assert not repeat.is_fault
    assert repeat.differing == {"torch": ("2.0", torch.__version__), "host": ("elsewhere", provenance["host"])}
    assert f"  torch: 2.0 then, {torch.__version__} now" in repeat_lines(repeat)


def test_trial_of_another_seed_than_its_studys_is_repeated_with_its_own(record, tiny_dataset):
    # As `study fork` leaves it: the trial was trained with seed 0, new ones of this study would be with seed 7.
    forked = dataclasses.replace(record, contract=record.contract | {"seed": 7})
    trial = record.trials[0]
    assert trial.user_attrs["provenance"]["seed"] == 0
    repeat = rerun(forked, trial, dataset=str(tiny_dataset), device="cpu")
    assert (repeat.repeated, dict(repeat.differing)) == (trial.value, {})
    older = dataclasses.replace(trial, user_attrs={})
    assert stored_study_file(forked, older, dataset=str(tiny_dataset)).sampler.seed == 7


def test_rerun_refuses_other_images_than_the_studys(record, tiny_dataset, tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree(tiny_dataset, other)
    write_image(other / "imagesTr" / "case00_0000.png", random_image(32, 32))
    with pytest.raises(ContractError, match="expected the images that small was trained on"):
        rerun(record, record.trials[0], dataset=str(other), device="cpu")


@pytest.mark.parametrize("state", ["running", "waiting", "pruned", "fail"])
def test_rerun_refuses_a_trial_that_did_not_end(record, tiny_dataset, state):
    unfinished = dataclasses.replace(record.trials[0], state=state)
    with pytest.raises(UsageError, match=f"trial 0 is {state}, but only a complete trial"):
        rerun(record, unfinished, dataset=str(tiny_dataset), device="cpu")


@pytest.mark.parametrize("which", ["2", "-1", "last", "00"])
def test_trial_that_is_not_there_is_refused(record, which):
    with pytest.raises(UsageError, match="which has trials 0 to 1"):
        find_trial(record, which)


def test_dataset_of_other_classes_or_channels_is_refused(weights, tiny_dataset):
    description = tiny_dataset / "dataset.json"
    before = description.read_text()
    try:
        description.write_text(before.replace('"disc"', '"ring"'))
        with pytest.raises(DatasetError, match=r"expected the classes ground, disc, square.* got ground, ring, square"):
            evaluate(weights, dataset=str(tiny_dataset), device="cpu")
    finally:
        description.write_text(before)
    with pytest.raises(DatasetError, match=r"expected images of 3 channel\(s\)"):
        evaluate(dataclasses.replace(weights, in_channels=3), dataset=str(tiny_dataset), device="cpu")


def test_dataset_of_the_trained_name_with_other_images_is_refused(weights, tiny_dataset, tmp_path):
    for name in ("tiny", "other"):
        shutil.copytree(tiny_dataset, tmp_path / name)
        write_image(tmp_path / name / "imagesTr" / "case00_0000.png", random_image(32, 32))
    with pytest.raises(ContractError, match=r"tiny: expected tiny as the network was trained on it .* with --dataset"):
        evaluate(weights, dataset=str(tmp_path / "tiny"), device="cpu")
    assert evaluate(weights, dataset=str(tmp_path / "other"), device="cpu").dataset == "other"


def test_part_or_fold_that_is_not_there_is_refused(weights, tiny_dataset):
    with pytest.raises(UsageError, match="--part: expected one of train, val, test, but got 'all'"):
        evaluate(weights, dataset=str(tiny_dataset), part="all")
    with pytest.raises(DatasetError, match="expected a fold from 0 to 0, but got 1"):
        evaluate(weights, dataset=str(tiny_dataset), fold=1)


def test_weights_whose_dataset_is_elsewhere_ask_for_its_folder(weights):
    with pytest.raises(DatasetError, match=r"trained on tiny: .* Give its folder with --dataset"):
        evaluate(weights)


@pytest.mark.parametrize("has_size", [True, False])
@pytest.mark.parametrize("shape", [(50, 70), (32, 32), (1, 9), (8, 7)])
def test_prediction_has_the_size_of_its_image(weights, tmp_path, shape, has_size):
    used = weights if has_size else dataclasses.replace(weights, image_size=None)
    write_image(tmp_path / "a.png", random_image(*shape))
    classes, shown = (
        imagecodecs.png_decode(p.read_bytes()) for p in predict_files(used, [tmp_path / "a.png"], out=tmp_path / "o")
    )
    assert (classes.shape, classes.dtype) == (shape, np.uint8)
    assert (shown.shape, shown.dtype) == ((*shape, 3), np.uint8)
    assert classes.max() < 3


def test_larger_copy_of_an_image_has_a_larger_copy_of_the_prediction(weights, tiny_dataset):
    image = load_dataset(str(tiny_dataset), image_size=32).images[10]
    network = weights.build(CPU)
    small = predict_image(network, image, weights=weights)
    large = predict_image(network, image.repeat(4, axis=1).repeat(4, axis=2), weights=weights)
    repeated = small.repeat(4, axis=0).repeat(4, axis=1)
    # Inside a class, where interpolation between equal neighbours decides nothing.
    neighbours = np.stack([np.roll(small, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    inside = (neighbours.min(axis=0) == neighbours.max(axis=0)).repeat(4, axis=0).repeat(4, axis=1)
    assert len(np.unique(small)) > 1
    assert inside.mean() > 0.2
    assert (large == repeated)[inside].mean() > 0.97
    assert not np.array_equal(large, repeated)


def test_16_bit_image_is_predicted_as_its_8_bit_copy(weights, tmp_path):
    image = random_image(40, 40)
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "b.tif", image.astype(np.uint16) * 257)
    written = list(predict_files(weights, [tmp_path / "a.png", tmp_path / "b.tif"], out=tmp_path / "out"))
    a, b = (imagecodecs.png_decode(path.read_bytes()) for path in written[::2])
    assert (a == b).mean() > 0.99


def test_every_page_is_an_image(weights, tmp_path):
    pages = [random_image(40, 40), random_image(40, 40).T.copy(), 90 + random_image(24, 50) // 4]
    with tifffile.TiffWriter(tmp_path / "stack.tif") as tiff:
        for page in pages:
            tiff.write(page, contiguous=False)
            write_image(tmp_path / f"single{len(list(tmp_path.glob('single*')))}.png", page)
    files = [tmp_path / "stack.tif", *sorted(tmp_path.glob("single*"))]
    names = [path.name for path in predict_files(weights, files, out=tmp_path / "out")]
    assert names[:6:2] == ["stack_000.png", "stack_001.png", "stack_002.png"]
    for i in range(3):
        stacked, single = (tmp_path / "out" / name for name in (f"stack_{i:03d}.png", f"single{i}.png"))
        assert stacked.read_bytes() == single.read_bytes()


def test_channels_of_a_tiff_are_one_image_and_its_frames_several(tmp_path):
    frames = random_image(5, 20, 30)
    tifffile.imwrite(tmp_path / "frames.tif", frames, imagej=True, metadata={"axes": "TYX"})
    tifffile.imwrite(tmp_path / "channels.tif", frames, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "both.tif", frames[:4].reshape(2, 2, 20, 30), imagej=True, metadata={"axes": "TCYX"})
    tifffile.imwrite(tmp_path / "colours.tif", random_image(2, 20, 30, 3), photometric="rgb")
    shapes = {path.stem: [page.shape for page in read_pages(path)] for path in tmp_path.glob("*.tif")}
    assert shapes["frames"] == [(1, 20, 30)] * 5
    assert shapes["channels"] == [(5, 20, 30)]
    assert shapes["both"] == [(2, 20, 30)] * 2
    assert shapes["colours"] == [(3, 20, 30)] * 2
    assert np.array_equal(np.concatenate(read_pages(tmp_path / "frames.tif")), frames)


@pytest.mark.parametrize("kind", ["broken", "missing", "colours", "nan"])
def test_image_that_cannot_be_predicted_is_named_before_any_is(weights, tmp_path, kind):
    write_image(tmp_path / "good.png", random_image(20, 20))
    bad = tmp_path / ("bad.tif" if kind == "nan" else "bad.png")
    if kind == "broken":
        bad.write_bytes((tmp_path / "good.png").read_bytes()[:100])
    elif kind == "colours":
        write_image(bad, random_image(20, 20, 3))
    elif kind == "nan":
        tifffile.imwrite(bad, np.full((2, 20, 20), np.nan, np.float32), photometric="minisblack")
    with pytest.raises(DatasetError, match=r"bad\.(png|tif): expected"):
        list(predict_files(weights, [tmp_path / "good.png", bad], out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_image_is_replaced_and_no_picture_written_twice(weights, tmp_path):
    image = random_image(20, 20)
    for name in ("a.png", "a.tif", "a_overlay.png"):
        write_image(tmp_path / name, image)
    with pytest.raises(UsageError, match=r"a\.png would be replaced by its own prediction"):
        list(predict_files(weights, [tmp_path / "a.png"], out=tmp_path))
    for second in ("a.tif", "a_overlay.png"):
        with pytest.raises(UsageError, match="would be written twice"):
            list(predict_files(weights, [tmp_path / "a.png", tmp_path / second], out=tmp_path / "out"))
    assert imagecodecs.png_decode((tmp_path / "a.png").read_bytes()).tolist() == image.tolist()


def test_overlay_colours_all_classes_but_the_ground():
    pred = np.arange(9, dtype=np.uint8).reshape(3, 3)
    shown = overlay(np.full((1, 3, 3), 7, np.uint16), pred)
    colours = [tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()]
    assert len(set(colours[0])) == 1
    assert all(len(set(colour)) > 1 for colour in colours[1:])
    assert len(set(colours[1:8])) == 7
    assert colours[8] == colours[1]


def test_train_evaluate_and_predict_need_no_database(run_cli, tiny_study, tiny_dataset, tmp_path):
    nowhere = {"FREM_SEARCH_STORAGE": "postgresql://nobody@127.0.0.1:1/none", "FREM_SEARCH_STUDY": str(tiny_study)}
    done = run_cli("train", "--set", "B=4", "--set", "X=100", "--out", "new/w.pt", "--json", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "tiny: epoch 3 of 3, loss" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["params"]["X"] == 100

    scored = run_cli("evaluate", "--weights", "new/w.pt", "--dataset", tiny_dataset, "--json", **nowhere)
    assert json.loads(scored.stdout)["value"] == answer["result"]["test"]["mean_iou"]
    enhanced = run_cli(
        "evaluate", "--weights", "new/w.pt", "--dataset", tiny_dataset, "--enhanced", "--json", **nowhere
    )
    assert json.loads(enhanced.stdout)["per_class"] == answer["result"]["phases"]["enhanced"]["test"]["per_class"]
    image = tiny_dataset / "imagesTr" / "case00_0000.png"
    predicted = run_cli("predict", "--weights", "new/w.pt", image, "--out", "out", **nowhere)
    assert predicted.stdout.split() == ["out/case00_0000.png", "out/case00_0000_overlay.png"]
    assert all((tmp_path / path).is_file() for path in predicted.stdout.split())

    both = run_cli("evaluate", "--weights", "new/w.pt", "--study", "other", **nowhere)
    assert both.returncode == 2
    assert "either --weights or --study" in both.stderr


def test_interrupted_train_leaves_no_file(start_cli, tiny_study, tmp_path):
    process = start_cli(
        "train",
        "--study",
        tiny_study,
        "--set",
        "B=4",
        "--set",
        "X=9",
        "--n-epochs",
        100000,
        "--out",
        tmp_path / "new/w.pt",
    )
    assert "epoch 1 of 100000" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert list((tmp_path / "new").iterdir()) == []


def test_rerun_fails_where_equal_conditions_give_another_score(run_cli, storage, storage_url, tiny_study):
    import sqlalchemy as sa

    url = {"FREM_SEARCH_STORAGE": storage_url, "FREM_SEARCH_STUDY": tiny_study}
    assert run_cli("run", "--n-trials", 1, **url).returncode == 0
    same = run_cli("rerun", "--trial", "best", **url)
    assert (same.returncode, same.stdout.strip()[-22:]) == (0, "the same in every bit.")
    with storage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE trial_values SET value = value + 0.001"))
    other = run_cli("rerun", "--trial", 0, "--json", **url)
    assert other.returncode == 1
    answer = json.loads(other.stdout)
    assert not answer["is_same"]
    assert answer["conditions"] == {}
    scored = run_cli("evaluate", "--trial", 0, "--json", **url)
    assert json.loads(scored.stdout)["trial"] == 0
