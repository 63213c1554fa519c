"""The database is away for a while: training goes on, and all of it is stored when the database is back."""

import contextlib
import socket
import threading
import time

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from frem_search import leases as leases_module
from frem_search.errors import DatabaseAwayError
from frem_search.leases import Leases
from frem_search.pruners import make_pruner
from frem_search.samplers import make_sampler
from frem_search.space import Range
from frem_search.storage import open_storage
from frem_search.worker import Worker

SPACE = {"B": Range(1, 512), "X": Range(1.0, 1000.0)}
SEARCHED = {"B": IntDistribution(1, 512), "X": FloatDistribution(1.0, 1000.0)}


class Wire:
    """A TCP port that leads to the server's socket, and can be cut."""

    def __init__(self, path):
        self._path, self._ends, self._is_cut = path, [], False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._path)
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self._is_cut = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends = []

    def mend(self):
        self._is_cut = False

    def close(self):
        self.cut()
        self._listener.close()


@pytest.fixture
def wire(postgres):
    wire = Wire(f"{postgres.folder}/.s.PGSQL.5432")
    yield wire
    wire.close()


@pytest.fixture
def far_storage(wire, storage_url):
    """The database at the other end of the wire."""
    name = sa.make_url(storage_url).database
    with open_storage(f"postgresql://postgres@127.0.0.1:{wire.port}/{name}") as opened:
        yield opened


@pytest.fixture
def search(far_storage, monkeypatch):
    """Make a worker whose database is at the other end of the wire."""
    monkeypatch.setattr(leases_module, "AWAY_PAUSE_S", 0.0)
    monkeypatch.setattr(leases_module, "BLINK_S", 0.0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(objective, *, n_trials=1, pruner="none", **of_worker):
        study = optuna.create_study(
            storage=far_storage.optuna,
            study_name="study",
            direction="maximize",
            sampler=make_sampler("tpe", space=SEARCHED, seed=0, n_startup_trials=4),
            pruner=make_pruner(pruner, {"n_startup_trials": 9, "n_warmup_epochs": 0}),
            load_if_exists=True,
        )
        study.set_user_attr("n_trials", n_trials)
        leases = Leases(far_storage, study, distributions=SEARCHED, is_stopping=of_worker.get("is_stopping", bool))
        return Worker(leases, objective, space=SPACE, n_epochs=objective.n_epochs, **of_worker)

    return make


def trials_of(storage):
    return optuna.load_study(study_name="study", storage=storage.optuna).trials


def away(wire, first, last):
    """Return a hook that cuts the wire before epoch `first` and mends it before epoch `last`."""

    def hook(number, epoch):
        if number == 0 and epoch == first:
            wire.cut()
        if number == 0 and epoch == last:
            wire.mend()

    return hook


@pytest.mark.parametrize("pruner", ["none", "median"])
@pytest.mark.parametrize("n_slots", [1, 2])
def test_training_goes_on_and_every_report_is_stored_once(search, do_nothing, wire, storage, n_slots, pruner):
    objective = do_nothing(9, before_epoch=away(wire, 3, 7))
    events = [event.kind for event in search(objective, n_trials=2, n_slots=n_slots, pruner=pruner).work()]
    assert events.count("epoch") == 18
    for trial in trials_of(storage):
        assert trial.state == TrialState.COMPLETE
        assert list(trial.intermediate_values) == list(range(1, 10))
        assert list(trial.intermediate_values.values()) == sorted(trial.intermediate_values.values())


def test_a_checkpoint_while_the_database_is_away_is_noted_when_it_is_back(search, do_nothing, wire, storage):
    seen = {}

    def hook(number, epoch):
        away(wire, 3, 6)(number, epoch)
        if epoch in (6, 8):
            with storage.engine.connect() as connection:
                seen[epoch] = connection.execute(sa.text("SELECT checkpoint_epoch FROM frem_lease")).scalar_one()

    list(search(do_nothing(9, before_epoch=hook), checkpoint_every_s=0).work())
    assert seen == {6: 2, 8: 7}


def test_a_trial_that_ends_while_the_database_is_away_is_told_when_it_is_back(search, do_nothing, wire, storage):
    def hook(number, epoch):
        if epoch == 3:
            wire.cut()
            threading.Timer(2.0, wire.mend).start()

    started = time.monotonic()
    events = [event.kind for event in search(do_nothing(3, before_epoch=hook)).work()]
    assert events == ["claimed", "epoch", "epoch", "epoch", "complete"]
    assert time.monotonic() - started > 1.9
    (trial,) = trials_of(storage)
    assert (trial.state, list(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3])


def test_a_stop_while_the_database_is_away_does_not_wait_for_it(search, do_nothing, wire, storage):
    objective = do_nothing(50)
    is_stopping = lambda: objective.n_trained >= 4  # noqa: E731
    objective.before_epoch = away(wire, 3, 99)
    worker = search(objective, is_stopping=is_stopping)
    started = time.monotonic()
    events = [event.kind for event in worker.work()]
    assert events[-1] == "released"
    assert time.monotonic() - started < 20
    wire.mend()
    # What was not stored is in the checkpoint, and told by whoever adopts the trial.
    with storage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE frem_lease SET token = NULL"))
    second = do_nothing(50, checkpoints=objective.checkpoints)
    events = [event.kind for event in search(second).work()]
    assert events[0] == "adopted"
    assert second.n_trained == 46
    (trial,) = trials_of(storage)
    assert list(trial.intermediate_values) == list(range(1, 51))


def test_a_database_that_stays_away_ends_the_worker_with_the_remedy(search, do_nothing, wire, storage, monkeypatch):
    monkeypatch.setattr(leases_module, "PATIENCE_S", 1.0)
    worker = search(do_nothing(4, before_epoch=away(wire, 2, 99)))
    with pytest.raises(DatabaseAwayError, match="cannot be reached"):
        list(worker.work())
    assert [trial.state for trial in trials_of(storage)] == [TrialState.RUNNING]


def test_leases_outlive_an_outage_and_nobody_takes_the_trial(search, do_nothing, wire, storage):
    tokens = []

    def hook(number, epoch):
        away(wire, 3, 5)(number, epoch)
        with storage.engine.connect() as connection:
            tokens.append(connection.execute(sa.text("SELECT token FROM frem_lease")).scalar_one())

    list(search(do_nothing(6, before_epoch=hook)).work())
    assert len(set(tokens)) == 1
