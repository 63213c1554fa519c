"""A dataset in memory: found by name or path, resized by area, normalised, with its folds."""

import json
import subprocess
import sys

import numpy as np
import pytest

from frem_search.data import DATASETS
from frem_search.data.cases import Case
from frem_search.data.dataset import dataset_name, load_dataset
from frem_search.data.nnunet import write_folder
from frem_search.data.resize import resize_image, resize_label
from frem_search.errors import DatasetError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_cases(sizes):
    rng = np.random.default_rng(0)
    return [
        Case(f"case{i}", rng.integers(0, 250, size=size, dtype=np.uint8), rng.integers(0, 3, size=size, dtype=np.uint8))
        for i, size in enumerate(sizes)
    ]


def write(folder, cases):
    folder.mkdir(parents=True)
    write_folder(folder, cases, class_names=("x", "y", "z"), splits=[])
    return folder


def test_what_a_dataset_holds(tmp_path):
    cases = make_cases([(6, 8)] * 7)
    dataset = load_dataset(str(write(tmp_path / "Some Set", cases)))
    assert dataset.name == "some_set"
    assert dataset.folder == tmp_path / "Some Set"
    assert dataset.class_names == ("x", "y", "z")
    assert dataset.cases == tuple(case.name for case in cases)
    assert (dataset.images.dtype, dataset.images.shape) == (np.float32, (7, 1, 6, 8))
    assert (dataset.labels.dtype, dataset.labels.shape) == (np.uint8, (7, 6, 8))
    np.testing.assert_array_equal(dataset.labels, [case.label for case in cases])
    originals = np.stack([case.image for case in cases])
    expected = (originals - originals.mean((1, 2), keepdims=True)) / originals.std((1, 2), keepdims=True)
    np.testing.assert_allclose(dataset.images[:, 0], expected, rtol=1e-6)


def test_indices_follow_the_folds(tmp_path):
    dataset = load_dataset(str(write(tmp_path / "set", make_cases([(4, 4)] * 7))))
    assert len(dataset.splits) == 5
    for fold, split in enumerate(dataset.splits):
        train, val, test = (dataset.indices(part, fold=fold) for part in ("train", "val", "test"))
        assert train.dtype == val.dtype == test.dtype == np.int64
        assert [dataset.cases[i] for i in train] == list(split.train)
        assert [dataset.cases[i] for i in val] == list(split.val)
        assert len(test) == 0
    with pytest.raises(DatasetError, match="from 0 to 4, but got 5"):
        dataset.indices("val", fold=5)
    with pytest.raises(DatasetError, match="but got -1"):
        dataset.indices("val", fold=-1)


@pytest.mark.parametrize("value", [0, 7, 255, 0.1, -3e5])
def test_constant_image_becomes_zeros(tmp_path, value):
    label = np.zeros((7, 7), dtype=np.uint8)
    dtype = np.uint8 if isinstance(value, int) else np.float32
    cases = [Case(name, np.full((7, 7), value, dtype=dtype), label) for name in "ab"]
    folder = str(write(tmp_path / "set", cases))
    for size in (None, 3, 5):
        assert not load_dataset(folder, image_size=size).images.any()


def test_images_of_two_sizes_need_image_size(tmp_path):
    folder = str(write(tmp_path / "set", make_cases([(6, 8), (6, 8), (9, 8)])))
    with pytest.raises(DatasetError, match=r"'case0' with 6 x 8 and 'case2' with 9 x 8.*params\.image_size"):
        load_dataset(folder)
    assert load_dataset(folder, image_size=(3, 4)).images.shape == (3, 1, 3, 4)
    assert load_dataset(folder, image_size=5).labels.shape == (3, 5, 5)


def test_fingerprint_does_not_depend_on_image_size(tmp_path):
    folder = str(write(tmp_path / "set", make_cases([(6, 8)] * 3)))
    assert load_dataset(folder).fingerprint == load_dataset(folder, image_size=4).fingerprint


