"""What a trial shows of itself: note, curve and picture, without a dashboard."""

import csv
import io
import uuid

import imagecodecs
import numpy as np
import pytest

from frem_search.segmentation.pictures import CLASS_COLOURS, GAP, PANEL, curve_csv, predictions_png
from frem_search.storage.trial_notes import shown_file, trial_note


def test_a_name_is_no_markup_in_a_note():
    part = {"mean_iou": 0.5, "per_class": {"a|b": 0.25, "<img src=x>": None, "*c*": 0.75}}
    note = trial_note("complete", {"result": {"best_epoch": 2, "val": part}})
    assert "| a\\|b | 0.2500 |" in note
    assert "| &lt;img src=x&gt; | absent |" in note
    assert "| \\*c\\* | 0.7500 |" in note


def test_the_picture_shows_image_label_and_prediction_side_by_side():
    image = np.zeros((1, 1, 8, 8), np.float32)
    image[0, 0, :, 4:] = 2.5
    label, pred = np.zeros((1, 8, 8), np.uint8), np.full((1, 8, 8), 2, np.uint8)
    label[0, 4:] = 1
    picture = imagecodecs.png_decode(predictions_png(image, label, pred))
    panels = [picture[:, start : start + PANEL] for start in range(0, picture.shape[1], PANEL + GAP)]
    half = PANEL // 2
    assert len(panels) == 3
    assert [panels[0][9, 9].tolist(), panels[0][9, half + 9].tolist()] == [[0, 0, 0], [255, 255, 255]]
    assert [tuple(panels[1][9, 9]), tuple(panels[1][half + 9, 9])] == [CLASS_COLOURS[0], CLASS_COLOURS[1]]
    assert {tuple(pixel) for row in panels[2] for pixel in row} == {CLASS_COLOURS[2]}


@pytest.mark.parametrize("shape", [(1, 700, 300), (3, 50, 41), (2, 1, 1)])
def test_images_of_every_size_fit_into_a_panel(shape):
    images = np.random.default_rng(0).normal(size=(2, *shape))
    classes = np.full((2, *shape[1:]), 200, np.uint8)
    height, width, _ = imagecodecs.png_decode(predictions_png(images, classes, classes)).shape
    assert height <= 2 * PANEL + GAP
    assert width <= 3 * PANEL + 2 * GAP
    assert max(height, width) > PANEL


def test_a_curve_may_have_gaps():
    curve = {"epoch": [1, 2], "score": [None, 0.5], "per_class": [None, [0.25, 0.75]]}
    rows = list(csv.reader(io.StringIO(curve_csv(curve, ("a", "b,c")).decode())))
    assert rows == [["epoch", "score", "score of a", "score of b,c"], ["1", "", "", ""], ["2", "0.5", "0.25", "0.75"]]


def test_ids_of_other_programs_are_none_of_ours():
    assert shown_file(str(uuid.uuid4())) is None
    assert shown_file("0" * 32 + "-1-2") is None
