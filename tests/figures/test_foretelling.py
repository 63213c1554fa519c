"""What a parameter foretells: against direct computation, on pure noise, and where something is to be found."""

import math

import numpy as np
import optuna
import pytest
from scipy.stats import kstest, rankdata

from frem_search.figures.foretelling import (
    RIDGE,
    WIDTH,
    correlations,
    forecasts,
    permuted,
    ranks_so_far,
    similarity,
)
from frem_search.figures.parameter_importance import holm
from frem_search.seeds import generator
from frem_search.study.samplers import distributions, make_sampler
from frem_search.study.space import parse_space

RANGE = {"low": 0.0, "high": 1.0}
N_ORDERS = 99


def ps(params, scores, *, seed=0):
    """Return p of each parameter, all of them ranges from 0 to 1, as columns."""
    alike = [similarity(RANGE, list(column)) for column in params.T]
    ranks = ranks_so_far(permuted(scores, generator("orders", seed), n=N_ORDERS))
    found = []
    for own in alike:
        value, *of_noise = correlations(ranks, own, sum(alike) - own)
        found.append((1 + sum(each >= value - 1e-9 for each in of_noise)) / (1 + N_ORDERS))
    return found


def independent(seed, *, n_trials, n_params=2):
    return generator("params", seed).random((n_trials, n_params))


def greedy(seed, score, *, n_trials, n_params=2):
    """Search as a sampler does that believes every score: four of five trials are tried beside the best one so far."""
    rng = generator("greedy", seed)
    params, scores = [], []
    for i in range(n_trials):
        anew = i < 5 or rng.random() < 0.2
        near = rng.random(n_params) if anew else params[int(np.argmax(scores))] + 0.1 * rng.normal(size=n_params)
        params.append(np.clip(near, 0, 1))
        scores.append(score(params[-1], rng))
    return np.array(params), scores


def test_ranks_are_those_among_the_trials_so_far():
    scores = generator("scores").integers(0, 6, size=(4, 30)) / 10  # with ties
    ranks = ranks_so_far(scores)
    for t in range(1, 30):
        until_then = rankdata(scores[:, : t + 1], axis=1)[:, -1]
        of_all = np.arange(1, t + 2)
        np.testing.assert_allclose(ranks[:, t], (until_then - of_all.mean()) / of_all.std(), atol=1e-12)
    assert (ranks[:, 0] == 0).all()


def test_forecasts_are_the_regressions_on_the_trials_before():
    params = independent(0, n_trials=12, n_params=3)
    own, *rest = (similarity(RANGE, list(column)) for column in params.T)
    others = sum(rest)
    by_others, by_own = forecasts(own, others)
    ranks = generator("ranks").normal(size=12)
    for t in range(12):
        solved = np.linalg.solve(others[:t, :t] + RIDGE * np.eye(t), ranks[:t])
        assert math.isclose(by_others[t] @ ranks, others[t, :t] @ solved, abs_tol=1e-12)
        left = ranks[:t] - others[:t, :t] @ solved
        assert math.isclose(RIDGE * by_own[t] @ ranks, own[t, :t] @ left, abs_tol=1e-12)


def test_a_correlation_is_the_partial_one():
    params = independent(1, n_trials=20)
    own, other = (similarity(RANGE, list(column)) for column in params.T)
    ranks = ranks_so_far(permuted(params[:, 0], generator("orders"), n=3))
    for row, value in zip(ranks, correlations(ranks, own, other), strict=True):
        known, added = (weights @ row for weights in forecasts(own, other))
        slopes = np.linalg.lstsq(np.column_stack([known]), np.column_stack([row, added]), rcond=None)[0]
        left, rest = np.column_stack([row, added]).T - slopes.T * known
        assert math.isclose(value, left @ rest / math.sqrt((left @ left) * (rest @ rest)), abs_tol=1e-12)


def test_the_only_parameter_is_measured_without_others():
    params = independent(2, n_trials=20, n_params=1)
    own = similarity(RANGE, list(params[:, 0]))
    ranks = ranks_so_far(params.T)
    expected = [sum(own[t, s] * ranks[0, s] for s in range(t)) for t in range(20)]
    (value,) = correlations(ranks, own, np.zeros_like(own))
    assert math.isclose(value, np.dot(ranks[0], expected) / (np.linalg.norm(ranks) * np.linalg.norm(expected)))


