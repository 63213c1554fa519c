"""Warps agree with scipy and numpy; what is drawn follows from seed, fold and epoch alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from frem_search.data.augmentation.elastic import displacements, gaussian_matrix
from frem_search.data.augmentation.turns import Augmentation, turn_and_flip
from frem_search.data.augmentation.warp import Warps, sample
from frem_search.seeds import derive

ALL_FLAGS = torch.tensor(list(itertools.product([False, True], repeat=3)))
NO_FLAGS = torch.zeros((8, 3), dtype=torch.bool)
CPU = torch.device("cpu")


def make_images(size, n=8, channels=2):
    return torch.from_numpy(np.random.default_rng(0).random((n, channels, *size), dtype=np.float32))


def warps_of(seed=0, fold=0, epoch=1, **wanted):
    return Warps(Augmentation(**wanted), seed=seed, fold=fold, epoch=epoch, device=CPU)


def positions_of(size, flags=NO_FLAGS, **wanted):
    return warps_of(**wanted).positions(flags, size)


# ---- Elastic deformation.


@pytest.mark.parametrize(("n", "sigma"), [(40, 4.0), (7, 4.0), (5, 0.5), (1, 3.0), (33, 2.3), (12, 20.0)])
def test_the_gaussian_is_that_of_scipy_with_mirrored_ends(n, sigma):
    expected = ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(gaussian_matrix(n, sigma), expected, atol=1e-7)


@pytest.mark.parametrize("size", [(31, 20), (6, 9)])
def test_displacements_are_filtered_noise_times_a_factor_of_each_image(size):
    alpha, sigma, n = 50.0, 4.0, 6
    fields = displacements(n, size, alpha=alpha, sigma=sigma, rng=torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    factors = alpha * torch.rand((n, 1, 1, 1), generator=rng)
    noise = 2 * torch.rand((n, 2, *size), generator=rng) - 1
    for field, factor, each in zip(fields, factors, noise, strict=True):
        for axis in range(2):
            expected = factor.item() * ndimage.gaussian_filter(each[axis].double().numpy(), sigma, mode="reflect")
            np.testing.assert_allclose(field[axis], expected, atol=1e-5)
    assert len({factor.item() for factor in factors}) == n
    assert 0 < min(factors) < max(factors) < alpha


def test_a_fixed_factor_is_that_of_every_image_and_changes_no_noise():
    drawn, fixed = (
        displacements(6, (9, 12), alpha=50.0, sigma=2.0, rng=torch.Generator().manual_seed(3), is_fixed=is_fixed)
        for is_fixed in (False, True)
    )
    share = torch.rand((6, 1, 1, 1), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, fixed * share)


def test_displacements_are_drawn_from_the_seed_of_elastic_deformation():
    rng = torch.Generator().manual_seed(derive(0, "elastic", 0, 1))
    expected = displacements(8, (17, 22), alpha=30.0, sigma=2.0, rng=rng)
    moved = positions_of((17, 22), alpha=30.0, sigma_elastic=2.0) - positions_of((17, 22), mirror_quarters=1e-9)
    torch.testing.assert_close(moved.movedim(-1, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_images_is_deformed_and_the_others_are_not(share):
    flags = torch.zeros((400, 3), dtype=torch.bool)
    wanted = {"rotation": True, "sigma_elastic": 2.0, "alpha": 30.0}
    plain = warps_of(**wanted | {"alpha": 0.0}).positions(flags, (8, 9))
    whole = warps_of(**wanted).positions(flags, (8, 9))
    at = warps_of(**wanted, elastic_share=share).positions(flags, (8, 9))
    is_moved = [not torch.equal(one, other) for one, other in zip(at, plain, strict=True)]
    assert abs(sum(is_moved) - 400 * share) <= 2.5 * math.sqrt(400 * share * (1 - share))
    for i, each in enumerate(is_moved):
        assert torch.equal(at[i], whole[i] if each else plain[i])


def test_other_images_are_spared_in_another_epoch():
    flags = torch.zeros((400, 3), dtype=torch.bool)
    wanted = {"sigma_elastic": 2.0, "alpha": 30.0, "elastic_share": 0.5}
    grid = positions_of((8, 9), mirror_quarters=1e-9)[0]
    spared = [(warps_of(epoch=e, **wanted).positions(flags, (8, 9)) == grid).all(dim=(1, 2, 3)) for e in (1, 1, 2)]
    assert torch.equal(spared[0], spared[1])
    assert 150 <= (spared[0] == spared[2]).sum() <= 250


def test_an_elastic_warp_moves_every_pixel_by_its_displacement():
    size = (17, 22)
    image = make_images(size)
    at = positions_of(size, alpha=30.0, sigma_elastic=2.0)
    moved = sample(image, at, mode="bilinear")
    grid = np.stack(np.mgrid[: size[0], : size[1]], axis=-1)
    assert np.abs(at.numpy() - grid).max() > 1.0
    for i, channel in itertools.product(range(8), range(2)):
        expected = ndimage.map_coordinates(
            image[i, channel].double().numpy(), np.moveaxis(at[i].double().numpy(), -1, 0), order=1, mode="reflect"
        )
        np.testing.assert_allclose(moved[i, channel], expected, atol=1e-4)


def test_labels_are_moved_with_the_image_and_stay_classes():
    size = (24, 24)
    label = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (8, 1, *size))).float()
    at = positions_of(size, ALL_FLAGS, alpha=20.0, rotation=True)
    moved = sample(label, at, mode="nearest")
    for i in range(8):
        where = np.moveaxis(at[i].double().numpy(), -1, 0)
        expected = ndimage.map_coordinates(label[i, 0].numpy(), where, order=0, mode="reflect")
        assert (moved[i, 0].numpy() == expected).mean() > 0.995  # halves may be rounded either way
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


# ---- Places.


@pytest.mark.parametrize("size", [(6, 6), (5, 5), (4, 7)])
def test_without_anything_else_a_warp_is_a_turn_and_a_flip(size):
    image = make_images(size)
    at = positions_of(size, ALL_FLAGS, mirror_quarters=1e-9)
    torch.testing.assert_close(sample(image, at, mode="bilinear"), turn_and_flip(image, ALL_FLAGS), atol=1e-5, rtol=0)
    assert torch.equal(sample(image, at, mode="nearest"), turn_and_flip(image, ALL_FLAGS))


def test_flags_are_not_heeded_where_turns_are_not_wanted():
    at = positions_of((6, 6), ALL_FLAGS, turns=False, mirror_quarters=1e-9)
    assert torch.equal(at, positions_of((6, 6), NO_FLAGS, mirror_quarters=1e-9))


def test_rotations_are_about_the_centre_by_angles_all_around():
    size = (21, 31)
    flags = torch.zeros((64, 3), dtype=torch.bool)
    at = warps_of(rotation=True).positions(flags, size)
    centre = torch.tensor([10.0, 15.0])
    torch.testing.assert_close(at[:, 10, 15], centre.expand(64, 2), atol=1e-4, rtol=0)
    right = at[:, 10, 16] - centre  # one pixel to the right, after the rotation
    torch.testing.assert_close(right.norm(dim=1), torch.ones(64), atol=1e-4, rtol=0)
    angles = torch.atan2(right[:, 0], right[:, 1])
    assert np.histogram(angles, bins=4, range=(-math.pi, math.pi))[0].min() >= 8  # 16 of 64 expected in each quarter
    below = at[:, 11, 15] - centre
    torch.testing.assert_close(
        right[:, 0] * below[:, 1] - right[:, 1] * below[:, 0], -torch.ones(64), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("flags", [NO_FLAGS, ALL_FLAGS], ids=["plain", "turned"])
@pytest.mark.parametrize(("size", "crop"), [((9, 12), (4, 4)), ((9, 12), (5, 3)), ((7, 7), (7, 7)), ((8, 8), (1, 8))])
def test_a_crop_is_a_window_of_the_image_at_a_random_place(size, crop, flags):
    image = make_images(size, channels=1)
    flags = flags.repeat(25, 1)
    at = warps_of(crop_size=crop).positions(flags, size)
    cut = sample(image.repeat(25, 1, 1, 1), at, mode="nearest")
    places = set()
    for i, window in enumerate(cut):
        corners = list(itertools.product(range(size[0] - crop[0] + 1), range(size[1] - crop[1] + 1)))
        windows = [image[i % 8, :, r : r + crop[0], c : c + crop[1]] for r, c in corners]
        found = [
            corner
            for corner, each in zip(corners, windows, strict=True)
            if torch.equal(turn_and_flip(each[None], flags[i : i + 1])[0], window)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) >= 0.9 * min(len(corners), 40)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_a_mirrored_quarter_takes_the_place_of_all_four(size):
    image = make_images(size, channels=1)
    flags = torch.zeros((200, 3), dtype=torch.bool)
    at = warps_of(mirror_quarters=0.4).positions(flags, size)
    warped = sample(image[:1].expand(200, -1, -1, -1), at, mode="nearest")
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    expected = {}
    for name, lower, right in itertools.product(("quarter",), (False, True), (False, True)):
        quarter = image[0, 0].numpy()[-rows:] if lower else image[0, 0].numpy()[:rows]
        quarter = quarter[:, -columns:] if right else quarter[:, :columns]
        above = quarter[::-1] if lower else quarter
        whole = np.concatenate([above, above[::-1][size[0] % 2 :]])
        left = whole[:, ::-1] if right else whole
        expected[name, lower, right] = np.concatenate([left, left[:, ::-1][:, size[1] % 2 :]], axis=1)
    expected["whole"] = image[0, 0].numpy()
    counts = dict.fromkeys(expected, 0)
    for each in warped[:, 0].numpy():
        (name,) = [name for name, whole in expected.items() if np.array_equal(whole, each)]
        counts[name] += 1
    assert 90 <= counts.pop("whole") <= 150  # 120 expected
    assert min(counts.values()) >= 8  # 20 expected


def test_beyond_its_edges_an_image_is_mirrored():
    image = torch.arange(4.0).reshape(1, 1, 1, 4)
    at = torch.stack([torch.zeros(1, 1, 12), torch.arange(-4.0, 8.0).expand(1, 1, 12)], dim=-1)
    assert sample(image, at, mode="nearest")[0, 0, 0].tolist() == [3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0]


def test_all_warps_together_are_one_interpolation():
    size, wanted = (18, 18), {"rotation": True, "alpha": 10.0, "mirror_quarters": 1.0, "crop_size": (12, 12)}
    image = make_images(size, channels=1)
    at = positions_of(size, ALL_FLAGS, **wanted)
    assert at.shape == (8, 12, 12, 2)
    once = sample(image, at, mode="bilinear")
    for i in range(8):
        where = np.moveaxis(at[i].double().numpy(), -1, 0)
        expected = ndimage.map_coordinates(image[i, 0].double().numpy(), where, order=1, mode="reflect")
        np.testing.assert_allclose(once[i, 0], expected, atol=1e-4)


# ---- Chance.

EVERYTHING = {"rotation": True, "alpha": 10.0, "mirror_quarters": 0.5, "crop_size": (6, 6)}


def test_warps_follow_from_seed_fold_and_epoch_alone():
    first = positions_of((9, 9), **EVERYTHING)
    torch.rand(3)
    assert torch.equal(first, positions_of((9, 9), **EVERYTHING))
    for others in ({"seed": 1}, {"fold": 1}, {"epoch": 2}):
        assert not torch.equal(first, warps_of(**others, **EVERYTHING).positions(NO_FLAGS, (9, 9)))


def test_chunks_of_an_epoch_are_drawn_one_after_another():
    warps = warps_of(**EVERYTHING)
    chunks = [warps.positions(NO_FLAGS[:4], (9, 9)) for _ in range(2)]
    assert not torch.equal(*chunks)


def test_places_stay_the_same_when_elastic_deformation_begins():
    without, with_it = (
        positions_of((40, 40), rotation=True, crop_size=(20, 20), alpha=alpha, sigma_elastic=2.0)
        for alpha in (0.0, 0.1)
    )
    assert 0 < (without - with_it).abs().max() < 0.1


@pytest.mark.parametrize(
    ("augmentation", "best_score", "alpha"),
    [
        (Augmentation(alpha=5.0), -math.inf, 5.0),
        (Augmentation(alpha=5.0, elastic_from=0.7), -math.inf, 0.0),
        (Augmentation(alpha=5.0, elastic_from=0.7), 0.69, 0.0),
        (Augmentation(alpha=5.0, elastic_from=0.7), 0.7, 5.0),
        (Augmentation(alpha=5.0, elastic_from=0.7), 0.9, 5.0),
    ],
)
def test_elastic_deformation_begins_with_the_score_it_waits_for(augmentation, best_score, alpha):
    assert augmentation.at(best_score).alpha == alpha


def test_augmentations_that_do_the_same_are_equal():
    waiting = [
        Augmentation(alpha=1, sigma_elastic=2, elastic_from=0.5),
        Augmentation(alpha=3, fixed_alpha=True, elastic_share=0.5, elastic_from=0.5),
    ]
    assert Augmentation(alpha=3, elastic_share=0.0, sigma_elastic=2).at(0.6) == Augmentation()
    assert waiting[0].at(0.1) == waiting[1].at(0.2) == Augmentation()
    assert waiting[0].at(0.6) != waiting[1].at(0.6)
    assert waiting[0].at(0.6) == Augmentation(alpha=1, sigma_elastic=2)


@pytest.mark.parametrize(
    ("wanted", "has_warp"),
    [({}, False), ({"turns": False}, False), ({"elastic_from": 0.3}, False), ({"sigma_elastic": 2.0}, False)]
    + [({"fixed_alpha": True, "elastic_share": 0.5}, False), ({"alpha": 10.0, "elastic_share": 0.0}, False)]
    + [({name: value}, True) for name, value in EVERYTHING.items()],
)
def test_images_are_sampled_anew_only_where_something_asks_for_it(wanted, has_warp):
    assert Augmentation(**wanted).has_warp is has_warp


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_warps_on_the_gpu_are_the_same_twice():
    device, images = torch.device("cuda:0"), make_images((32, 32)).cuda()
    made = []
    for _ in range(2):
        warps = Warps(Augmentation(**EVERYTHING), seed=0, fold=0, epoch=1, device=device)
        made.append(sample(images, warps.positions(ALL_FLAGS.cuda(), (32, 32)), mode="bilinear"))
    assert torch.equal(*made)
