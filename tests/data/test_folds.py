"""Folds depend on names and a seed alone, and no case is in two parts."""

import pytest

from frem_search.data.folds import k_folds, random_split, section_folds
from frem_search.errors import DatasetError

CASES = [f"case{i:02d}" for i in range(12)]


def test_random_split_is_a_partition():
    split = random_split(CASES, n_train=7, n_val=2, n_test=3, seed=0)
    assert [len(part) for part in (split.train, split.val, split.test)] == [7, 2, 3]
    assert sorted(split.train + split.val + split.test) == CASES


def test_random_split_ignores_order_and_follows_the_seed():
    split = random_split(CASES, n_train=7, n_val=2, n_test=3, seed=0)
    assert random_split(CASES[::-1], n_train=7, n_val=2, n_test=3, seed=0) == split
    assert random_split(CASES, n_train=7, n_val=2, n_test=3, seed=1) != split


def test_random_split_of_wrong_size():
    with pytest.raises(DatasetError, match=r"7/2/2 needs 11 cases, but got 12"):
        random_split(CASES, n_train=7, n_val=2, n_test=2, seed=0)


@pytest.mark.parametrize("n_cases", [2, 3, 4, 5, 11, 12])
def test_every_case_validates_once(n_cases):
    folds = k_folds(CASES[:n_cases], n_folds=5, seed=0, test=["t"])
    assert len(folds) == min(5, n_cases)
    assert sorted(case for fold in folds for case in fold.val) == CASES[:n_cases]
    for fold in folds:
        assert sorted(fold.train + fold.val) == CASES[:n_cases]
        assert fold.test == ("t",)
    sizes = [len(fold.val) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


def test_one_case_cannot_be_folded():
    with pytest.raises(DatasetError, match=r"at least 2 cases.*got 1"):
        k_folds(["a"], n_folds=5, seed=0)


def test_sections_stay_together():
    sections = [[f"s{i}t{j}" for j in range(3)] for i in range(20)]
    folds = section_folds(sections, n_test=4, n_val=4)
    numbers = [[sorted({int(c[1:-2]) for c in part}) for part in (f.train, f.val, f.test)] for f in folds]
    assert [test for _, _, test in numbers] == [[4 * k + i for i in range(4)] for k in range(5)]
    assert [val for _, val, _ in numbers] == [[(4 * k + 4 + i) % 20 for i in range(4)] for k in range(5)]
    for fold, (train, val, test) in zip(folds, numbers, strict=True):
        assert sorted(train + val + test) == list(range(20))
        assert [len(part) for part in (fold.train, fold.val, fold.test)] == [36, 12, 12]


def test_too_few_sections():
    with pytest.raises(DatasetError, match=r"at least 3 groups.*got 2"):
        section_folds([["a"], ["b"]], n_test=1, n_val=1)
