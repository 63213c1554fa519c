"""The generated images are the same everywhere and shaped like the sets that they stand in for."""

import hashlib

import numpy as np
import pytest
from scipy import ndimage

from frem_search.data.dataset import load_dataset
from frem_search.data.nnunet import read_folder
from frem_search.data.sources import drosophila_synthetic, mouse_synthetic
from frem_search.data.sources.geometry import nearest_cells, smooth_field


def sha256(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


@pytest.fixture(scope="module")
def mouse(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREM_SEARCH_HOME", str(tmp_path_factory.mktemp("home")))
        yield load_dataset("mouse_synthetic")


@pytest.fixture(scope="module")
def section():
    return drosophila_synthetic.draw_section(0)


def test_generated_images_stay_as_they_are(section):
    case = mouse_synthetic.draw_case(0)
    # Recorded with numpy 2.4.6 and scipy 1.17.1; the same with and without AVX2 and AVX-512.
    assert sha256(case.image, case.label) == "2e48eb2575dcd5ba"
    assert sha256(*section) == "4754951618d98d7f"


def test_mouse_is_shaped_like_the_real_set(mouse):
    assert mouse.images.shape == (50, 1, 256, 256)
    assert mouse.class_names == ("background", "membrane", "nucleus")
    assert [len(mouse.indices(part, fold=0)) for part in ("train", "val", "test")] == [35, 5, 10]
    shares = np.bincount(mouse.labels.ravel()) / mouse.labels.size
    assert shares == pytest.approx([0.76, 0.14, 0.10], abs=0.03)


def test_mouse_membranes_are_thin_bands_that_close_cells(mouse):
    for label in mouse.labels[:10]:
        depth = ndimage.distance_transform_edt(label == 1)
        assert np.quantile(depth[depth > 0], 0.95) <= 6
        n_cells = ndimage.label(label != 1)[1]
        assert 9 < n_cells < 25


def test_mouse_is_hard_but_not_hopeless(mouse):
    background, membrane, nucleus = (mouse.images[:, 0][mouse.labels == k] for k in range(3))
    spread = background.std()
    assert 0.2 < (membrane.mean() - background.mean()) / spread < 2
    assert 0.2 < (nucleus.mean() - background.mean()) / spread < 2


def test_discs_of_cells_that_store_fat_shine_like_nuclei_and_are_none(monkeypatch):
    drawn = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(mouse_synthetic, "STORING", share)
        drawn[share] = mouse_synthetic.draw_case(0)
    is_disc = drawn[0.0].label == 2
    assert is_disc.mean() > 0.1
    np.testing.assert_array_equal(drawn[1.0].label, np.where(is_disc, 0, drawn[0.0].label))
    for case in drawn.values():
        image = case.image.astype(float)
        assert image[is_disc].mean() > 1.15 * image[case.label == 0].mean()


def test_mouse_images_differ(mouse):
    assert len({sha256(image) for image in mouse.images}) == 50
    assert len({sha256(label) for label in mouse.labels}) == 50


def test_drosophila_has_the_real_shares(section):
    image, label = section
    assert image.shape == label.shape == (1024, 1024)
    assert image.dtype == label.dtype == np.uint8
    shares = np.bincount(label.ravel(), minlength=4) / label.size
    real = np.array([0.769, 0.172, 0.054, 0.0056])
    assert (shares > real * [0.9, 0.8, 0.5, 0.4]).all()
    assert (shares < real * [1.1, 1.2, 1.6, 2.5]).all()


def test_drosophila_membranes_and_synapses_are_dark(section):
    image, label = section
    cytoplasm, membrane, mitochondria, synapse = (image[label == k].mean() for k in range(4))
    assert cytoplasm > mitochondria > membrane
    assert cytoplasm - synapse > 50


def test_drosophila_tiles_are_one_picture(section, monkeypatch, tmp_path):
    monkeypatch.setattr(drosophila_synthetic, "draw_section", lambda number: section)
    drosophila_synthetic.synthesize_drosophila(tmp_path)
    raw = read_folder(tmp_path)
    assert len(raw.cases) == 320
    assert [(len(s.train), len(s.val), len(s.test)) for s in raw.splits] == [(192, 64, 64)] * 5
    tiles = {case.name: case for case in raw.cases}
    rows = [[tiles[f"section05_tile{4 * i + j:02d}"] for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(np.block([[tile.image[0] for tile in row] for row in rows]), section[0])
    np.testing.assert_array_equal(np.block([[tile.label for tile in row] for row in rows]), section[1])


def test_sections_differ(section):
    other = drosophila_synthetic.draw_section(1)
    assert (other[1] != section[1]).mean() > 0.1


def test_nearest_cells_agrees_with_all_distances():
    points = np.random.default_rng(0).uniform(0, 64, size=(12, 2))
    rows, columns = np.indices((64, 64), dtype=np.float64)
    cells = nearest_cells(points, rows, columns, reach=np.full(12, 100.0))
    distances = np.hypot(rows[..., None] - points[:, 0], columns[..., None] - points[:, 1])
    first, second = np.sort(distances, axis=-1)[..., :2].transpose(2, 0, 1)
    # The two nearest points are looked up at every second pixel, so the odd ones may differ where three cells meet.
    assert (cells.cell == distances.argmin(axis=-1)).mean() > 0.98
    even = (slice(None, None, 2), slice(None, None, 2))
    np.testing.assert_array_equal(cells.cell[even], distances.argmin(axis=-1)[even])
    apart = np.linalg.norm(points[cells.cell] - points[cells.neighbour], axis=-1)
    np.testing.assert_allclose(cells.wall_distance[even], ((second**2 - first**2) / (2 * apart))[even], atol=1e-9)


@pytest.mark.parametrize("scale", [3, 20])
def test_smooth_field_is_normal_and_smooth(scale):
    field = smooth_field(np.random.default_rng(0), (200, 160), scale=scale)
    assert field.mean() == pytest.approx(0, abs=1e-9)
    assert field.std() == pytest.approx(1)
    assert np.abs(np.diff(field, axis=0)).mean() < 2 / scale
    assert np.abs(np.diff(field, axis=1)).mean() < 2 / scale


def test_smooth_field_is_a_spline_through_its_noise():
    noise = np.random.default_rng(0).standard_normal((8, 9))
    field = smooth_field(np.random.default_rng(0), (20, 28), scale=5)
    at = np.meshgrid(np.arange(20) / 5 + 1.5, np.arange(28) / 5 + 1.5, indexing="ij")
    expected = ndimage.map_coordinates(noise, at, order=3, mode="mirror")
    np.testing.assert_allclose(field, (expected - expected.mean()) / expected.std(), atol=1e-9)
