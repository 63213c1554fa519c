"""Sources become nnU-Net folders, whole or not at all."""

import multiprocessing
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from places import REAL_DATA

from frem_search.data import DATASETS
from frem_search.data import catalogue as catalogue_module
from frem_search.data.atomic import build_folder
from frem_search.data.cases import Case
from frem_search.data.catalogue import check, list_datasets, prepare, summary_lines, synthesize
from frem_search.data.dataset import load_dataset
from frem_search.data.images import read_label
from frem_search.data.nnunet import read_folder
from frem_search.data.sources import mouse_synthetic
from frem_search.data.sources.drosophila import VALUE_TO_CLASS
from frem_search.data.sources.folder import prepare_folder
from frem_search.errors import DatasetError, UnknownDatasetError, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def real_data():
    folder = REAL_DATA
    if not (folder / "groundtruth-drosophila-vnc" / "stack1").is_dir():
        pytest.skip(f"no groundtruth-drosophila-vnc in {folder}; set FREM_SEARCH_TEST_DATA")
    return folder


@pytest.fixture
def cheap_mouse(monkeypatch):
    def draw_noise(number):
        rng = np.random.default_rng(number)
        return Case(f"image{number:02d}", *(rng.integers(0, 3, size=(2, 256, 256), dtype=np.uint8)))

    monkeypatch.setattr(mouse_synthetic, "draw_case", draw_noise)


