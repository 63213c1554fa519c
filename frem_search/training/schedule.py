"""The learning rate as a function of the epoch: a factor that is constant from one epoch to another."""

from collections.abc import Sequence

Schedule = Sequence[tuple[int, float]]  # from which epoch on, times what; epochs rise


def factor_at(schedule: Schedule, epoch: int) -> float:
    """Return by what the learning rate is multiplied in an epoch: by 1 before the first entry.

    Args:
        schedule: From which epoch on, times what; epochs rise.
        epoch: The first one is 1.

    >>> [factor_at([(21, 0.5), (101, 0.1)], epoch) for epoch in (1, 20, 21, 100, 101, 500)]
    [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    """
    return next((factor for first, factor in reversed(schedule) if epoch >= first), 1.0)
