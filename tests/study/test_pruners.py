"""Pruners: by hand on small tables, and the same for a trial that another worker adopted."""

from datetime import UTC, datetime

import optuna
import pytest
from optuna.pruners import MedianPruner, NopPruner, WilcoxonPruner
from optuna.trial import TrialState, create_trial

from frem_search.study.file import PRUNERS
from frem_search.study.pruners import SuccessiveHalving, make_pruner, value_at

ASHA = {"min_epochs": 2, "factor": 2}
MEDIAN = {"n_startup_trials": 3, "n_warmup_epochs": 1}


def make_study(*tables):
    """A study with a finished trial for each table of reports."""
    study = optuna.create_study(direction="maximize")
    for reports in tables:
        state = TrialState.COMPLETE if reports else TrialState.FAIL
        study.add_trial(
            create_trial(state=state, value=max(reports.values(), default=None), intermediate_values=reports)
            if reports
            else create_trial(state=state)
        )
    return study


def decide(pruner, study, reports):
    return bool(pruner.prune(study, frozen(len(study.trials), reports)))


def frozen(number, reports, state=TrialState.RUNNING):
    return optuna.trial.FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=None,
        datetime_start=datetime(2026, 1, 1, tzinfo=UTC),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values=reports,
    )


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_study_file_knows_the_pruners_and_their_settings():
    made = {name: type(make_pruner(name, settings)) for name, settings in PRUNERS.items()}
    assert made == {"none": NopPruner, "median": MedianPruner, "asha": SuccessiveHalving, "wilcoxon": WilcoxonPruner}


@pytest.mark.parametrize(
    ("others", "reports", "is_pruned"),
    [
        ([], {2: 0.1}, False),  # the first at a rung goes on
        ([{2: 0.5}], {2: 0.4}, True),  # one of two goes on
        ([{2: 0.5}], {2: 0.6}, False),
        ([{2: 0.5}], {2: 0.5}, False),  # an equal is not better
        ([{2: 0.5}], {1: 0.1}, False),  # no rung reached
        ([{2: 0.5}], {}, False),
        ([{2: 0.5}], {2: 0.6, 3: 0.1}, False),  # decided at 2; between rungs it goes on
        ([{2: 0.5, 4: 0.9}], {2: 0.6, 4: 0.8}, True),  # the next rung
        ([{2: 0.5, 4: 0.9}, {2: 0.3}, {2: 0.4}], {2: 0.45}, False),  # second of four
        ([{2: 0.5, 4: 0.9}, {2: 0.6}, {2: 0.4}], {2: 0.45}, True),  # third of four
        ([{3: 0.9}], {3: 0.5}, True),  # a rung that fell between two reports is decided at the next
        ([{2: 0.9, 5: 0.9}], {2: 1.0, 5: 0.5}, True),
        ([{1: 0.9}], {2: 0.5}, False),  # that one ended before the rung
        ([{2: 0.2, 3: 0.9}], {2: 0.5}, False),  # what counts is the first report at the rung
        ([{}, {}], {2: 0.0}, False),  # failed trials do not count
    ],
)
def test_successive_halving_by_hand(others, reports, is_pruned):
    assert decide(make_pruner("asha", ASHA), make_study(*others), reports) is is_pruned


def test_successive_halving_counts_running_trials():
    study = make_study()
    study.ask().report(0.9, 2)
    assert decide(make_pruner("asha", ASHA), study, {2: 0.5})


def test_successive_halving_keeps_a_quarter_with_its_usual_factor():
    pruner = make_pruner("asha", PRUNERS["asha"])
    assert PRUNERS["asha"] == {"min_epochs": 1, "factor": 4}
    others = [{1: value / 10} for value in range(7)]
    kept = [not decide(pruner, make_study(*others), {1: value / 10 + 0.05}) for value in range(7)]
    assert kept == [False] * 5 + [True] * 2  # two of eight
    reports = {4: 0.0}
    assert not decide(pruner, make_study(*others), reports)  # nobody else reached epoch 4


def test_the_value_at_a_rung_is_the_first_at_or_after_it():
    trial = frozen(0, {1: 0.1, 3: 0.3, 5: 0.5})
    assert [value_at(trial, rung) for rung in (1, 2, 3, 4, 5, 6)] == [0.1, 0.3, 0.3, 0.5, 0.5, None]


@pytest.mark.parametrize(
    ("reports", "is_pruned"),
    [
        ({1: 0.0}, False),  # warm-up
        ({1: 0.0, 2: 0.49}, True),
        ({1: 0.0, 2: 0.5}, False),
        ({1: 0.9, 2: 0.1}, False),  # what counts is its best so far
    ],
)
def test_median_by_hand(reports, is_pruned):
    study = make_study({1: 0.1, 2: 0.4}, {1: 0.1, 2: 0.5}, {1: 0.1, 2: 0.6})
    assert decide(make_pruner("median", MEDIAN), study, reports) is is_pruned


def test_median_waits_for_its_startup_trials():
    study = make_study({2: 0.9}, {2: 0.9})
    assert not decide(make_pruner("median", MEDIAN), study, {2: 0.0})


@pytest.mark.parametrize(("name", "settings"), [("asha", ASHA), ("median", MEDIAN)])
def test_a_decision_follows_from_the_stored_reports_alone(name, settings):
    study = make_study({2: 0.5, 4: 0.6}, {2: 0.6, 4: 0.7}, {2: 0.7, 4: 0.8})
    trial = study.ask()
    trial.report(0.55, 2)
    first = make_pruner(name, settings)
    decided = first.prune(study, study.trials[-1])
    before = study.trials[-1]
    assert [first.prune(study, study.trials[-1]) for _ in range(3)] == [decided] * 3
    assert make_pruner(name, settings).prune(study, study.trials[-1]) == decided
    assert study.trials[-1] == before  # nothing is kept in attributes


IMAGES = [0.5, 0.8, 0.3, 0.9, 0.6, 0.7, 0.4, 0.75]  # scores of validation images, which differ far more than trials do


@pytest.mark.parametrize(
    ("gaps", "is_pruned"),
    [
        ([-0.02] * 8, True),
        ([0.02] * 8, False),
        ([0.02, -0.02] * 4, False),
        ([-0.02] * 4, False),  # not yet enough images
    ],
)
def test_wilcoxon_compares_image_by_image_with_the_best_trial(gaps, is_pruned):
    pruner = make_pruner("wilcoxon", {"n_startup_images": 5})
    study = make_study(dict(enumerate(IMAGES, 1)))
    reports = {i: score + gap for i, (score, gap) in enumerate(zip(IMAGES, gaps, strict=False), 1)}
    assert decide(pruner, study, reports) is is_pruned
