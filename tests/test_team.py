"""Workers kept at work, wherever they run: who waits, who is replaced, who is not needed any more."""

import pytest

from frem_search.errors import WorkerError
from frem_search.join import open_worker
from frem_search.launch.team import End, Team
from frem_search.study_file import load_study_file


class Seat:
    """A worker of which a test says how it fares."""

    def __init__(self, *, end=None, is_waiting=False):
        self.place, self._end, self._is_waiting = "a node", end, is_waiting
        self.calls = []

    def end(self):
        return self._end or (End(130, "") if self.calls else None)

    def is_waiting(self):
        return self._is_waiting

    def ask_to_stop(self):
        self.calls.append("stop")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def team(monkeypatch, storage, tiny_study, tmp_path):
    """A team of the seats that each of its starts gives, one after another."""
    monkeypatch.setattr("frem_search.launch.watch.POLL_S", 0)
    with open_worker(load_study_file(str(tiny_study)), storage, device="cpu", artifacts=str(tmp_path)):
        pass
    return lambda *starts, **settings: Team(
        [iter(seats).__next__ for seats in starts],
        **{"storage": storage, "study": "tiny", "is_stopping": lambda: False} | settings,
    )


def test_workers_that_wait_for_a_place_are_dismissed_once_the_budget_is_spent(team):
    waiting = Seat(is_waiting=True)
    with team([Seat(end=End(0, ""))], [waiting]) as workers:
        assert list(workers.events()) == []
        assert waiting.calls == ["close"]


def test_a_worker_that_somebody_else_stopped_is_replaced(team):
    first, second = Seat(end=End(130, "")), Seat(end=End(0, ""))
    with team([first, second]) as workers:
        assert list(workers.events()) == []
    assert first.calls == second.calls == ["close"]


def test_a_worker_that_is_killed_when_the_budget_is_spent_is_not_replaced(team):
    with team([Seat(end=End(0, ""))], [Seat(end=End(None, "SIGKILL"))]) as workers:
        assert list(workers.events()) == []


def test_lost_places_end_the_search_when_no_trial_advances(team):
    lost = [Seat(end=End(None, "lost with its node")) for _ in range(9)]
    with pytest.raises(WorkerError, match=r"5 workers were killed \(lost with its node\)"), team(lost) as workers:
        list(workers.events())
    assert [seat.calls for seat in lost] == [["close"]] * 5 + [[]] * 4


def test_it_is_told_once_who_waits(team, monkeypatch):
    monkeypatch.setattr("frem_search.launch.team.TOLD_AFTER_S", 0)
    told, looks = [], iter([False, False, False, True])
    seats = Seat(is_waiting=True), Seat()
    with team([seats[0]], [seats[1]], tell=told.append, is_stopping=lambda: next(looks, True)) as workers:
        list(workers.events())
    assert told == ["1 of 2 workers wait for a place"]
    assert seats[0].calls == seats[1].calls == ["stop", "close"]


def test_a_study_that_nobody_began_is_none_after_a_stop(storage):
    team = Team([Seat], storage=storage, study="never", is_stopping=lambda: True)
    with team as workers:
        assert workers.begun() is None