def write_png(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(imagecodecs.png_encode(array))


@pytest.fixture
def mouse_source(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(50):
        write_png(tmp_path / "source" / "images" / f"m{i}.png", np.full((256, 256), i, dtype=np.uint8))
        label = np.zeros((256, 256), dtype=np.uint8)
        label[:3] = rng.integers(0, 3, size=(3, 256))
        write_png(tmp_path / "source" / "labels" / f"m{i}.png", label)
    return tmp_path / "source"


@pytest.fixture
def drosophila_source(tmp_path):
    rng = np.random.default_rng(0)
    values = np.array(list(VALUE_TO_CLASS), dtype=np.uint8)
    for i in range(20):
        image = np.full((1024, 1024), i, dtype=np.uint8)
        image[256:512, 768:] = 100 + i
        file = tmp_path / "archive" / "stack1" / "raw" / f"{i:02d}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(file, image)
        label = np.full((1024, 1024), 255, dtype=np.uint8)
        label[300, 800:809] = rng.permutation(values)
        write_png(tmp_path / "archive" / "stack1" / "labels" / f"labels{i:08d}.png", label)
    return tmp_path / "archive"


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_mouse(mouse_source, home):
    folder = prepare("mouse", mouse_source)
    assert folder == home / "datasets" / "mouse"
    dataset = load_dataset("mouse")
    assert dataset.images.shape == (50, 1, 256, 256)
    assert dataset.class_names == ("background", "membrane", "nucleus")
    assert [len(dataset.indices(part, fold=0)) for part in ("train", "val", "test")] == [35, 5, 10]
    assert len(dataset.splits) == 1


def test_mouse_split_follows_from_the_names(mouse_source, tmp_path):
    one = read_folder(prepare("mouse", mouse_source)).splits
    two = read_folder(prepare("mouse", mouse_source, folder=tmp_path / "again")).splits
    assert one == two


def test_mouse_with_an_image_missing(mouse_source, home):
    for part in ("images", "labels"):
        (mouse_source / part / "m7.png").unlink()
    with pytest.raises(DatasetError, match=r"images: expected the 50 images.*but got 49\. Complete"):
        prepare("mouse", mouse_source)
    assert left_over(home / "datasets") == []
    assert not (home / "datasets" / "mouse").exists()


def test_mouse_with_a_fourth_class(mouse_source):
    write_png(mouse_source / "labels" / "m7.png", np.full((256, 256), 3, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"labels/m7\.png: expected label values from 0 to 2.*\[3\]"):
        prepare("mouse", mouse_source)


def test_mouse_of_another_size(mouse_source):
    for part in ("images", "labels"):
        write_png(mouse_source / part / "m7.png", np.zeros((128, 256), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"m7: expected 256 x 256 pixels, but got 128 x 256"):
        prepare("mouse", mouse_source)


def test_source_without_images(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere/images: expected a folder"):
        prepare("mouse", tmp_path / "nowhere")


@pytest.mark.parametrize("inner", [".", "stack1"])
def test_drosophila(drosophila_source, inner):
    raw = read_folder(prepare("drosophila", drosophila_source / inner))
    cases = {case.name: case for case in raw.cases}
    assert len(cases) == 320
    assert {case.label.shape for case in raw.cases} == {(256, 256)}
    assert (cases["section03_tile07"].image == 103).all()
    assert (cases["section03_tile06"].image == 3).all()
    original = read_label(drosophila_source / "stack1" / "labels" / "labels00000003.png")[256:512, 768:]
    expected = np.vectorize(VALUE_TO_CLASS.get)(original)
    np.testing.assert_array_equal(cases["section03_tile07"].label, expected)
    assert [(len(s.train), len(s.val), len(s.test)) for s in raw.splits] == [(192, 64, 64)] * 5
    for k, split in enumerate(raw.splits):
        assert {name[:9] for name in split.test} == {f"section{4 * k + i:02d}" for i in range(4)}
        assert {name[:9] for name in split.val} == {f"section{(4 * k + 4 + i) % 20:02d}" for i in range(4)}


def test_drosophila_with_a_section_missing(drosophila_source):
    (drosophila_source / "stack1" / "raw" / "13.tif").unlink()
    with pytest.raises(DatasetError, match=r"raw/13\.tif: expected all 20 sections.*Download"):
        prepare("drosophila", drosophila_source)


def test_drosophila_with_an_unknown_label(drosophila_source):
    write_png(drosophila_source / "stack1" / "labels" / "labels00000002.png", np.full((1024, 1024), 77, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"labels00000002\.png: expected label values \[0, 32.*but got \[77\]"):
        prepare("drosophila", drosophila_source)


def test_drosophila_of_another_size(drosophila_source):
    tifffile.imwrite(drosophila_source / "stack1" / "raw" / "02.tif", np.zeros((512, 1024), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"raw/02\.tif: expected one channel of 1024 x 1024.*\(1, 512, 1024\)"):
        prepare("drosophila", drosophila_source)


def test_real_drosophila(real_data, home):
    prepare("drosophila", real_data / "groundtruth-drosophila-vnc")
    summary = check("drosophila")
    assert summary.n_cases == 320
    assert summary.sizes == ((256, 256, 320),)
    assert summary.split_sizes == ((192, 64, 64),) * 5
    percent = {name: 100 * ratio for name, ratio in summary.class_ratios.items()}
    expected = {"cytoplasm": 76.9, "membrane": 17.2, "mitochondria": 5.4, "synapse": 0.56}
    assert percent == pytest.approx(expected, abs=0.05)
    assert round(percent["synapse"], 2) == 0.56
    labels = load_dataset("drosophila").labels
    assert (labels != 3).all(axis=(1, 2)).sum() == 165
    assert (labels != 2).all(axis=(1, 2)).sum() == 45


@pytest.mark.parametrize("n_images", [3, 4, 5, 13])
def test_any_folder(tmp_path, n_images):
    for i in range(n_images):
        write_png(tmp_path / "source" / "images" / f"i{i}.png", np.full((6, 7, 3), i, dtype=np.uint8))
        tifffile.imwrite(tmp_path / "label.tif", np.arange(42, dtype=np.uint8).reshape(6, 7) % 4)
        (tmp_path / "source" / "labels").mkdir(exist_ok=True)
        (tmp_path / "label.tif").rename(tmp_path / "source" / "labels" / f"i{i}.tif")
    prepare_folder(tmp_path / "source", name="my_cells")
    dataset = load_dataset("my_cells")
    assert dataset.name == "my_cells"
    assert dataset.class_names == ("class_0", "class_1", "class_2", "class_3")
    assert dataset.images.shape == (n_images, 3, 6, 7)
    assert len(dataset.splits) == min(5, n_images)
    for part in ("val", "test"):
        assert sorted(case for split in dataset.splits for case in getattr(split, part)) == list(dataset.cases)
    for split in dataset.splits:
        assert sorted(split.train + split.val + split.test) == list(dataset.cases)
    prepare_folder(tmp_path / "source", tmp_path / "named", name="other", class_names=list("abcde"))
    assert read_folder(tmp_path / "named").class_names == tuple("abcde")


def test_any_folder_with_gaps_between_its_labels(tmp_path):
    for i in range(5):
        write_png(tmp_path / "images" / f"{i}.png", np.zeros((2, 2), dtype=np.uint8))
        write_png(tmp_path / "labels" / f"{i}.png", np.array([[0, 255]] * 2, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"labels: expected label values 0, 1, 2.*but got \[0, 255\]"):
        prepare_folder(tmp_path, name="mine")
    with pytest.raises(DatasetError, match=r"labels/0\.png: expected label values from 0 to 1.*\[255\]"):
        prepare_folder(tmp_path, name="mine", class_names=["x", "y"])


@pytest.mark.parametrize("name", ["mouse", "My Cells", "a/b", "", "..", "folder!"])
def test_any_folder_under_an_unfit_name(tmp_path, name):
    with pytest.raises(UsageError, match=r"--name: expected a new name"):
        prepare_folder(tmp_path, name=name)


@pytest.mark.parametrize("class_names", [["x"], ["x", "x"]])
def test_any_folder_with_unfit_class_names(tmp_path, class_names):
    with pytest.raises(UsageError, match=r"Class names: expected at least two, all different"):
        prepare_folder(tmp_path, name="mine", class_names=class_names)


@pytest.mark.parametrize("n_images", [0, 2])
def test_any_folder_with_too_few_images(tmp_path, n_images):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for i in range(n_images):
            write_png(tmp_path / part / f"{i}.png", np.eye(2, dtype=np.uint8))
    with pytest.raises(DatasetError, match=rf"at least 3 groups of cases, but got {n_images}"):
        prepare_folder(tmp_path, name="mine")


def test_prepared_folder_is_not_overwritten(mouse_source, home):
    folder = prepare("mouse", mouse_source)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"datasets/mouse: expected an empty or a new folder.*--force"):
        prepare("mouse", mouse_source)
    assert (folder / "note.txt").exists()
    prepare("mouse", mouse_source, force=True)
    assert not (folder / "note.txt").exists()
    assert check("mouse").n_cases == 50
    assert left_over(home / "datasets") == []


def test_empty_folder_is_filled(mouse_source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(read_folder(prepare("mouse", mouse_source, folder=tmp_path / "empty")).cases) == 50


@pytest.mark.parametrize("error", [KeyboardInterrupt, DatasetError, OSError])
def test_interrupted_preparation_leaves_nothing(tmp_path, error):
    def write(folder):
        (folder / "half").write_text("done")
        raise error

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("")
    for name in ("new", "old"):
        with pytest.raises(DatasetError if error is OSError else error):
            build_folder(tmp_path / name, write, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "kept").exists()


def test_failed_move_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "kept").write_text("")
    rename = Path.rename

    def refuse_new(self, target):
        if (self / "new").exists():
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(DatasetError, match="no rename today"):
        build_folder(tmp_path / "set", lambda folder: (folder / "new").touch(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "kept").exists()


def test_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FREM_SEARCH_HOME", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"expected a place to write to.*FREM_SEARCH_HOME"):
        synthesize("mouse_synthetic")


def synthesize_after(barrier, results):
    barrier.wait()
    results.put(load_dataset("mouse_synthetic").fingerprint)


def test_two_processes_at_once_both_end_well(home, cheap_mouse):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=synthesize_after, args=(barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert fingerprints == {check("mouse_synthetic").fingerprint}
    assert left_over(home / "datasets") == []


def test_slower_process_keeps_the_faster_ones_folder(tmp_path):
    folder = tmp_path / "set"

    def write(beside):
        (beside / "slow").touch()
        folder.mkdir()
        (folder / "fast").touch()

    assert not build_folder(folder, write)
    assert [path.name for path in folder.iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_generated_and_real_sets_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match=r"mouse_synthetic: expected a dataset of real images"):
        prepare("mouse_synthetic", tmp_path)
    with pytest.raises(UsageError, match=r"mouse: expected a generated dataset.*ask the authors"):
        synthesize("mouse")
    with pytest.raises(UnknownDatasetError, match=r"Unknown dataset 'rat'"):
        prepare("rat", tmp_path)


def test_list_shows_named_and_prepared_folders(tmp_path, home):
    assert [(row.name, row.is_present) for row in list_datasets()] == [(name, False) for name in DATASETS]
    for i in range(5):
        for part in ("images", "labels"):
            write_png(tmp_path / part / f"{i}.png", np.eye(4, dtype=np.uint8))
    prepare_folder(tmp_path, name="mine")
    prepare_folder(tmp_path, home / "datasets" / "mouse", name="copy")
    rows = {row.name: row for row in list_datasets()}
    assert list(rows) == [*DATASETS, "mine"]
    assert rows["mine"].is_present
    assert rows["mouse"].is_present
    assert not rows["drosophila"].is_present
    assert rows["drosophila"].folder == home / "datasets" / "drosophila"


def test_summary(tmp_path):
    for i in range(5):
        write_png(tmp_path / "images" / f"{i}.png", np.zeros((4, 5 + i // 4), dtype=np.uint16))
        write_png(tmp_path / "labels" / f"{i}.png", np.eye(4, 5 + i // 4, dtype=np.uint8))
    prepare_folder(tmp_path, name="mine", class_names=["no", "yes"])
    summary = check("mine")
    assert summary.sizes == ((4, 5, 4), (4, 6, 1))
    assert summary.dtypes == ("uint16",)
    assert summary.split_sizes == ((3, 1, 1),) * 5
    assert summary.class_ratios == pytest.approx({"no": 84 / 104, "yes": 20 / 104})
    lines = summary_lines(summary)
    assert lines[0] == "dataset: mine"
    assert "cases: 5" in lines
    assert "rows x columns (images): 4 x 5 (4), 4 x 6 (1)" in lines
    assert "pixels: no 80.8 %, yes 19.2 %" in lines
    assert "fold 4: 3 train, 1 validation, 1 test" in lines
    assert lines[-1] == f"fingerprint: {summary.fingerprint}"


def test_generated_once(home, cheap_mouse, monkeypatch):
    first = load_dataset("mouse_synthetic").fingerprint
    monkeypatch.setattr(mouse_synthetic, "draw_case", None)
    assert load_dataset("mouse_synthetic").fingerprint == first
    assert catalogue_module.find_folder("mouse_synthetic") == home / "datasets" / "mouse_synthetic"
