"""Seeds: the same on every machine and in every version, different for different names."""

import itertools

import numpy as np

from frem_search.seeds import derive, generator


def test_seeds_never_change():
    # Of this package's first version: another number would train every stored study anew from other weights.
    assert derive(0, "weights") == 5147875554478041081
    assert generator(0, "batches", 0, 1).integers(0, 1000, 4).tolist() == [734, 310, 940, 929]


def test_every_part_and_its_place_and_type_count():
    parts = [(0,), (1,), ("0",), (0, 0), (0, 1), (1, 0), (10,), ("a", "b"), ("ab",), ("a', 'b",), ()]
    assert len({derive(*each) for each in parts}) == len(parts)


def test_seeds_are_accepted_everywhere():
    for parts in itertools.product(range(20), ("weights", "batches")):
        assert 0 <= derive(*parts) < 2**63
        np.random.default_rng(derive(*parts))
