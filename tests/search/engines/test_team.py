"""Workers kept at work, wherever they run: who waits, who is replaced, who is not needed any more."""

from types import SimpleNamespace

import numpy as np
import pytest

from frem_search.errors import UsageError, WorkerError
from frem_search.search.begin import open_worker
from frem_search.search.engines.team import End, Team
from frem_search.search.events import TrialEvent
from frem_search.study.file import load_study_file


class Seat:
    """A worker of which a test says how it fares."""

    def __init__(self, *, end=None, is_waiting=False, looks=0):
        self.place, self._end, self._is_waiting, self._looks = "a node", end, is_waiting, looks
        self.calls = []

    def end(self):
        self._looks -= 1
        if self._looks >= 0 and not self.calls:
            return None
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
    monkeypatch.setattr("frem_search.search.engines.watch.POLL_S", 0)
    monkeypatch.setattr("frem_search.search.engines.team.PAUSE_S", 0)
    with open_worker(load_study_file(str(tiny_study)), storage, device="cpu", artifacts=str(tmp_path)):
        pass
    return lambda *starts, **settings: Team(
        [iter(seats).__next__ for seats in starts],
        **{"storage": storage, "study": "tiny", "is_stopping": lambda: False} | settings,
    )


def events_of(workers):
    return list(workers.events(workers.begun()))


def killed(n):
    return [Seat(end=End(None, "lost with its node")) for _ in range(n)]


def test_workers_that_wait_for_a_place_are_dismissed_once_the_budget_is_spent(team):
    waiting = Seat(is_waiting=True)
    with team([Seat(end=End(0, ""))], [waiting]) as workers:
        assert events_of(workers) == []
        assert waiting.calls == ["close"]


def test_a_worker_that_somebody_else_stopped_is_replaced(team):
    first, second = Seat(end=End(130, "")), Seat(end=End(0, ""))
    with team([first, second]) as workers:
        assert events_of(workers) == []
    assert first.calls == second.calls == ["close"]


def test_a_worker_that_is_killed_when_the_budget_is_spent_is_not_replaced(team):
    with team([Seat(end=End(0, ""))], [Seat(end=End(None, "SIGKILL"))]) as workers:
        assert events_of(workers) == []


def test_lost_places_end_the_search_when_no_trial_advances(team):
    lost = killed(9)
    with (
        pytest.raises(WorkerError, match=r"5 workers on a node were killed \(lost with its node\)"),
        team(lost) as workers,
    ):
        events_of(workers)
    assert [seat.calls for seat in lost] == [["close"]] * 5 + [[]] * 4


def test_a_node_of_many_workers_may_be_lost_at_once(team):
    places = [[*killed(1), Seat(end=End(0, ""))] for _ in range(8)]
    with team(*places) as workers:
        assert events_of(workers) == []


def test_workers_may_be_killed_for_ever_as_long_as_trials_advance(team, monkeypatch):
    """As on machines that others may take away at any time."""
    lost = [*killed(8), Seat(end=End(0, ""))]
    monkeypatch.setattr("frem_search.search.engines.team.watch", lambda *_, is_over, **__: advancing(is_over))
    with team(lost) as workers:
        assert [event.kind for event in events_of(workers)] == ["epoch"] * 2


def advancing(is_over, kind="epoch"):
    """A trial advances after every third worker, or ends otherwise."""
    for i in range(100):
        if is_over():
            return
        if i % 3 == 2:
            yield TrialEvent(kind, 0, epoch=i)


def test_trials_that_are_given_up_are_no_advance(team, monkeypatch):
    """Else a machine that kills each worker would use up the whole budget."""
    monkeypatch.setattr(
        "frem_search.search.engines.team.watch", lambda *_, is_over, **__: advancing(is_over, kind="failed")
    )
    with pytest.raises(WorkerError, match="5 workers on a node were killed"), team(killed(9)) as workers:
        events_of(workers)


def test_a_place_where_workers_are_killed_rests_longer_each_time(team, monkeypatch):
    monkeypatch.setattr("frem_search.search.engines.team.PAUSE_S", 10.0)
    now = [1000.0]
    monkeypatch.setattr(
        "frem_search.search.engines.team.time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)
    )
    seats, started_at = iter([*killed(4), Seat(end=End(0, ""))]), []

    def start():
        started_at.append(now[0])
        return next(seats)

    with Team([start], storage=None, study="tiny", is_stopping=lambda: False) as workers:
        while not workers._look_after():
            now[0] += 1.0
    assert np.diff(started_at).tolist() == [0.0, 11.0, 21.0, 41.0]  # a killed one is seen a second later


def test_one_that_ends_with_an_error_leaves_its_place_empty_and_the_others_go_on(team):
    told, full = [], Seat(end=End(1, "frem-search: the disk is full."), looks=1)
    with team([full], [*killed(1), Seat(end=End(0, ""), looks=3)], tell=told.append) as workers:
        assert events_of(workers) == []
    assert told == ["a worker on a node ended with status 1: the disk is full. The others go on."]


def test_the_error_of_the_last_one_ends_the_search(team):
    ended = [[Seat(end=End(1, f"frem-search: disk {i} is full."), looks=1)] for i in range(2)]
    with pytest.raises(WorkerError, match=r"with status 1: disk 1 is full\.$"), team(*ended) as workers:
        events_of(workers)


@pytest.mark.parametrize(
    ("status", "error", "says"), [(2, UsageError, "^no such"), (1, WorkerError, "status 1: no such")]
)
def test_before_the_study_is_begun_the_error_of_one_is_that_of_all(storage, status, error, says):
    starts = [lambda: Seat(end=End(status, "frem-search: no such dataset.")), Seat]
    with (
        pytest.raises(error, match=says),
        Team(starts, storage=storage, study="never", is_stopping=lambda: False) as workers,
    ):
        workers.begun()


def test_a_second_interrupt_waits_for_nobody_long(team, monkeypatch):
    monkeypatch.setattr("frem_search.search.engines.team.KILL_AFTER_S", 0.0)
    hanging = Seat()
    monkeypatch.setattr(hanging, "end", lambda: None)  # whatever it is told

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), team([hanging], is_stopping=interrupt) as workers:
        events_of(workers)
    assert hanging.calls == ["stop", "close"]


def test_it_is_told_once_who_waits(team, monkeypatch):
    monkeypatch.setattr("frem_search.search.engines.team.TOLD_AFTER_S", 0)
    told, looks = [], iter([False, False, False, True])
    seats = Seat(is_waiting=True), Seat()
    with team([seats[0]], [seats[1]], tell=told.append, is_stopping=lambda: next(looks, True)) as workers:
        events_of(workers)
    assert told == ["1 of 2 workers wait for a place"]
    assert seats[0].calls == seats[1].calls == ["stop", "close"]


def test_a_study_that_nobody_began_is_none_after_a_stop(storage):
    team = Team([Seat], storage=storage, study="never", is_stopping=lambda: True)
    with team as workers:
        assert workers.begun() is None
