import json
import shutil

import numpy as np
import pytest

from frem_search.data.images import write_image


@pytest.fixture
def cells(tmp_path):
    """A folder as somebody brings it: five images of 8 x 8 and their labels of two classes."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "cells" / kind).mkdir(parents=True)
    for i in range(5):
        image = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        write_image(tmp_path / "cells" / "images" / f"{i}.png", image)
        write_image(tmp_path / "cells" / "labels" / f"{i}.png", (image > 128).astype(np.uint8))
    return tmp_path / "cells"


def test_list_says_what_is_here(run_cli, home, tiny_dataset):
    shutil.copytree(tiny_dataset, home / "datasets" / "tiny")
    listed = run_cli("data", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    known = {"mouse", "drosophila", "isbi2012", "h1299", "mouse_synthetic", "drosophila_synthetic"}
    assert known | {"tiny"} == set(rows)
    assert [name for name, row in rows.items() if row["is_present"]] == ["tiny"]
    assert rows["tiny"]["folder"] == str(home / "datasets" / "tiny")


def test_list_tells_generated_images_from_missing_ones(run_cli):
    here = {line.split()[0]: line.split()[1] for line in run_cli("data", "list").stdout.splitlines()}
    assert (here["mouse"], here["mouse_synthetic"]) == ("no", "generated")


def test_a_prepared_folder_is_a_dataset_by_its_name(run_cli, cells, home):
    names = ("--name", "my_cells", "--class-names", "ground, cell")
    prepared = run_cli("data", "prepare", "folder", cells, *names)
    assert (prepared.returncode, prepared.stdout) == (0, f"my_cells: prepared in {home / 'datasets' / 'my_cells'}\n")
    checked = run_cli("data", "check", "my_cells", "--json")
    summary = json.loads(checked.stdout)
    assert (summary["n_cases"], summary["sizes"]) == (5, [{"rows": 8, "columns": 8, "images": 5}])
    assert list(summary["class_ratios"]) == ["ground", "cell"]
    assert summary["folds"] == [{"train": 3, "val": 1, "test": 1}] * 5


def test_a_prepared_folder_is_replaced_only_by_force(run_cli, cells):
    prepare = ("data", "prepare", "folder", cells, "--name", "my_cells")
    assert run_cli(*prepare).returncode == 0
    again = run_cli(*prepare)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert run_cli(*prepare, "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("prepare", "folder", "."), 2, "`data prepare folder` needs a name"),
        (("prepare", "mouse", ".", "--name", "mice"), 2, "--name and --class-names belong to `data prepare folder`"),
        (("prepare", "mouse", ".", "--class-names", "a,b"), 2, "--name and --class-names belong"),
        (("prepare", "mouze", "."), 2, "Did you mean 'mouse'?"),
        (("prepare", "mouse", "nowhere"), 1, "nowhere"),
        (("prepare", "mouse_synthetic", "."), 2, "It needs no source"),
        (("prepare", "folder", ".", "--name", "mouse"), 2, "--name: expected a new name"),
        (("synthesize", "mouse"), 2, "expected a generated dataset"),
        (("check", "nowhere"), 2, "Unknown dataset 'nowhere'"),
        (("check", "drosophila"), 1, "data prepare drosophila SOURCE"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(run_cli, arguments, status, expected):
    refused = run_cli("data", *arguments)
    assert refused.returncode == status
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""


def test_check_reads_a_folder_by_its_path(run_cli, tiny_dataset):
    checked = run_cli("data", "check", tiny_dataset)
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert "cases: 12" in lines
    assert "fold 0: 8 train, 2 validation, 2 test" in lines


def test_check_finds_a_label_outside_the_classes(run_cli, tiny_dataset, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_dataset, broken)
    label = broken / "labelsTr" / "case03.png"
    assert label.exists()
    write_image(label, np.full((32, 32), 7, dtype=np.uint8))
    checked = run_cli("data", "check", broken)
    assert checked.returncode == 1
    assert "case03.png" in checked.stderr


def test_synthesize_generates_the_same_images_again(run_cli, home):
    first = run_cli("data", "synthesize", "mouse_synthetic")
    assert first.stdout == f"mouse_synthetic: generated in {home / 'datasets' / 'mouse_synthetic'}\n"
    fingerprint = json.loads(run_cli("data", "check", "mouse_synthetic", "--json").stdout)["fingerprint"]
    assert run_cli("data", "synthesize", "mouse_synthetic", "--force").returncode == 0
    again = json.loads(run_cli("data", "check", "mouse_synthetic", "--json").stdout)
    assert (again["fingerprint"], again["n_cases"]) == (fingerprint, 50)
