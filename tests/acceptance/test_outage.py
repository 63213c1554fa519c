"""The database is away for a while: training goes on, and all of it is stored when the database is back."""

import contextlib
import itertools
import socket
import threading
import time

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from frem_search.errors import DatabaseAwayError
from frem_search.search.worker import Worker
from frem_search.storage import watchdog
from frem_search.storage.database import open_storage
from frem_search.storage.leases import leases as leases_module
from frem_search.storage.leases.leases import Leases
from frem_search.study.pruners import make_pruner
from frem_search.study.samplers import make_sampler
from frem_search.study.space import Range

SPACE = {"B": Range(1, 512), "X": Range(1.0, 1000.0)}
SEARCHED = {"B": IntDistribution(1, 512), "X": FloatDistribution(1.0, 1000.0)}


class Wire:
    """A TCP port that leads to the server's socket, and can be cut."""

    def __init__(self, path):
        self._path, self._ends, self._is_cut = path, [], False
        self._may_pass = threading.Event()
        self._may_pass.set()
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

    def _pass_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._may_pass.wait()
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self):
        """Pass nothing on, and tell nobody: as a server that stands still, or a network that drops everything."""
        self._may_pass.clear()

    def thaw(self):
        self._may_pass.set()

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
        self.thaw()
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
    monkeypatch.setattr(leases_module, "LONGEST_PAUSE_S", 0.0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(objective, *, n_trials=1, pruner="none", **of_worker):
        study = optuna.create_study(
            storage=far_storage.optuna,
            study_name="study",
            direction="maximize",
            sampler=make_sampler("tpe", space=SEARCHED, seed=0, n_startup_trials=4),
            pruner=make_pruner(pruner, {"n_startup_trials": 9, "n_warmup_epochs": 0, "min_epochs": 3, "factor": 3}),
            load_if_exists=True,
        )
        study.set_user_attr("n_trials", n_trials)
        leases = Leases(far_storage, study, distributions=SEARCHED)
        make.leases = leases
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
    assert events == ["claimed", "epoch", "epoch", "epoch", "away", "complete", "back"]
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
    monkeypatch.setattr("frem_search.search.worker.PATIENCE_S", 1.0)
    worker = search(do_nothing(4, before_epoch=away(wire, 2, 99)))
    with pytest.raises(DatabaseAwayError, match="cannot be reached"):
        list(worker.work())
    assert [trial.state for trial in trials_of(storage)] == [TrialState.RUNNING]


def test_patience_begins_when_there_is_nothing_to_train(search, do_nothing, wire, storage, monkeypatch):
    monkeypatch.setattr("frem_search.search.worker.PATIENCE_S", 1.0)

    def hook(number, epoch):
        time.sleep(0.2)
        if epoch == 3:
            wire.cut()
        if epoch == 12:
            threading.Timer(0.6, wire.mend).start()

    events = [event.kind for event in search(do_nothing(12, before_epoch=hook)).work()]
    assert events[-2:] == ["complete", "back"]
    assert trials_of(storage)[0].state == TrialState.COMPLETE


def test_leases_outlive_an_outage_and_nobody_takes_the_trial(search, do_nothing, wire, storage):
    tokens = []

    def hook(number, epoch):
        away(wire, 3, 5)(number, epoch)
        with storage.engine.connect() as connection:
            tokens.append(connection.execute(sa.text("SELECT token FROM frem_lease")).scalar_one())

    list(search(do_nothing(6, before_epoch=hook)).work())
    assert len(set(tokens)) == 1


def test_a_server_that_stands_still_holds_up_no_training(search, do_nothing, wire, storage, monkeypatch):
    monkeypatch.setattr(leases_module, "SHORT_ANSWER_S", 0.3)
    monkeypatch.setattr(leases_module, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr(watchdog, "LOOK_EVERY_S", 0.05)
    times = []

    def hook(number, epoch):
        times.append(time.monotonic())
        time.sleep(0.05)
        if epoch == 3:
            wire.freeze()
        if epoch == 40:
            wire.thaw()

    events = [event.kind for event in search(do_nothing(90, before_epoch=hook)).work()]
    assert (events.count("away"), events.count("back"), events[-1]) == (1, 1, "complete")
    assert max(after - before for before, after in itertools.pairwise(times)) < 5.0
    (trial,) = trials_of(storage)
    assert list(trial.intermediate_values) == sorted({*range(2, 91, 2)})


def test_who_waits_for_a_server_that_stands_still_gives_up_in_time(far_storage, wire, monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_EVERY_S", 0.05)
    with far_storage.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        wire.freeze()
        started = time.monotonic()
        with pytest.raises(sa.exc.OperationalError), watchdog.answers_within(0.3):
            connection.execute(sa.text("SELECT 1"))
        assert 0.2 < time.monotonic() - started < 3.0
        wire.thaw()
    with far_storage.engine.connect() as connection, watchdog.answers_within(0.3):
        assert connection.execute(sa.text("SELECT 2")).scalar() == 2
        time.sleep(0.6)  # between two statements nobody waits
        assert connection.execute(sa.text("SELECT 3")).scalar() == 3


def test_a_trial_that_ended_holds_up_none_that_is_in_training(search, do_nothing, wire, storage):
    """The first ends while the database is away, and is told by and by."""

    def hook(number, epoch):
        if (number, epoch) == (0, 4):
            wire.cut()
        if (number, epoch) == (1, 9):
            wire.mend()
        if number == 0 and epoch == 4:
            raise ZeroDivisionError

    worker = search(do_nothing(12, before_epoch=hook), n_trials=2, n_slots=2)
    events = [(event.kind, event.number, event.epoch) for event in worker.work()]
    kinds = [(kind, number) for kind, number, _ in events if kind != "epoch"]
    assert kinds == [("claimed", 0), ("claimed", 1), ("away", -1), ("failed", 0), ("back", -1), ("complete", 1)]
    assert events.index(("epoch", 1, 8)) < events.index(("failed", 0, 0)) < events.index(("epoch", 1, 10))
    assert [trial.state for trial in trials_of(storage)] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_stop_before_the_end_could_be_told_counts_for_nothing_and_trains_nothing_again(
    search, do_nothing, wire, storage
):
    objective = do_nothing(4, before_epoch=away(wire, 4, 99))
    is_stopping = lambda: objective.n_trained == 4  # noqa: E731
    events = [event.kind for event in search(objective, is_stopping=is_stopping).work()]
    assert events[-2:] == ["away", "released"]
    wire.mend()
    with storage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE frem_lease SET token = NULL"))
    second = do_nothing(4, checkpoints=objective.checkpoints)
    events = [event.kind for event in search(second).work()]
    assert events == ["adopted", "complete"]
    assert second.n_trained == 0
    (trial,) = trials_of(storage)
    assert list(trial.intermediate_values) == [1, 2, 3, 4]
    with storage.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT attempts FROM frem_lease")).scalar_one() == 1  # this one, as at first


def test_many_trials_are_let_go_at_once_while_the_database_is_away(search, do_nothing, wire, monkeypatch):
    monkeypatch.setattr(leases_module, "LONGEST_PAUSE_S", 60.0)
    monkeypatch.setattr(leases_module, "AWAY_PAUSE_S", 5.0)
    monkeypatch.setattr(leases_module, "BLINK_S", 1.0)
    objective = do_nothing(50)
    objective.before_epoch = away(wire, 3, 99)
    worker = search(objective, n_trials=8, n_slots=8, is_stopping=lambda: objective.n_trained > 24)
    started = time.monotonic()
    events = [event.kind for event in worker.work()]
    assert events.count("released") == 8
    assert time.monotonic() - started < 8
    assert len(objective.checkpoints) == 8


@pytest.mark.parametrize("is_away", [False, True])
def test_an_outage_spares_no_trial_its_rung(search, do_nothing, wire, storage, is_away):
    """Scores of epoch 3, the rung, decide; those of epochs 4 and 5 come with it, and would hide it."""
    list(search(do_nothing(9, score=lambda params, epoch: 0.9), n_trials=3, pruner="asha").work())
    hook = (lambda number, epoch: away(wire, 3, 6)(0, epoch)) if is_away else None
    worse = do_nothing(9, score=lambda params, epoch: 0.1, before_epoch=hook)
    events = [event.kind for event in search(worse, n_trials=4, pruner="asha").work()]
    assert events[-1] == ("back" if is_away else "pruned")
    assert trials_of(storage)[3].state == TrialState.PRUNED


def test_a_copy_that_takes_over_from_its_server_is_waited_for(tcp_server, tcp_database, do_nothing):
    """Until it is promoted it only reads, which is no lack of rights."""
    with open_storage(tcp_server.url(database=tcp_database)) as opened:
        study = optuna.create_study(storage=opened.optuna, study_name="study", direction="maximize")
        study.set_user_attr("n_trials", 1)

        def hook(number, epoch):
            if epoch == 3:
                tcp_server.stop()
                (tcp_server.data / "standby.signal").touch()
                tcp_server.start()
            if epoch == 5:
                tcp_server.execute("SELECT pg_promote()")

        objective = do_nothing(8, before_epoch=hook)
        leases = Leases(opened, study, distributions=SEARCHED)
        events = [event.kind for event in Worker(leases, objective, space=SPACE, n_epochs=8).work()]
        assert "away" in events
        assert events.count("epoch") == 8
        assert list(study.trials[0].intermediate_values) == list(range(1, 9))
        assert study.trials[0].state == TrialState.COMPLETE
