"""An nnU-Net folder is read as it was written, and every fault in one is told by file."""

import json
import re
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from frem_search.data.cases import Case
from frem_search.data.fingerprint import fingerprint
from frem_search.data.folds import Split
from frem_search.data.nnunet import read_folder, write_folder
from frem_search.errors import DatasetError

NAMES = ["a", "b", "c", "d"]


def make_cases(dtype=np.uint8, channels=1, size=(6, 8)):
    rng = np.random.default_rng(0)
    shape = size if channels == 1 else (channels, *size)
    return [
        Case(name, rng.integers(0, 250, size=shape).astype(dtype), rng.integers(0, 3, size=size, dtype=np.uint8))
        for name in NAMES
    ]


def write(folder: Path, cases=None, splits=(), class_names=("x", "y", "z"), channel_names=("grey",)) -> Path:
    folder.mkdir()
    write_folder(
        folder, cases or make_cases(), class_names=class_names, splits=splits, channel_names=channel_names, title="t"
    )
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set")


def edit(folder: Path, **changes) -> None:
    file = folder / "dataset.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_splits(folder: Path, content) -> None:
    (folder / "splits_final.json").write_text(json.dumps(content))


def refused(folder: Path, file: str, *fragments: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_folder(folder)
    message = str(caught.value)
    assert str(folder / file) in message
    for fragment in ("expected", "but got", *fragments):
        assert fragment in message
    assert re.search(r"\. [A-Z].*\.$", message), f"no remedy in: {message}"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_what_is_written_is_read(tmp_path, dtype, channels):
    cases = make_cases(dtype, channels)
    split = Split(("a", "b"), ("c",), ("d",))
    names = [f"channel {i}" for i in range(channels)]
    raw = read_folder(write(tmp_path / "set", cases, [split], channel_names=names))
    assert [case.name for case in raw.cases] == NAMES
    assert raw.class_names == ("x", "y", "z")
    assert raw.channel_names == tuple(names)
    assert raw.splits == (split,)
    for case, original in zip(raw.cases, cases, strict=True):
        assert case.image.dtype == dtype
        np.testing.assert_array_equal(case.image, original.image.reshape(channels, 6, 8))
        np.testing.assert_array_equal(case.label, original.label)


@pytest.mark.parametrize("ending", [".png", ".tif", ".tiff"])
def test_colour_file_is_three_channels(tmp_path, ending):
    folder = write(tmp_path / "set", make_cases(channels=3), channel_names=("r", "g", "b"))
    expected = fingerprint(read_folder(folder))
    for name, case in zip(NAMES, make_cases(channels=3), strict=True):
        for file in (folder / "imagesTr").glob(f"{name}_*"):
            file.unlink()
        colours = np.ascontiguousarray(np.moveaxis(case.image, 0, -1))
        file = folder / "imagesTr" / f"{name}_0000{ending}"
        if ending == ".png":
            file.write_bytes(imagecodecs.png_encode(colours))
        else:
            tifffile.imwrite(file, colours, photometric="rgb")
    assert fingerprint(read_folder(folder)) == expected


def test_fingerprint_ignores_format_and_place(tmp_path):
    png = fingerprint(read_folder(write(tmp_path / "png", make_cases(np.uint16))))
    tiff = fingerprint(read_folder(write(tmp_path / "tiff", make_cases(np.float32))))
    assert png == tiff


@pytest.mark.parametrize("change", ["image", "label", "class", "case", "split"])
def test_fingerprint_depends_on_content(tmp_path, change):
    before = fingerprint(read_folder(write(tmp_path / "before")))
    cases, splits, class_names = make_cases(), (), ("x", "y", "z")
    if change == "image":
        cases[2].image[3, 3] ^= 1
    elif change == "label":
        cases[2].label[3, 3] = (cases[2].label[3, 3] + 1) % 3
    elif change == "class":
        class_names = ("x", "y", "other")
    elif change == "case":
        cases[3] = Case("e", cases[3].image, cases[3].label)
    else:
        splits = (Split(("a", "b"), ("c",), ("d",)),)
    assert fingerprint(read_folder(write(tmp_path / "after", cases, splits, class_names))) != before


def test_images_of_labels_ts_test(folder):
    for part in ("images", "labels"):
        (folder / f"{part}Ts").mkdir()
        file = next((folder / f"{part}Tr").glob("d*"))
        file.rename(folder / f"{part}Ts" / file.name)
    edit(folder, numTraining=3)
    raw = read_folder(folder)
    assert len(raw.splits) == 3
    assert {split.test for split in raw.splits} == {("d",)}
    write_splits(folder, [{"train": ["a", "b"], "val": ["c"]}])
    assert read_folder(folder).splits == (Split(("a", "b"), ("c",), ("d",)),)
    write_splits(folder, [{"train": ["a", "d"], "val": ["c"]}])
    refused(folder, "splits_final.json", '"d"', "fold 0: train")


def test_images_without_labels_ts_are_left_out(folder):
    (folder / "imagesTs").mkdir()
    (folder / "imagesTs" / "z_0000.png").write_bytes(b"never read")
    assert [case.name for case in read_folder(folder).cases] == NAMES


def test_case_in_training_and_test_folder(folder):
    for part in ("images", "labels"):
        (folder / f"{part}Ts").mkdir()
        file = next((folder / f"{part}Tr").glob("d*"))
        (folder / f"{part}Ts" / file.name).write_bytes(file.read_bytes())
    refused(folder, "imagesTs", "'d'")


@pytest.mark.parametrize("cut", [0, 4, 20, 60])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_broken_image(tmp_path, kind, cut):
    folder = write(tmp_path / "set", make_cases(kind))
    file = next((folder / "imagesTr").glob("b_0000.*"))
    file.write_bytes(file.read_bytes()[:cut])
    refused(folder, f"imagesTr/{file.name}")


def test_every_cut_of_a_tiff_is_told(tmp_path):
    folder = write(tmp_path / "set", make_cases(np.float32))
    file = folder / "imagesTr" / "b_0000.tif"
    whole = file.read_bytes()
    for cut in range(0, len(whole) - 200, 17):
        file.write_bytes(whole[:cut])
        refused(folder, "imagesTr/b_0000.tif")


def test_label_value_outside_the_classes(folder):
    (folder / "labelsTr" / "b.png").write_bytes(imagecodecs.png_encode(np.full((6, 8), 7, np.uint8)))
    refused(folder, "labelsTr/b.png", "0 to 2", "[7]")


def test_label_in_colours(folder):
    (folder / "labelsTr" / "b.png").write_bytes(imagecodecs.png_encode(np.zeros((6, 8, 3), np.uint8)))
    refused(folder, "labelsTr/b.png", "3 channels", "grey")


def test_label_of_another_size(folder):
    (folder / "labelsTr" / "b.png").write_bytes(imagecodecs.png_encode(np.zeros((6, 9), np.uint8)))
    refused(folder, "labelsTr/b.png", "6 rows x 8 columns", "6 x 9")


def test_channel_of_another_size(tmp_path):
    folder = write(tmp_path / "set", make_cases(channels=2), channel_names=("r", "g"))
    (folder / "imagesTr" / "b_0001.png").write_bytes(imagecodecs.png_encode(np.zeros((5, 8), np.uint8)))
    refused(folder, "imagesTr/b_0001.png", "6 rows x 8 columns", "5 x 8")


def test_channel_missing(tmp_path):
    folder = write(tmp_path / "set", make_cases(channels=2), channel_names=("r", "g"))
    (folder / "imagesTr" / "b_0001.png").unlink()
    refused(folder, "imagesTr/b_0000.png", "2 channels", "got 1")
    (folder / "imagesTr" / "c_0000.png").unlink()
    refused(folder, "imagesTr/c_0001.png", "c_0000.png")


def test_image_without_label(folder):
    (folder / "labelsTr" / "b.png").unlink()
    refused(folder, "imagesTr/b_0000.png", "label")


def test_label_without_image(folder):
    (folder / "imagesTr" / "b_0000.png").unlink()
    refused(folder, "labelsTr/b.png", "image")


def test_two_files_of_one_name(folder):
    tifffile.imwrite(folder / "labelsTr" / "b.tif", np.zeros((6, 8), np.uint8))
    refused(folder, "labelsTr/b.tif", "b.png")


def test_image_without_channel_number(folder):
    (folder / "imagesTr" / "b_0000.png").rename(folder / "imagesTr" / "b.png")
    refused(folder, "imagesTr/b.png", "b_0000.png")


def test_volume(folder):
    (folder / "imagesTr" / "b_0000.png").unlink()
    tifffile.imwrite(folder / "imagesTr" / "b_0000.tif", np.zeros((5, 6, 8), np.uint8), photometric="minisblack")
    refused(folder, "imagesTr/b_0000.tif", "2-D", "(5, 6, 8)")


def test_not_a_number(tmp_path):
    cases = make_cases(np.float32)
    cases[1].image[2, 2] = np.nan
    refused(write(tmp_path / "set", cases), "imagesTr/b_0000.tif", "NaN")


@pytest.mark.parametrize("missing", ["dataset.json", "imagesTr", "labelsTr"])
def test_part_missing(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    refused(folder, missing)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"labels": {"x": 0, "y": 2}}, "without gaps"),
        ({"labels": {"x": 1, "y": 2, "z": 3}}, "without gaps"),
        ({"labels": {"x": 0, "y": 1, "z": 2, "ignore": 3}}, "not supported"),
        ({"labels": {"x": 0, "both": [1, 2], "y": 1}}, "regions are not supported"),
        ({"labels": {"x": 0}}, "2 to 256"),
        ({"labels": None}, "labels: an object"),
        ({"labels": ["x", "y"]}, "labels: an object"),
        ({"channel_names": None}, "channel_names: an object"),
        ({"channel_names": {"1": "grey"}}, 'keys "0"'),
        ({"channel_names": {}}, 'keys "0"'),
        ({"numTraining": 5}, "numTraining"),
        ({"numTraining": "4"}, "numTraining"),
        ({"file_ending": ".nii.gz"}, ".png"),
        ({"file_ending": None}, "file_ending"),
    ],
)
def test_wrong_description(folder, changes, fragment):
    edit(folder, **changes)
    refused(folder, "dataset.json", fragment)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_description_is_no_object(folder, text):
    (folder / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "dataset.json")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ([], "a list of folds"),
        ({}, "a list of folds"),
        ([{"train": ["a"]}], "Mend fold 0"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["b"], "extra": []}], "Mend fold 1"),
        ([{"train": ["a"], "val": ["zebra"]}], '"zebra"'),
        ([{"train": ["a"], "val": ["b"], "test": ["zebra"]}], '"zebra"'),
        ([{"train": ["a", "b"], "val": ["b"]}], '"b"'),
        ([{"train": ["a", "a"], "val": ["b"]}], '"a"'),
        ([{"train": ["a"], "val": ["b"], "test": ["a"]}], '"a"'),
        ([{"train": ["a"], "val": []}], "val: at least one"),
        ([{"train": [], "val": ["a"]}], "train: at least one"),
        ([{"train": "a", "val": ["b"]}], "list of case names"),
        ([{"train": [1], "val": ["b"]}], "list of case names"),
    ],
)
def test_wrong_splits(folder, content, fragment):
    write_splits(folder, content)
    refused(folder, "splits_final.json", fragment)