@pytest.mark.parametrize("size", [0, (0, 4), -1])
def test_size_without_pixels(tmp_path, size):
    folder = str(write(tmp_path / "set", make_cases([(6, 8)] * 3)))
    with pytest.raises(DatasetError, match=r"params\.image_size: expected at least 1 x 1"):
        load_dataset(folder, image_size=size)


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (3, 4), (12, 1)])
def test_whole_factors_give_box_means_exactly(factors):
    rows, columns = factors
    image = np.random.default_rng(0).integers(0, 65536, size=(2, 12, 24), dtype=np.uint16)
    boxes = image.reshape(2, 12 // rows, rows, 24 // columns, columns)
    resized = resize_image(image, (12 // rows, 24 // columns))
    np.testing.assert_array_equal(resized, boxes.sum(axis=(2, 4), dtype=np.int64) / (rows * columns))


@pytest.mark.parametrize("size", [(5, 7), (20, 9), (1, 1), (12, 50)])
def test_any_size_agrees_with_repeated_pixels(size):
    image = np.random.default_rng(0).random((1, 12, 10))
    rows, columns = size
    fine = image.repeat(rows, axis=1).repeat(columns, axis=2)
    expected = fine.reshape(1, rows, 12, columns, 10).mean(axis=(2, 4))
    np.testing.assert_allclose(resize_image(image, size), expected, rtol=1e-12)


def test_labels_by_majority_and_ties_to_the_lower_class():
    label = np.array([[2, 2, 1, 0], [2, 0, 0, 1], [1, 2, 2, 2], [1, 2, 0, 1]], dtype=np.uint8)
    np.testing.assert_array_equal(resize_label(label, (2, 2), n_classes=3), [[2, 0], [1, 2]])


@pytest.mark.parametrize("size", [(5, 7), (6, 4), (9, 9), (30, 11)])
def test_labels_at_any_size_agree_with_counting(size):
    label = np.random.default_rng(0).integers(0, 3, size=(9, 8), dtype=np.uint8)
    rows, columns = size
    fine = label.repeat(rows, axis=0).repeat(columns, axis=1).reshape(rows, 9, columns, 8)
    counts = np.stack([(fine == k).sum(axis=(1, 3)) for k in range(3)])
    np.testing.assert_array_equal(resize_label(label, size, n_classes=3), counts.argmax(axis=0))


def test_missing_dataset_tells_its_remedy():
    with pytest.raises(
        DatasetError, match=r"'mouse'.*ask the authors.*Imanishi.*prepare mouse.*mouse_synthetic.*--quick"
    ):
        load_dataset("mouse")
    with pytest.raises(DatasetError, match=r"'drosophila'.*m9\.figshare\.856713.*prepare drosophila SOURCE"):
        load_dataset("drosophila")


def test_unknown_dataset_suggests_a_name():
    with pytest.raises(DatasetError, match=r"Unknown dataset 'mous'\. Did you mean 'mouse'\? Known: mouse, drosophila"):
        load_dataset("mous")


def test_prepared_folder_is_found_by_name_before_the_working_directory(home, tmp_path, monkeypatch):
    write(home / "datasets" / "mine", make_cases([(4, 4)] * 3))
    write(tmp_path / "mine", make_cases([(5, 5)] * 3))
    monkeypatch.chdir(tmp_path)
    assert load_dataset("mine").labels.shape == (3, 4, 4)
    assert load_dataset("./mine").labels.shape == (3, 4, 4)
    assert load_dataset(str(tmp_path / "mine")).labels.shape == (3, 5, 5)


def test_folder_without_dataset_json(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match=r"dataset\.json: expected a readable file"):
        load_dataset(str(tmp_path))


def test_names_of_datasets(tmp_path, monkeypatch):
    assert [dataset_name(name) for name in DATASETS] == list(DATASETS)
    assert dataset_name("/data/Dataset012_My-Cells/") == "dataset012_my_cells"
    assert dataset_name("/") == "folder"
    (tmp_path / "Here").mkdir()
    monkeypatch.chdir(tmp_path / "Here")
    assert dataset_name(".") == "here"


def test_registry_knows_itself():
    assert list(DATASETS) == ["mouse", "drosophila", "isbi2012", "h1299", "mouse_synthetic", "drosophila_synthetic"]
    for name, source in DATASETS.items():
        assert source.name == name
        assert (source.prepare is None) != (source.synthesize is None)
        assert source.remedy.endswith(".")
    assert DATASETS["mouse"].class_names == DATASETS["mouse_synthetic"].class_names
    assert DATASETS["drosophila"].class_names == DATASETS["drosophila_synthetic"].class_names


def test_listing_starts_light():
    script = (
        "import sys, json; from frem_search.data.catalogue import list_datasets; list_datasets(); "
        "print(json.dumps([m for m in ('torch', 'scipy', 'tifffile', 'imagecodecs') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
