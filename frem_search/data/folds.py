"""Which cases train, validate and test: functions of the case names and a seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from frem_search.errors import DatasetError
from frem_search.seeds import generator


@dataclass(frozen=True)
class Split:
    """One fold: the names of the cases that train, validate and test."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def random_split(cases: Sequence[str], *, n_train: int, n_val: int, n_test: int, seed: int) -> Split:
    """Return one random fold of the given sizes; the order of `cases` does not matter.

    >>> random_split(["a", "b", "c"], n_train=1, n_val=1, n_test=1, seed=0)
    Split(train=('c',), val=('b',), test=('a',))
    """
    if n_train + n_val + n_test != len(cases):
        message = f"A split of {n_train}/{n_val}/{n_test} needs {n_train + n_val + n_test} cases, but got {len(cases)}."
        raise DatasetError(message)
    shuffled = _shuffled(cases, seed=seed)
    parts = (shuffled[:n_train], shuffled[n_train : n_train + n_val], shuffled[n_train + n_val :])
    return Split(*(tuple(sorted(part)) for part in parts))


def k_folds(cases: Sequence[str], *, n_folds: int, seed: int, test: Sequence[str] = ()) -> tuple[Split, ...]:
    """Return folds in which every case validates once; `test` is the same in each.

    Fewer cases than folds give as many folds as there are cases.

    >>> [fold.val for fold in k_folds(["a", "b"], n_folds=5, seed=0)]
    [('a',), ('b',)]
    """
    if len(cases) < 2:
        message = f"Folds need at least 2 cases, one to train and one to validate, but got {len(cases)}. Add images."
        raise DatasetError(message)
    groups = equal_groups(cases, n_groups=min(n_folds, len(cases)), seed=seed)
    return tuple(
        Split(tuple(sorted(c for other in groups if other is not group for c in other)), tuple(group), tuple(test))
        for group in groups
    )


def section_folds(sections: Sequence[Sequence[str]], *, n_test: int, n_val: int) -> tuple[Split, ...]:
    """Return folds that keep the cases of a section together.

    Fold k tests the sections from ``k * n_test`` on, the next `n_val` validate, the others train; the first section
    follows the last.

    Args:
        sections: The cases of each section.
        n_test: Sections that test in one fold.
        n_val: Sections that validate in one fold.

    >>> section_folds([["a1", "a2"], ["b1"], ["c1"]], n_test=1, n_val=1)[2]
    Split(train=('b1',), val=('a1', 'a2'), test=('c1',))
    """
    n = len(sections)
    if n < n_test + n_val + 1:
        message = f"Folds with a test part need at least {n_test + n_val + 1} groups of cases, but got {n}. Add images."
        raise DatasetError(message)

    def cases(start: int, count: int) -> tuple[str, ...]:
        return tuple(case for i in sorted((start + j) % n for j in range(count)) for case in sections[i])

    return tuple(
        Split(
            train=cases(start + n_test + n_val, n - n_test - n_val),
            val=cases(start + n_test, n_val),
            test=cases(start, n_test),
        )
        for start in range(0, n - n_test + 1, n_test)
    )


def cyclic_folds(cases: Sequence[str], *, n_folds: int, n_test: int, n_val: int, seed: int) -> tuple[Split, ...]:
    """Return folds of fixed sizes, whose test parts begin at equal distances in one shuffled circle of cases.

    Behind the cases that test follow those that validate; the others train. Where ``n_folds * n_test`` is more than
    there are cases, test parts overlap as little as they can.

    >>> [fold.test for fold in cyclic_folds(["a", "b", "c"], n_folds=3, n_test=2, n_val=0, seed=0)]
    [('b', 'c'), ('a', 'b'), ('a', 'c')]
    """
    n = len(cases)
    if not 2 <= n_folds <= n or n_test + n_val >= n:
        message = (
            f"{n_folds} folds of {n_test} test and {n_val} validation images each need more than "
            f"{max(n_folds - 1, n_test + n_val)} images and at least 2 folds, but got {n} images. Choose fewer folds."
        )
        raise DatasetError(message)
    circle = _shuffled(cases, seed=seed)

    def fold(start: int) -> Split:
        turned = circle[start:] + circle[:start]
        parts = (turned[n_test + n_val :], turned[n_test : n_test + n_val], turned[:n_test])
        return Split(*(tuple(sorted(part)) for part in parts))

    return tuple(fold(k * n // n_folds) for k in range(n_folds))


def equal_groups(cases: Sequence[str], *, n_groups: int, seed: int) -> list[list[str]]:
    """Return the shuffled cases in sorted groups whose sizes differ by one at most."""
    shuffled = _shuffled(cases, seed=seed)
    return sorted(sorted(shuffled[i::n_groups]) for i in range(n_groups))


def _shuffled(cases: Sequence[str], *, seed: int) -> list[str]:
    ordered = sorted(cases)
    return [ordered[i] for i in generator(seed, "folds").permutation(len(ordered))]
