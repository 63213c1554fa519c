"""Samplers: what is suggested follows from seed, number, parameter and the trials before, and from nothing else."""

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy import stats

from frem_search.study.file import SAMPLERS
from frem_search.study.samplers import SAMPLER_NAMES, SobolSampler, distributions, make_sampler
from frem_search.study.space import parse_space, resolve

SPACE = {
    "B": IntDistribution(1, 512),
    "X": FloatDistribution(1.0, 1000.0, log=True),
    "maps": CategoricalDistribution(["first", "drawn", "last"]),
}


def make_study(name, *, space=SPACE, seed=0, n_startup_trials=5, storage=None):
    sampler = make_sampler(name, space=space, seed=seed, n_startup_trials=n_startup_trials)
    return optuna.create_study(sampler=sampler, direction="maximize", storage=storage)


def go_on(study, n_trials, space=SPACE):
    for _ in range(n_trials):
        trial = study.ask(fixed_distributions=space)
        study.tell(trial, -((trial.params["B"] - 100) ** 2) - np.log(trial.params["X"]))


def params_of(study):
    return [trial.params for trial in study.trials]


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_study_file_knows_the_samplers():
    assert sorted(SAMPLERS) == sorted(SAMPLER_NAMES)


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_three_restarts_suggest_what_one_go_does(name):
    whole = make_study(name)
    go_on(whole, 30)
    storage = optuna.storages.InMemoryStorage()
    part = make_study(name, storage=storage)
    for n_trials in (7, 11, 12):
        go_on(part, n_trials)
        sampler = make_sampler(name, space=SPACE, seed=0, n_startup_trials=5)
        part = optuna.load_study(study_name=part.study_name, storage=storage, sampler=sampler)
    assert params_of(part) == params_of(whole)


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_trials_differ_from_each_other_and_seeds_too(name):
    study, other = make_study(name), make_study(name, seed=1)
    go_on(study, 20)
    go_on(other, 20)
    assert len({trial["X"] for trial in params_of(study)}) == 20
    assert {trial["X"] for trial in params_of(study)}.isdisjoint({trial["X"] for trial in params_of(other)})


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_workers_side_by_side_are_suggested_different_points(name):
    storage = optuna.storages.InMemoryStorage()
    first = make_study(name, storage=storage)
    sampler = make_sampler(name, space=SPACE, seed=0, n_startup_trials=5)
    second = optuna.load_study(study_name=first.study_name, storage=storage, sampler=sampler)
    drawn = [study.ask(fixed_distributions=SPACE).params["X"] for study in (first, second, first, second)]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_parameters_of_one_trial_are_drawn_independently(name):
    space = {letter: FloatDistribution(0.0, 1.0) for letter in "abc"}
    study = make_study(name, space=space)
    trial = study.ask(fixed_distributions=space)
    assert len(set(trial.params.values())) == 3


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_the_order_of_the_parameters_does_not_matter(name):
    turned = dict(reversed(SPACE.items()))
    study, other = make_study(name), make_study(name, space=turned)
    go_on(study, 8)
    go_on(other, 8, turned)
    assert params_of(study) == params_of(other)


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_a_trial_killed_between_two_draws_gets_the_same_second_draw(name):
    space = {"B": SPACE["B"], "X": SPACE["X"]}
    whole = make_study(name, space=space)
    expected = whole.ask(fixed_distributions=space).params
    storage = optuna.storages.InMemoryStorage()
    study = make_study(name, space=space, storage=storage)
    study.ask().suggest_int("B", 1, 512)
    study = optuna.load_study(
        study_name=study.study_name,
        storage=storage,
        sampler=make_sampler(name, space=space, seed=0, n_startup_trials=5),
    )
    again = optuna.trial.Trial(study, study.trials[0]._trial_id)
    assert {"B": again.suggest_int("B", 1, 512), "X": again.suggest_float("X", 1.0, 1000.0, log=True)} == expected


def test_tpe_comes_nearer_to_the_best_than_chance():
    means = {}
    for name in ("tpe", "random"):
        study = make_study(name, n_startup_trials=10)
        go_on(study, 50)
        means[name] = np.mean([trial.value for trial in study.trials[25:]])
    assert means["tpe"] > means["random"]


def test_gp_learns_and_suggests_inside_the_space():
    study = make_study("gp", n_startup_trials=3)
    go_on(study, 5)
    assert all(
        SPACE[name]._contains(SPACE[name].to_internal_repr(v)) for t in params_of(study) for name, v in t.items()
    )
    assert len({trial["X"] for trial in params_of(study)}) >= 4


def test_qmc_follows_the_number_whatever_was_told():
    study = make_study("qmc")
    go_on(study, 6)
    other = make_study("qmc")
    for _ in range(6):
        other.tell(other.ask(fixed_distributions=SPACE), state=TrialState.FAIL)
    assert params_of(study) == params_of(other)


