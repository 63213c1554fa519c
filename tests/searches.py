"""What tests of the worker share: workers of one study that train nothing, and what is left of it."""

import optuna
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, IntDistribution

from frem_search.search.worker import Worker
from frem_search.storage.leases.leases import Leases
from frem_search.study.pruners import make_pruner
from frem_search.study.samplers import make_sampler
from frem_search.study.space import Fixed, Range

SPACE = {"B": Range(1, 512), "X": Range(1.0, 1000.0, log=True), "depth": Fixed(4)}
SEARCHED = {"B": IntDistribution(1, 512), "X": FloatDistribution(1.0, 1000.0, log=True)}


def make_search(storage, do_nothing):
    """Return what makes workers of a study "study": `search(n_trials=2, n_slots=3, ...)`, and `search.study`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def make(objective=None, *, n_trials=2, pruner="none", settings=None, lease=None, name="study", **of_worker):
        objective = objective or do_nothing()
        make.study = optuna.create_study(
            storage=storage.optuna,
            study_name=name,
            direction="maximize",
            sampler=make_sampler("tpe", space=SEARCHED, seed=0, n_startup_trials=4),
            pruner=make_pruner(pruner, settings or {}),
            load_if_exists=True,
        )
        make.study.set_user_attr("n_trials", n_trials)
        make.leases = Leases(storage, make.study, distributions=SEARCHED, **(lease or {}))
        return Worker(make.leases, objective, space=SPACE, n_epochs=objective.n_epochs, **of_worker)

    return make


def stop_after(objective, n_epochs):
    """Return an `is_stopping` that says yes once the objective has trained so many epochs."""
    return lambda: objective.n_trained >= n_epochs


def kinds(worker):
    return [event.kind for event in worker.work()]


def curves(storage):
    with storage.engine.connect() as connection:
        return connection.execute(sa.text("SELECT curve FROM frem_curve ORDER BY trial_id")).scalars().all()


def leases(storage):
    with storage.engine.connect() as connection:
        return connection.execute(sa.text("SELECT * FROM frem_lease ORDER BY trial_id")).all()


def raising(error, *, at=None):
    """Return what raises; as `before_epoch`, before that one if one is given."""

    def act(*args, **_):
        if at is None or args[1] == at:
            raise error

    return act