def test_likeness_follows_the_scale_of_the_space():
    even = similarity({"low": 1.0, "high": 1000.0, "log": True}, [1.0, 10.0, 100.0, 1000.0])
    np.testing.assert_allclose(even, similarity(RANGE, [0, 1 / 3, 2 / 3, 1]))
    assert math.isclose(even[0, 1], math.exp(-0.5 * (1 / 3 / WIDTH) ** 2))


def test_a_trial_without_the_parameter_is_like_itself_alone():
    assert similarity(RANGE, [0.5, None, 0.5]).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_a_zero_on_a_logarithmic_scale_is_placed_on_a_linear_one():
    space = {"low": 1.0, "high": 1000.0, "log": True}
    assert np.isfinite(similarity(space, [0.0, 1.0, 1000.0])).all()


def test_the_first_order_is_the_real_one():
    orders = permuted([0.3, 0.1, 0.2], generator("orders"), n=200)
    assert orders.shape == (201, 3)
    assert orders[0].tolist() == [0.3, 0.1, 0.2]
    assert {tuple(sorted(row)) for row in orders.tolist()} == {(0.1, 0.2, 0.3)}
    assert len({tuple(row) for row in orders.tolist()}) == 6


def check_uniform(found):
    """Hold p of many studies of pure noise, one row each, against the uniform distribution and Holm against 5 %."""
    n = len(found)
    for p in np.array(found).T:
        assert kstest(p, "uniform").pvalue > 0.01
        for level in (0.05, 0.1, 0.25):  # three standard errors
            assert abs(np.mean(p <= level + 1e-9) - level) < 3 * math.sqrt(level * (1 - level) / n)
    any_said = np.mean([min(holm(dict(enumerate(each))).values()) <= 0.05 for each in found])
    assert any_said < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize(("n_trials", "n_params"), [(30, 1), (30, 2), (20, 4)])
def test_p_is_uniform_on_noise_where_parameters_are_random(n_trials, n_params):
    scores = [generator("noise", i).normal(size=n_trials) for i in range(400)]
    check_uniform([ps(independent(i, n_trials=n_trials, n_params=n_params), each) for i, each in enumerate(scores)])


def test_p_is_uniform_on_noise_where_the_search_believes_it():
    check_uniform([ps(*greedy(i, lambda _, rng: rng.normal(), n_trials=40), seed=i) for i in range(400)])


def tpe(seed, score, *, n_trials):
    """Search with the sampler of a study."""
    names = ("B", "X")
    dists = distributions(parse_space(dict.fromkeys(names, RANGE), where="test"))
    sampler = make_sampler("tpe", space=dists, seed=seed, n_startup_trials=10)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    rng = generator("scores", seed)
    for _ in range(n_trials):
        trial = study.ask(dists)
        study.tell(trial, score([trial.params[name] for name in names], rng))
    return np.array([[trial.params[name] for name in names] for trial in study.trials]), [t.value for t in study.trials]


@pytest.fixture
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.usefixtures("quiet")
def test_p_is_uniform_on_noise_where_tpe_searches():
    # More of it, and with more samplers: benchmarks/importance_of_noise.py.
    check_uniform([ps(*tpe(i, lambda _, rng: rng.normal(), n_trials=25), seed=i) for i in range(60)])


def bump(place, rng):
    return 3 * math.exp(-(((place[0] - 0.3) / 0.15) ** 2)) + rng.normal()


@pytest.mark.usefixtures("quiet")
def test_what_a_bump_depends_on_is_found_and_nothing_else_by_tpe_in_50_trials():
    found = np.array([ps(*tpe(i, bump, n_trials=50), seed=i) for i in range(10)])
    assert (found[:, 0] < 0.05).all()
    assert np.mean(found[:, 1] < 0.05) < 0.3


def test_a_parameter_that_only_went_along_with_a_better_one_is_not_blamed():
    def line(place, rng):
        return 10 * place[0] + rng.normal()

    found = np.array([ps(*greedy(i, line, n_trials=50), seed=i) for i in range(100)])
    assert np.mean(found[:, 0] < 0.05) > 0.85
    assert np.mean(found[:, 1] < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)


def test_holm_is_never_below_p_nor_above_bonferroni():
    p = {str(i): float(each) for i, each in enumerate(generator("p").random(7) ** 3)}
    corrected = holm(p)
    assert all(p[name] <= corrected[name] <= min(1.0, 7 * p[name]) for name in p)
    assert sorted(p, key=p.get) == sorted(corrected, key=lambda name: (corrected[name], p[name]))
