"""The training loop: a generator of epoch reports that knows nothing of the search."""

from collections.abc import Iterator

from frem_search.training.cohort import Cohort
from frem_search.training.member import EpochReport


def fit(cohort: Cohort) -> Iterator[EpochReport]:
    """Train the members of a cohort until it has none that is not done.

    Between two reports the caller may admit and release members; it ends the training by not asking for the next one.
    A member whose loss is no number is not trained any further.
    """
    diverged: set[int] = set()
    while active := [m for m in cohort.members.values() if not m.is_done and m.key not in diverged]:
        for member in active:
            if cohort.members.get(member.key) is member:
                report = cohort.train_epoch(member)
                if not report.is_finite:
                    diverged.add(member.key)
                yield report
