"""Seeds derived from names and numbers, so that nothing depends on the order in which things were drawn."""

import hashlib

import numpy as np


def derive(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and its place.

    >>> derive(0, "batches", 3) == derive(0, "batches", 3)
    True
    >>> derive(0, "batches", 3) == derive(0, "batches", 4)
    False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """Return a numpy generator seeded by `derive`.

    >>> int(generator(0, "flips").integers(1000)) == int(generator(0, "flips").integers(1000))
    True
    """
    return np.random.default_rng(derive(*parts))
