"""The ISBI 2012 stacks become a dataset of two classes; a wrong file is told by page, size and remedy."""

import numpy as np
import pytest
import tifffile
import torch
from places import REAL_DATA

from frem_search.data.catalogue import check, prepare
from frem_search.data.nnunet import read_folder
from frem_search.data.sources.isbi2012 import N_SECTIONS, SIZE
from frem_search.errors import DatasetError
from frem_search.segmentation.metrics.rand import v_info, v_rand

SHAPE = (N_SECTIONS, SIZE, SIZE)


@pytest.fixture(scope="module")
def real_data():
    folder = REAL_DATA
    if not (folder / "ISBI-2012-challenge").is_dir():
        pytest.skip(f"no ISBI-2012-challenge in {folder}; set FREM_SEARCH_TEST_DATA")
    return folder / "ISBI-2012-challenge"


@pytest.fixture(scope="module")
def stacks():
    """Section i is of grey value i, its labels hold a square cell at row and column i."""
    volume = np.broadcast_to(np.arange(N_SECTIONS, dtype=np.uint8)[:, None, None], SHAPE)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for i, label in enumerate(labels):
        label[i : i + 20, i : i + 30] = 255
    return volume, labels


@pytest.fixture
def source(tmp_path, stacks):
    write(tmp_path, *stacks)
    return tmp_path


def write(folder, volume=None, labels=None):
    for name, stack in (("train-volume.tif", volume), ("train-labels.tif", labels)):
        if stack is not None:
            tifffile.imwrite(folder / name, stack, photometric="minisblack", compression="zlib")


def test_sections_become_cases_of_membrane_and_cell(source):
    raw = read_folder(prepare("isbi2012", source))
    assert raw.class_names == ("membrane", "cell")
    assert [case.name for case in raw.cases] == [f"section{i:02d}" for i in range(30)]
    for i, case in enumerate(raw.cases):
        assert case.image.shape == (1, SIZE, SIZE)
        assert (case.image == i).all()
        expected = np.zeros((SIZE, SIZE), dtype=np.uint8)
        expected[i : i + 20, i : i + 30] = 1
        np.testing.assert_array_equal(case.label, expected)


def test_the_one_fold_is_drawn_once_and_for_all(source, tmp_path):
    (split,) = read_folder(prepare("isbi2012", source)).splits
    assert (len(split.train), len(split.test)) == (25, 0)
    assert split.val == ("section00", "section08", "section19", "section28", "section29")
    assert sorted(split.train + split.val) == [f"section{i:02d}" for i in range(30)]


@pytest.mark.parametrize("name", ["train-volume.tif", "train-labels.tif"])
def test_a_missing_stack(source, name):
    (source / name).unlink()
    with pytest.raises(DatasetError, match=rf"{name}: expected the stacks .* no such file\. Download .*data prepare"):
        prepare("isbi2012", source)


@pytest.mark.parametrize("n_pages", [1, 29])
def test_a_stack_with_pages_missing(source, stacks, n_pages):
    write(source, labels=stacks[1][:n_pages].squeeze())
    with pytest.raises(DatasetError, match=rf"train-labels\.tif: expected 30 pages, .* got {n_pages}\. Take the file"):
        prepare("isbi2012", source)


def test_a_stack_with_pages_too_many(source, stacks):
    write(source, np.concatenate([stacks[0], stacks[0][:1]]))
    with pytest.raises(DatasetError, match=r"train-volume\.tif: expected 30 pages, .* but got 31\."):
        prepare("isbi2012", source)


@pytest.mark.parametrize("shape", [(30, 256, 256), (30, 512, 511)])
def test_a_stack_of_another_size(source, shape):
    write(source, np.zeros(shape, dtype=np.uint8))
    with pytest.raises(
        DatasetError, match=rf"volume\.tif: page 0: expected .* 512 x 512 .* \(1, {shape[1]}, {shape[2]}\)"
    ):
        prepare("isbi2012", source)


def test_a_stack_in_colours(source):
    tifffile.imwrite(source / "train-volume.tif", np.zeros((30, 512, 512, 3), np.uint8), photometric="rgb")
    with pytest.raises(DatasetError, match=r"page 0: expected one channel .* got shape \(3, 512, 512\)"):
        prepare("isbi2012", source)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_stack_of_another_number_type(source, stacks, dtype):
    write(source, stacks[0].astype(dtype))
    with pytest.raises(
        DatasetError, match=rf"page 0: expected one channel .* of uint8, but got .* of {np.dtype(dtype)}"
    ):
        prepare("isbi2012", source)


@pytest.mark.parametrize("value", [1, 128])
def test_labels_that_are_neither_membrane_nor_cell(source, stacks, value):
    labels = stacks[1].copy()
    labels[7, 3, 4] = value
    write(source, labels=labels)
    with pytest.raises(DatasetError, match=rf"train-labels\.tif: expected label values 0 .* 255 .* got \[{value}\]"):
        prepare("isbi2012", source)


def test_a_cut_file(source):
    content = (source / "train-volume.tif").read_bytes()
    (source / "train-volume.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"train-volume\.tif: expected"):
        prepare("isbi2012", source)


def test_nothing_is_left_of_a_preparation_that_failed(source, stacks, home):
    labels = stacks[1].copy()
    labels[29] = 3
    write(source, labels=labels)
    with pytest.raises(DatasetError):
        prepare("isbi2012", source)
    assert list((home / "datasets").iterdir()) == []


def test_real_stacks(real_data):
    prepare("isbi2012", real_data)
    summary = check("isbi2012")
    assert (summary.n_cases, summary.sizes, summary.dtypes) == (30, ((512, 512, 30),), ("uint8",))
    assert summary.split_sizes == ((25, 5, 0),)
    assert summary.class_ratios == pytest.approx({"membrane": 0.2196, "cell": 0.7804}, abs=5e-5)


def test_real_labels_score_one_and_real_grey_values_as_bright_cells_much_less(real_data):
    labels, volume = (
        tifffile.imread(real_data / name, key=range(3)) for name in ("train-labels.tif", "train-volume.tif")
    )
    target = torch.from_numpy(labels == 255).long()
    sure = torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    grey = torch.from_numpy(volume / np.float32(255))[:, None]
    for score in (v_rand, v_info):
        assert score(sure, target, n_classes=2).value == 1
        assert 0.4 < score(torch.cat([1 - grey, grey], dim=1), target, n_classes=2).value < 0.9
