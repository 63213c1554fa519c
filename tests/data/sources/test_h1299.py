"""The H1299 frames become a dataset of three classes; hot pixels and converted files are no surprise."""

import shutil

import imagecodecs
import numpy as np
import pytest
from places import REAL_DATA
from scipy import ndimage

from frem_search.data.catalogue import check, prepare
from frem_search.data.dataset import load_dataset
from frem_search.data.nnunet import read_folder
from frem_search.data.sources.h1299 import FRAMES, SIZE, cut_off
from frem_search.errors import DatasetError


@pytest.fixture(scope="module")
def real_data():
    folder = REAL_DATA
    if not (folder / "h1299").is_dir():
        pytest.skip(f"no h1299 in {folder}; set FREM_SEARCH_TEST_DATA")
    return folder / "h1299"


def file_of(source, part, kind, frame):
    return source / part / kind / f"Alon_Lab_H1299_t_{frame}_y_1_x_1.png"


def write(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(imagecodecs.png_encode(array, level=1))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Frame t: background of noise around 25, and a bright cell with an edge at row t."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for part, frames in FRAMES.items():
        for frame in frames:
            image = rng.poisson(25, size=SIZE).astype(np.uint16)
            label = np.zeros(SIZE, dtype=np.uint8)
            label[frame : frame + 40, 100:150] = 2
            label[frame + 1 : frame + 39, 101:149] = 1
            image[label == 1] = rng.integers(300, 1200, size=np.count_nonzero(label == 1))
            write(file_of(folder, part, "Raw", frame), image)
            write(file_of(folder, part, "Seg", frame), label)
    return folder


@pytest.fixture
def source(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "source")
    return tmp_path / "source"


def test_frames_become_cases_with_the_split_that_is_given(archive):
    raw = read_folder(prepare("h1299", archive))
    assert raw.class_names == ("background", "cell", "edge")
    (split,) = raw.splits
    assert split.train == tuple(f"frame{t:02d}" for t in (1, 2, 6, 15, 20, 25, 30, 35, 50, 65, 70))
    assert split.val == ("frame40", "frame45", "frame55", "frame60")
    assert split.test == ()
    for case in raw.cases:
        frame = int(case.name.removeprefix("frame"))
        assert (case.image.dtype, case.image.shape, case.label.shape) == (np.uint16, (1, *SIZE), SIZE)
        original = imagecodecs.png_decode(
            file_of(archive, "Val" if frame in FRAMES["Val"] else "Train", "Raw", frame).read_bytes()
        )
        assert (case.image[0] != original).mean() <= 1e-4
        rows, columns = np.nonzero(case.label)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (frame, frame + 39, 100, 149)


def test_one_very_bright_pixel_changes_no_other(archive, source):
    plain = load_dataset(str(prepare("h1299", archive)))
    file = file_of(source, "Val", "Raw", 45)
    image = imagecodecs.png_decode(file.read_bytes()).copy()
    image[400, 500] = 65535
    write(file, image)
    hot = load_dataset(str(prepare("h1299", source, force=True)))
    i = plain.cases.index("frame45")
    difference = np.abs(hot.images - plain.images)
    assert difference[np.arange(15) != i].max() == 0
    is_hot = np.zeros(SIZE, dtype=bool)
    is_hot[400, 500] = True
    assert difference[i, 0][~is_hot].max() < 0.1  # of a standard deviation
    assert hot.images[i, 0, 400, 500] == hot.images[i].max()
    assert hot.images[i].max() < 1.01 * plain.images[i].max()
    # Left in, the pixel would have squeezed all others together.
    assert plain.images[i].max() < 25 < 100 < (65535 - image.mean()) / image.std()


def test_cut_off_leaves_all_but_the_brightest_ten_thousandth_as_they_are():
    image = np.random.default_rng(0).permutation(SIZE[0] * SIZE[1]).astype(np.float64).reshape(SIZE) / 5
    image = image.astype(np.uint16)
    cut = cut_off(image)
    assert cut.dtype == np.uint16
    assert 0 < (cut != image).mean() <= 1e-4
    assert cut.max() == image[cut == image].max()
    np.testing.assert_array_equal(cut_off(np.full(SIZE, 7, dtype=np.uint16)), np.full(SIZE, 7))


@pytest.mark.parametrize("kind", ["Raw", "Seg"])
@pytest.mark.parametrize(("part", "frame"), [("Train", 35), ("Val", 60)])
def test_a_missing_frame(source, part, kind, frame):
    file_of(source, part, kind, frame).unlink()
    with pytest.raises(
        DatasetError, match=rf"{part}/{kind}/.*_t_{frame}_.*: expected all 15 frames .* Get the annotated"
    ):
        prepare("h1299", source)


def test_an_empty_source(tmp_path):
    with pytest.raises(DatasetError, match=r"Train/Raw/.*_t_1_.*data prepare h1299 SOURCE"):
        prepare("h1299", tmp_path)


def test_raw_frames_of_eight_bit(source):
    write(file_of(source, "Train", "Raw", 6), np.zeros(SIZE, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"Raw/.*_t_6_.*: expected pixels of 16 bit, but got uint8.*Take the file"):
        prepare("h1299", source)


@pytest.mark.parametrize("kind", ["Raw", "Seg"])
def test_a_frame_of_another_size(source, kind):
    dtype = np.uint16 if kind == "Raw" else np.uint8
    write(file_of(source, "Train", kind, 6), np.zeros(SIZE[::-1], dtype=dtype))
    with pytest.raises(DatasetError, match=rf"{kind}/.*_t_6_.*: expected .* 512 rows x 640 columns.*\(?640, 512\)"):
        prepare("h1299", source)


def test_a_label_of_an_unknown_class(source):
    label = np.zeros(SIZE, dtype=np.uint8)
    label[5, 5] = 255
    write(file_of(source, "Val", "Seg", 40), label)
    with pytest.raises(
        DatasetError, match=r"Val/Seg/.*_t_40_.*: expected label values 0 .* 2 \(edge\), but got \[255\]"
    ):
        prepare("h1299", source)


def test_real_frames(real_data):
    prepare("h1299", real_data)
    summary = check("h1299")
    assert (summary.n_cases, summary.sizes, summary.dtypes) == (15, ((512, 640, 15),), ("uint16",))
    assert summary.split_sizes == ((11, 4, 0),)
    assert summary.class_ratios == pytest.approx({"background": 0.9429, "cell": 0.0437, "edge": 0.0134}, abs=1e-4)
    dataset = load_dataset("h1299")
    assert sum(ndimage.label(label == 1)[1] for label in dataset.labels) == 813
    assert dataset.images.max() < 16  # standard deviations; cells are bright and few
    for images in dataset.images:
        assert len(np.unique(images)) > 600  # what 8 bit would have lost
