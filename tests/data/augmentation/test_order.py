"""Batches of an epoch hold every image and follow from seed, fold and epoch alone."""

import numpy as np
import pytest

from frem_search.data.augmentation.order import epoch_batches


@pytest.mark.parametrize(("n_images", "batch_size"), [(1, 1), (1, 4), (5, 2), (6, 2), (7, 7), (35, 8), (3, 10)])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_image_is_there(n_images, batch_size, epoch):
    indices, flags = epoch_batches(n_images, batch_size, seed=0, fold=0, epoch=epoch)
    batch = min(batch_size, n_images)
    assert indices.shape == (-(-n_images // batch), batch)
    assert indices.dtype == np.int64
    assert flags.shape == (*indices.shape, 3)
    assert flags.dtype == bool
    assert set(indices.ravel()) == set(range(n_images))
    assert len(set(indices.ravel()[:n_images])) == n_images


def test_no_batch_holds_an_image_twice():
    for epoch in range(50):
        for row in epoch_batches(7, 5, seed=3, fold=1, epoch=epoch).indices:
            assert len(set(row)) == 5


def test_batches_are_a_function_of_their_arguments():
    one, same = (epoch_batches(20, 6, seed=1, fold=2, epoch=3) for _ in range(2))
    np.testing.assert_array_equal(one.indices, same.indices)
    np.testing.assert_array_equal(one.flags, same.flags)


@pytest.mark.parametrize("other", [(0, 2, 3), (1, 0, 3), (1, 2, 4)])
def test_seed_fold_and_epoch_each_matter(other):
    seed, fold, epoch = other
    one, two = epoch_batches(20, 6, seed=1, fold=2, epoch=3), epoch_batches(20, 6, seed=seed, fold=fold, epoch=epoch)
    assert (one.indices != two.indices).any()
    assert (one.flags != two.flags).any()


@pytest.mark.parametrize(
    ("n_images", "batch_size", "n_steps"), [(7, 3, 2), (7, 3, 3), (6, 4, 5), (1, 4, 2), (30, 5, 6)]
)
def test_epochs_of_given_steps_go_on_where_the_one_before_stopped(n_images, batch_size, n_steps):
    given = {"seed": 4, "fold": 1}
    n_epochs = 8
    epochs = [epoch_batches(n_images, batch_size, epoch=1 + e, n_steps=n_steps, **given) for e in range(n_epochs)]
    passes = [epoch_batches(n_images, batch_size, epoch=1 + e, **given) for e in range(n_epochs * n_steps)]
    for drawn, expected in zip(zip(*epochs, strict=True), zip(*passes, strict=True), strict=True):
        assert {len(each) for each in drawn} == {n_steps}
        np.testing.assert_array_equal(np.concatenate(drawn), np.concatenate(expected)[: n_epochs * n_steps])


def test_no_image_is_drawn_again_before_all_were():
    seen = np.concatenate([epoch_batches(24, 4, seed=0, fold=0, epoch=e, n_steps=2).indices.ravel() for e in (1, 2, 3)])
    assert sorted(seen) == list(range(24))


def test_flags_are_fair_and_independent():
    flags = epoch_batches(4000, 10, seed=0, fold=0, epoch=0).flags.reshape(-1, 3)
    counts = np.bincount(flags @ [4, 2, 1], minlength=8)
    # Eight outcomes of 500 expected each; the standard deviation is 21.
    assert counts.min() > 400
    assert counts.max() < 600


def test_fill_changes_from_epoch_to_epoch():
    fills = {tuple(epoch_batches(9, 4, seed=0, fold=0, epoch=epoch).indices[-1, 1:]) for epoch in range(10)}
    assert len(fills) > 5
