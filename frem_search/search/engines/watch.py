"""What happens to the trials of a study, as its database tells it: for workers that run elsewhere."""

import time
from collections.abc import Callable, Iterator

from frem_search.errors import DatabaseAwayError
from frem_search.search.events import TrialEvent
from frem_search.storage.database import Storage
from frem_search.storage.watchdog import answers_within
from frem_search.study.record import StudyRecord, TrialRecord, read_record
from frem_search.study.space import resolve, space_from_json

POLL_S = 1.0
ANSWER_S = 3.0  # patience with one that does not answer: meanwhile no signal is heeded
BLINK_S = 1.0  # patience with a database that is away: workers in training have more of it
ENDED = {"complete": "complete", "pruned": "pruned", "fail": "failed"}


def watch(storage: Storage, study: str, *, since: StudyRecord, is_over: Callable[[], bool]) -> Iterator[TrialEvent]:
    """Yield the events of all trials that begin, advance or end, until told that it is over.

    While the database is away nothing is known; its news come when it is back.

    Args:
        storage: The database.
        study: The study's name.
        since: The study as the listener knows it.
        is_over: Asked before every look; one last look follows its yes.

    Raises:
        DatabaseAwayError: The database was away at the last look.
    """
    # Trials that are in training already are news to the listener.
    known = {trial.number: trial for trial in since.trials if trial.state != "running"}
    while True:
        is_last = is_over()
        try:
            with answers_within(ANSWER_S):
                record = read_record(storage, study, has_curves=False, patience_s=BLINK_S)
        except DatabaseAwayError:
            if is_last:
                raise
        else:
            for trial in record.trials:
                yield from _news(known.get(trial.number), trial, record)
            known = {trial.number: trial for trial in record.trials}
        if is_last:
            return
        time.sleep(POLL_S)


def _news(before: TrialRecord | None, now: TrialRecord, record: StudyRecord) -> Iterator[TrialEvent]:
    """Yield what happened to a trial between two looks."""
    was = before.state if before else ""
    # A quick trial may begin and end between two looks.
    if was not in ("running", *ENDED) and now.state in ("running", *ENDED):
        params = resolve(space_from_json(record.contract["space"]), now.params)
        if before and was == "waiting":
            yield TrialEvent("adopted", now.number, params=params, epoch=before.epoch)
        else:
            yield TrialEvent("claimed", now.number, params=params)
    if now.state == "running" and now.epoch > (before.epoch if before else 0):
        yield TrialEvent("epoch", now.number, epoch=now.epoch)
    if now.state in ENDED and was not in ENDED:
        yield TrialEvent(
            ENDED[now.state],
            now.number,
            value=now.value,
            reason=now.reason,
            n_finished=sum(trial.state in ENDED for trial in record.trials),
            is_best=record.best is not None and record.best.number == now.number,
        )
    if now.state == "waiting" and was == "running":
        yield TrialEvent("released", now.number, reason=now.reason or "its worker is gone")
