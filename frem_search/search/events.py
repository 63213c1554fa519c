"""What happens to the trials of a study, for whoever shows progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frem_search.training.member import EpochReport


@dataclass(frozen=True)
class TrialEvent:
    """Something that happened to a trial, for whoever shows progress.

    Args:
        kind: `claimed`, `adopted`, `epoch`, `complete`, `pruned`, `failed`, `released`, `lost`, `waiting`; or `away`
            and `back`, of the database.
        number: The trial's number; -1 of what concerns none.
        params: Of a claimed or adopted trial.
        epoch: How many epochs are done.
        report: Of an epoch that was trained here.
        value: Of a finished trial.
        reason: Why it did not complete, was let go of or lost; why the database is away; of an adopted one, where a
            checkpoint is that could not be used.
        n_finished: Of a finished trial: how many of the study have ended.
        is_best: Whether it is the best of them.
    """

    kind: str
    number: int
    params: Mapping[str, Any] | None = None
    epoch: int = 0
    report: "EpochReport | None" = None
    value: float | None = None
    reason: str = ""
    n_finished: int = 0
    is_best: bool = False
