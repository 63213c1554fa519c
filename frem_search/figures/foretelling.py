"""How well a parameter foretells the scores of trials, and how well it would if scores were noise.

A search tries what is like its best trials. So its parameters follow from earlier scores even where no score follows
from a parameter, and a measure over all trials at once is high more often than permuted scores tell. Here each trial is
foretold from the trials before it alone: however its parameters were chosen, its score is news. What the other
parameters foretell is taken out first: a parameter that only went along while the search improved is not blamed.

Source: Nair and Janson, "Randomization Tests for Adaptively Collected Data", arXiv:2301.05365 (why permuting fails);
Dawid, "The Prequential Approach", J. R. Stat. Soc. A 147, 1984; Harvey, Leybourne and Newbold, "Tests for Forecast
Encompassing", J. Bus. Econ. Stat. 16, 1998 (what one forecast adds to another).
Differs: the forecasts are kernel ridge regressions on ranks among the trials so far, and no exact test is made: the
distribution under noise is taken from permutations, which for this measure holds within what simulations can tell.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import floating
    from numpy.typing import NDArray

    Array = NDArray[floating[Any]]

WIDTH = 0.15  # of the search space: how near two values must lie to tell much about each other
RIDGE = 0.3  # variance of noise in a rank of variance 1 that neighbours share


def similarity(entry: Mapping[str, Any], values: Sequence[Any]) -> "Array":
    """Return how alike each two values of a parameter are, from 0 to 1.

    Args:
        entry: The parameter in the search space, whose scale decides: on a logarithmic one, ratios count.
        values: One for each trial; None, which is like nothing else, for a trial that has none.

    >>> similarity({"choices": ["dice", "ce"]}, ["ce", "dice", "ce"])[0].tolist()
    [1.0, 0.0, 1.0]
    >>> bool(similarity({"low": 1, "high": 1000, "log": True}, [1, 10])[0, 1] > 0.08)
    True
    """
    import numpy as np

    if "choices" in entry:
        texts = np.array([repr(value) for value in values])
        return (texts[:, None] == texts[None, :]).astype(float)
    tried = [value for value in values if value is not None]
    is_log = bool(entry.get("log", False)) and min(tried) > 0
    scale = math.log if is_log else float
    low, high = scale(entry["low"]), scale(entry["high"])
    places = np.array([math.nan if value is None else (scale(value) - low) / (high - low) for value in values])
    alike = np.exp(-0.5 * ((places[:, None] - places[None, :]) / WIDTH) ** 2)
    np.fill_diagonal(alike, 1.0)
    return np.nan_to_num(alike)


def ranks_so_far(scores: "Array") -> "Array":
    """Return the rank of each trial's score among the trials until then, centred and of variance 1 over all ranks.

    Args:
        scores: Shape (orders, trials): the trials' scores in one or more orders.

    >>> import numpy as np
    >>> ranks_so_far(np.array([[0.5, 0.7, 0.6, 0.6]])).round(2).tolist()  # none, 2nd of 2, 2nd of 3, tied 2nd of 4
    [[0.0, 1.0, 0.0, 0.0]]
    """
    import numpy as np

    _, places = np.unique(scores, return_inverse=True)  # integers are compared several times as fast
    places = np.ascontiguousarray(places.reshape(scores.shape).T, dtype=np.int32)
    ranks = np.zeros(scores.shape)
    for t in range(1, scores.shape[1]):
        n_below_less_above = np.sign(places[t] - places[:t]).sum(axis=0)
        ranks[:, t] = n_below_less_above / math.sqrt(((t + 1) ** 2 - 1) / 3)
    return ranks


def forecasts(own: "Array", others: "Array") -> "tuple[Array, Array]":
    """Return two matrices that foretell ranks: by the other parameters, and by the parameter from what these leave.

    Row t weights the trials before t. The first is the forecast of kernel ridge regression on the others. The second
    is the sum, weighted by likeness in the parameter, of what that regression leaves of the ranks before t.

    Args:
        own: The parameter's similarity.
        others: The sum of the other parameters' similarities; zeros where there is none.
    """
    import numpy as np

    n = len(own)
    root = np.linalg.cholesky(others + RIDGE * np.eye(n))
    # Its leading blocks are the inverse roots of the regressions on the first 1, 2, ... trials.
    inverse = np.tril(np.linalg.inv(root))
    by_others = np.tril(-np.diag(root)[:, None] * inverse, -1)
    by_own = np.tril(np.tril(own @ inverse.T, -1) @ inverse, -1)
    return by_others, by_own


def correlations(ranks: "Array", own: "Array", others: "Array") -> "Array":
    """Return the correlation of ranks with their forecast by a parameter, without what the others foretell.

    Args:
        ranks: Shape (orders, trials).
        own: The parameter's similarity.
        others: The sum of the other parameters' similarities.

    Returns:
        One number from -1 to 1 for each order; 0 where nothing is left to correlate.
    """
    import numpy as np

    by_others, by_own = (ranks @ weights.T for weights in forecasts(own, others))
    left, added = without(ranks, by_others), without(by_own, by_others)
    size = np.sqrt((left**2).sum(axis=1) * (added**2).sum(axis=1))
    return np.divide((left * added).sum(axis=1), size, out=np.zeros(len(ranks)), where=size > 1e-9)


def without(rows: "Array", known: "Array") -> "Array":
    """Return each row without its part along the row of `known`."""
    import numpy as np

    size = (known**2).sum(axis=1, keepdims=True)
    slope = np.divide((rows * known).sum(axis=1, keepdims=True), size, out=np.zeros_like(size), where=size > 1e-9)
    return rows - slope * known


def permuted(scores: Sequence[float], rng: Any, *, n: int) -> "Array":
    """Return the scores as they are in the first row, then in `n` random orders."""
    import numpy as np

    given = np.asarray(scores, dtype=float)
    return np.vstack([given, *(rng.permutation(given) for _ in range(n))])
