"""Turns and flips agree with numpy and reach every symmetry of the square."""

import itertools

import numpy as np
import pytest
import torch

from frem_search.data.augmentation.turns import turn_and_flip

ALL_FLAGS = list(itertools.product([False, True], repeat=3))


def by_numpy(array, flags):
    transpose, flip_rows, flip_columns = flags
    array = array.swapaxes(-1, -2) if transpose else array
    array = np.flip(array, -2) if flip_rows else array
    return np.flip(array, -1) if flip_columns else array


def make_batch(size, n=8):
    rng = np.random.default_rng(0)
    return rng.random((n, 2, *size), dtype=np.float32), rng.integers(0, 3, size=(n, *size), dtype=np.uint8)


def turned_by(array):
    return turn_and_flip(torch.tensor(array), torch.tensor(ALL_FLAGS))


def test_batch_agrees_with_numpy_image_by_image():
    image, target = make_batch((5, 5))
    turned, turned_target = (turned_by(array) for array in (image, target))
    assert turned_target.dtype == torch.uint8
    for i, flags in enumerate(ALL_FLAGS):
        np.testing.assert_array_equal(turned[i].numpy(), by_numpy(image[i], flags))
        np.testing.assert_array_equal(turned_target[i].numpy(), by_numpy(target[i], flags))


def test_all_eight_symmetries_are_reached():
    square = np.arange(9).reshape(3, 3)
    expected = {np.rot90(s, turns).tobytes() for s in (square, square[:, ::-1]) for turns in range(4)}
    batch = torch.tensor(square).expand(8, 3, 3)
    reached = turn_and_flip(batch, torch.tensor(ALL_FLAGS))
    assert {np.ascontiguousarray(s.numpy()).tobytes() for s in reached} == expected
    assert len(expected) == 8


@pytest.mark.parametrize("size", [(3, 5), (5, 3)])
def test_oblong_images_are_only_flipped(size):
    image, target = make_batch(size)
    turned, turned_target = (turned_by(array) for array in (image, target))
    for i, (_, flip_rows, flip_columns) in enumerate(ALL_FLAGS):
        np.testing.assert_array_equal(turned[i].numpy(), by_numpy(image[i], (False, flip_rows, flip_columns)))
        np.testing.assert_array_equal(turned_target[i].numpy(), by_numpy(target[i], (False, flip_rows, flip_columns)))


def test_arguments_stay_as_they_are():
    image = torch.tensor(make_batch((4, 4))[0])
    before = image.clone()
    turn_and_flip(image, torch.ones(8, 3, dtype=torch.bool))
    assert torch.equal(image, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device():
    image = torch.tensor(make_batch((4, 4))[0]).cuda()
    flags = torch.ones(8, 3, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        turn_and_flip(image, flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