def test_qmc_repeats_nothing_and_covers_the_space_evenly():
    space = {"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(1.0, 100.0, log=True)}
    points = [SobolSampler(seed=0, number=i).sample_relative(None, None, space) for i in range(128)]
    unit = np.array([[point["a"], np.log(point["b"]) / np.log(100)] for point in points])
    assert len(set(map(tuple, unit))) == 128
    assert stats.qmc.discrepancy(unit) < stats.qmc.discrepancy(np.random.default_rng(0).random((128, 2))) / 5
    for column in unit.T:  # a Sobol sequence has one of its first 2^k points in each of 2^k equal intervals
        assert np.bincount((column * 128).astype(int), minlength=128).tolist() == [1] * 128


@pytest.mark.parametrize(
    "distribution",
    [
        IntDistribution(3, 11, step=4),
        IntDistribution(5, 5000, log=True),
        IntDistribution(1, 2),
        FloatDistribution(0.0, 0.3, step=0.1),
        FloatDistribution(5.0, 5.1, log=True),
        FloatDistribution(-2.0, 3.0),
        CategoricalDistribution(["a", "b", None]),
    ],
)
def test_qmc_reaches_every_value_and_none_outside(distribution):
    from frem_search.study.samplers import _at

    values = [_at(distribution, float(u)) for u in np.linspace(0, 1, 20_000, endpoint=False)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in values)
    if isinstance(distribution, CategoricalDistribution):
        assert set(values) == set(distribution.choices)
        return
    assert all(isinstance(value, int) for value in values) or isinstance(distribution, FloatDistribution)
    assert min(values) == pytest.approx(distribution.low)
    assert max(values) == pytest.approx(distribution.high, rel=1e-3)
    if distribution.step and not distribution.log:
        n_values = round((distribution.high - distribution.low) / distribution.step) + 1
        counts = np.unique(np.round(values, 6), return_counts=True)[1]
        assert len(counts) == n_values
        assert np.ptp(counts) <= 1


def test_qmc_integers_on_a_log_scale_are_log_uniform():
    space = {"B": IntDistribution(1, 999, log=True)}
    drawn = [SobolSampler(seed=3, number=i).sample_relative(None, None, space)["B"] for i in range(512)]
    shares = [np.mean([low <= value < 10 * low for value in drawn]) for low in (1, 10, 100)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "qmc"])
def test_a_choice_among_lists_comes_back_as_a_list(name):
    space = parse_space({"image_size": [[32, 32], [32, 64], [64, 64]], "B": {"low": 1, "high": 9}}, where="s.toml")
    of_optuna = distributions(space)
    study = make_study(name, space=of_optuna, n_startup_trials=2)
    for _ in range(4):
        trial = study.ask(fixed_distributions=of_optuna)
        assert resolve(space, trial.params)["image_size"] in ([32, 32], [32, 64], [64, 64])
        study.tell(trial, trial.params["B"])


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "qmc"])
def test_a_parameter_with_one_value_and_a_study_without_any(name):
    single = {"B": CategoricalDistribution([7]), "X": SPACE["X"]}
    study = make_study(name, space=single, n_startup_trials=1)
    for i in range(3):
        trial = study.ask(fixed_distributions=single)
        assert trial.params["B"] == 7
        study.tell(trial, float(i))
    study = make_study(name, space={}, n_startup_trials=1)
    for i in range(3):
        trial = study.ask(fixed_distributions={})
        assert trial.params == {}
        study.tell(trial, float(i))


def test_an_enqueued_value_leaves_the_others_to_the_sampler():
    free = make_study("qmc")
    go_on(free, 1)
    study = make_study("qmc")
    study.enqueue_trial({"B": 300})
    trial = study.ask(fixed_distributions=SPACE)
    assert trial.params == free.trials[0].params | {"B": 300}


GRID = {"gamma": CategoricalDistribution([1.0, 2.0, 3.0]), "maps": CategoricalDistribution(["first", "last"])}


def test_a_grid_tries_every_combination_once_before_it_begins_again():
    study = make_study("grid", space=GRID, seed=3)
    tried = [tuple(study.ask(fixed_distributions=GRID).params.values()) for _ in range(9)]
    assert len(set(tried[:6])) == 6
    assert tried[6:] == tried[:3]


def test_a_grid_leaves_no_combination_out_when_workers_share_it():
    storage = optuna.storages.InMemoryStorage()
    first = make_study("grid", space=GRID, storage=storage)
    sampler = make_sampler("grid", space=GRID, seed=0, n_startup_trials=5)
    second = optuna.load_study(study_name=first.study_name, storage=storage, sampler=sampler)
    tried = [tuple(study.ask(fixed_distributions=GRID).params.values()) for study in (first, second) * 3]
    assert len(set(tried)) == 6
