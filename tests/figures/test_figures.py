"""The figures: what they plot, what they refuse, and the files they become."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest

from frem_search.errors import ChromeNotFoundError, UsageError
from frem_search.figures import FIGURES
from frem_search.figures.axes import parameter_axis
from frem_search.figures.curves import MAX_POINTS, Series, baseline, series, thin
from frem_search.figures.enhanced_sums import enhanced_sums_data
from frem_search.figures.feature_magnitude import feature_magnitude_data
from frem_search.figures.history import history_data, history_figure
from frem_search.figures.label_place import find_room
from frem_search.figures.learning_curves import learning_curves_data, learning_curves_figure
from frem_search.figures.parameter_importance import (
    ABOVE_NOISE,
    NOISE,
    parameter_importance_data,
    parameter_importance_figure,
)
from frem_search.figures.pictures import find_chrome
from frem_search.figures.seed_spread import SeedSpread, pooled, seed_spread
from frem_search.figures.tpe_scatter import tpe_scatter_data, tpe_scatter_figure
from frem_search.figures.write import write_figures
from frem_search.seeds import generator
from frem_search.study.record import StudyRecord, TrialRecord

B_AND_X = {"B": {"low": 1, "high": 512, "log": False, "step": None}, "X": {"low": 1, "high": 1000, "log": True}}
WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def make_trial(number, value, state="complete", n_epochs=6, **params):
    level = 0.5 if value is None else value
    epochs = list(range(1, n_epochs + 1))
    curve = {
        "epoch": epochs,
        "train_loss": [1 / epoch for epoch in epochs],
        "score": [level * epoch / n_epochs for epoch in epochs],
        "bottleneck": [0.01 * epoch for epoch in epochs],
        "skip": [0.5] * n_epochs,
        "enhanced_sum": [10.0 * epoch for epoch in epochs],
        "other_sum": [20.0 * epoch for epoch in epochs],
    }
    return TrialRecord(number, state, value, params, {}, WHEN, WHEN, curve)


def make_record(*trials, space=None, n_trials=None):
    return StudyRecord(
        name="mouse_frem",
        title="FREM on mouse cells",
        dataset="mouse (synthetic)",
        score="mean_iou",
        n_trials=len(trials) if n_trials is None else n_trials,
        class_names=("background", "membrane", "nucleus"),
        contract={"space": B_AND_X if space is None else space},
        trials=trials,
    )


@pytest.fixture
def record():
    """Return a study with a trial of every state, and two best trials of the same score."""
    trials = [make_trial(i, 0.5 + 0.01 * (i % 7), B=1 + 40 * i, X=1 + 60 * i) for i in range(12)]
    pruned = make_trial(12, 0.3, state="pruned", B=100, X=100)
    failed = make_trial(13, None, state="fail", B=200, X=200)
    running = make_trial(14, None, state="running", B=300, X=300)
    return make_record(*trials, pruned, failed, running, n_trials=15)


needs_chrome = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "from frem_search.figures.pictures import find_chrome; find_chrome()"],
        capture_output=True,
        check=False,
    ).returncode
    != 0,
    reason="no Chrome or Chromium on this machine",
)


def test_best_is_the_highest_score_and_ties_go_to_the_lower_number():
    tied = make_record(make_trial(0, 0.5), make_trial(1, 0.6), make_trial(2, 0.6), make_trial(3, 0.9, state="pruned"))
    assert tied.best.number == 1


def test_best_of_a_study_without_a_complete_trial_is_none():
    assert make_record(make_trial(0, 0.5, state="pruned")).best is None


def test_searched_leaves_out_fixed_parameters():
    space = {"depth": {"value": 4}, "lr": {"low": 1e-5, "high": 0.1}, "loss": {"choices": ["ce", "dice"]}}
    assert make_record(space=space).searched == ("lr", "loss")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_has_numbers(name, record):
    data = FIGURES[name].data(record)
    figure = FIGURES[name].draw(data)
    rows = data.table()
    assert figure.data
    assert rows
    assert {tuple(row) for row in rows} == {tuple(rows[0])}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_study_dataset_and_number_of_trials(name, record):
    title = FIGURES[name].draw(FIGURES[name].data(record)).layout.title.text
    assert "mouse_frem · mouse (synthetic) · 13 of 15 trials" in title


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_the_same_each_time(name, record):
    spec = FIGURES[name]
    assert spec.draw(spec.data(record)).to_json() == spec.draw(spec.data(record)).to_json()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_refuses_an_empty_study_with_its_own_name_in_the_message(name):
    with pytest.raises(UsageError, match=rf"^mouse_frem: {name} needs .*\.$"):
        FIGURES[name].data(make_record())


def test_every_figure_stands_in_a_file_of_its_name():
    for name, spec in FIGURES.items():
        assert spec.data.__module__ == spec.draw.__module__ == f"frem_search.figures.{name}"
        assert (spec.data.__name__, spec.draw.__name__) == (f"{name}_data", f"{name}_figure")


def test_importing_the_figures_loads_neither_plotly_nor_optuna_nor_torch():
    heavy = {"plotly", "optuna", "torch", "kaleido", "numpy"}
    code = f"import sys, frem_search.figures.write; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_tpe_scatter_puts_x_across_and_b_up_whatever_else_is_searched(record):
    space = {"lr": {"low": 1e-5, "high": 0.1}, **dict(reversed(B_AND_X.items()))}
    data = tpe_scatter_data(replace(record, contract={"space": space}))
    assert (data.x.name, data.y.name) == ("X", "B")


def test_tpe_scatter_of_other_parameters_takes_the_first_two_numbers():
    space = {"loss": {"choices": ["a", "b"]}, "lr": {"low": 0.1, "high": 1.0}, "width": {"choices": [8, 16]}}
    data = tpe_scatter_data(make_record(make_trial(0, 0.5, loss="a", lr=0.2, width=8), space=space))
    assert (data.x.name, data.y.name) == ("width", "lr")
    assert (data.x.low, data.x.high) == (8, 16)


def test_tpe_scatter_of_one_parameter_is_drawn_against_the_score():
    space = {"lambda": {"low": 0.0, "high": 1.0}, "depth": {"value": 4}}
    data = tpe_scatter_data(make_record(make_trial(0, 0.5, **{"lambda": 0.3257}), space=space))
    figure = tpe_scatter_figure(data)
    assert data.y is None
    assert list(figure.data[0].y) == [0.5]
    assert figure.layout.yaxis.title.text == "mean IoU"


def test_tpe_scatter_of_a_choice_among_words_has_an_axis_of_words():
    space = {"loss": {"choices": ["dice", "ce"]}}
    trials = [make_trial(0, 0.5, loss="ce"), make_trial(1, 0.6, loss="dice")]
    figure = tpe_scatter_figure(tpe_scatter_data(make_record(*trials, space=space)))
    assert figure.layout.xaxis.categoryarray == ("dice", "ce")


def test_tpe_scatter_of_a_study_that_searches_nothing_says_so():
    with pytest.raises(UsageError, match="this study searches nothing"):
        tpe_scatter_data(make_record(make_trial(0, 0.5, B=3), space={"B": {"value": 3}}))


def test_tpe_scatter_axes_are_the_search_space_and_log_where_it_is(record):
    layout = tpe_scatter_figure(tpe_scatter_data(record)).layout
    assert (layout.yaxis.type, layout.xaxis.type) == ("linear", "log")
    assert layout.yaxis.range == pytest.approx((1 - 0.03 * 511, 512 + 0.03 * 511))  # room for points on the bound
    assert layout.xaxis.range == pytest.approx((-0.09, 3.09))
    assert list(layout.xaxis.ticktext) == ["1", "10", "100", "1000"]
    assert list(layout.xaxis.tickvals) == [1, 10, 100, 1000]


def test_a_short_log_axis_has_ticks_between_powers_of_ten_and_a_shorter_one_those_of_plotly():
    space = {"X": {"low": 3.0, "high": 40.0, "log": True}}
    axis = parameter_axis(make_record(make_trial(0, 0.5, X=4.0), space=space), "X")
    assert axis.layout()["ticktext"] == ["5", "10", "20"]
    assert "ticktext" not in axis._replace(high=4.0).layout()


def test_an_axis_reaches_a_trial_enqueued_outside_the_space():
    axis = parameter_axis(make_record(make_trial(0, 0.5, B=0, X=2000.0)), "X")
    assert (axis.low, axis.high) == (1, 2000.0)


def test_tpe_scatter_leaves_out_a_zero_that_a_log_axis_cannot_show():
    data = tpe_scatter_data(make_record(make_trial(0, 0.9, B=3, X=0), make_trial(1, 0.5, B=3, X=1)))
    assert [trial.number for trial in data.complete] == [1]
    assert data.best is None
    assert tpe_scatter_figure(data).layout.annotations == ()


def test_tpe_scatter_draws_a_study_of_which_every_trial_was_pruned():
    data = tpe_scatter_data(make_record(make_trial(0, 0.3, state="pruned", B=3, X=4)))
    assert [trace.name for trace in tpe_scatter_figure(data).data] == ["pruned"]


def test_tpe_scatter_shows_complete_and_pruned_trials_and_no_others(record):
    data = tpe_scatter_data(record)
    assert [trial.number for trial in data.complete] == list(range(12))
    assert [trial.number for trial in data.pruned] == [12]


def test_tpe_scatter_marks_the_best_trial_with_its_numbers(record):
    figure = tpe_scatter_figure(tpe_scatter_data(record))
    star = figure.data[-1]
    assert (star.marker.symbol, list(star.x), list(star.y)) == ("star", [361], [241])
    note = figure.layout.annotations[0]
    assert note.text == "<b>best: trial 6</b><br>B = 241, X = 361<br>mean IoU = 0.5600"
    assert math.isclose(note.x, math.log10(361))


def test_tpe_scatter_tells_number_parameters_score_and_state_under_the_pointer(record):
    complete, pruned, _ = tpe_scatter_figure(tpe_scatter_data(record)).data
    assert complete.hovertext[1] == "<b>trial 1</b><br>B = 41<br>X = 61<br>mean IoU = 0.5100<br>complete"
    assert pruned.hovertext[0].endswith("pruned")
    assert pruned.marker.symbol == "circle-open"


def test_tpe_scatter_goes_from_blue_for_low_to_red_for_high(record):
    scale = tpe_scatter_figure(tpe_scatter_data(record)).data[0].marker.colorscale
    (_, low), (_, high) = scale[0], scale[-1]
    assert int(low[5:7], 16) > int(low[1:3], 16)
    assert int(high[1:3], 16) > int(high[5:7], 16)


def test_one_trial_that_learned_nothing_does_not_take_the_colours_of_all_others():
    trials = [make_trial(i, 0.6 + 0.001 * i, B=i + 1, X=i + 1) for i in range(20)]
    figure = tpe_scatter_figure(tpe_scatter_data(make_record(*trials, make_trial(20, 0.05, B=30, X=30))))
    assert figure.data[0].marker.cmin > 0.55
    assert "1 below" in figure.data[0].marker.colorbar.title.text


WITH_SEED = {**B_AND_X, "seed": {"choices": [0, 1, 2]}}


def repeated_record():
    """Return a study in which two configurations were trained with other seeds: 0.5, 0.6 and 0.1, 0.2, 0.3."""
    trials = [
        make_trial(0, 0.5, B=3, X=4.0, seed=0),
        make_trial(1, 0.1, B=5, X=4.0, seed=0),
        make_trial(2, 0.6, B=3, X=4.0, seed=1),
        make_trial(3, 0.2, B=5, X=4.0, seed=1),
        make_trial(4, 0.3, B=5, X=4.0, seed=2),
        make_trial(5, 0.9, B=9, X=4.0, seed=2),
        make_trial(6, 0.9, B=9, X=4.0, seed=2),  # the same training again
        make_trial(7, 0.2, state="pruned", B=9, X=4.0, seed=1),
    ]
    return make_record(*trials, space=WITH_SEED)


def test_the_spread_over_seeds_is_pooled_over_the_configurations_that_were_repeated():
    spread = seed_spread(repeated_record())
    assert (spread.n_configurations, spread.n_trials, spread.n_degrees) == (2, 5, 3)
    assert math.isclose(spread.sd, math.sqrt((0.005 + 0.02) / 3))


def test_the_pooled_spread_of_equal_groups_is_the_mean_variance():
    groups = generator("groups").normal(size=(7, 4))
    assert math.isclose(pooled(groups.tolist()).sd, math.sqrt(groups.var(axis=1, ddof=1).mean()))


def test_the_scatters_bar_carries_the_spread_over_seeds():
    data = tpe_scatter_data(repeated_record())
    assert data.spread == SeedSpread(math.sqrt(0.025 / 3), 2, 5)
    assert data.subtitle.endswith("5 trials repeat 2 configurations with other seeds")
    text = tpe_scatter_figure(data).data[0].marker.colorbar.title.text
    assert all(line in text for line in ("spread over seeds:", "sd 0.0913 (3 df)", "n = 2 configurations"))


@pytest.mark.parametrize(
    ("seeds", "caption"), [([0, 0], "one seed"), ([0, 1], "several seeds, no configuration repeated")]
)
def test_a_scatter_without_repetitions_says_what_it_knows_of_seeds(seeds, caption):
    trials = [make_trial(i, 0.5 + i / 10, B=i + 1, X=4.0, seed=seed) for i, seed in enumerate(seeds)]
    data = tpe_scatter_data(make_record(*trials, space=WITH_SEED))
    assert (data.spread, data.subtitle.rpartition(" · ")[2]) == (None, caption)
    assert "spread" not in tpe_scatter_figure(data).data[0].marker.colorbar.title.text


def test_the_scatter_of_a_study_with_a_fixed_seed_says_one_seed(record):
    data = tpe_scatter_data(replace(record, contract={"space": {**B_AND_X, "seed": {"value": 3}}}))
    assert data.subtitle.endswith("one seed")


def test_repetitions_show_as_rings_around_the_last_one():
    sizes = tpe_scatter_figure(tpe_scatter_data(repeated_record())).data[0].marker.size
    assert list(sizes) == [18, 24, 12, 18, 12, 18, 12]


def test_a_seed_is_no_axis_of_the_scatter_unless_it_is_all_that_is_searched():
    space = {"seed": {"choices": [0, 1]}, "lambda": {"low": 0.0, "high": 1.0}}
    trial = make_trial(0, 0.5, seed=1, **{"lambda": 0.3})
    data = tpe_scatter_data(make_record(trial, space=space))
    assert (data.x.name, data.y) == ("lambda", None)
    assert tpe_scatter_data(make_record(trial, space={"seed": space["seed"]})).x.name == "seed"


def test_no_label_lies_where_plotly_draws_no_arrow_to_it():
    for x, y in product(range(21), range(21)):
        room = find_room((x / 20, y / 20), [(0.5, 0.5), (0.6, 0.4), (0.4, 0.6)])
        assert room.right_px != room.down_px


def test_history_is_in_the_order_of_the_numbers_and_never_falls():
    trials = [make_trial(i, score) for i, score in enumerate([0.4, 0.6, 0.5, 0.7])]
    data = history_data(make_record(*reversed(trials)))
    assert [trial.number for trial in data.complete] == [0, 1, 2, 3]
    assert data.best_so_far == (0.4, 0.6, 0.6, 0.7)


def test_history_is_not_raised_by_a_pruned_trial():
    data = history_data(make_record(make_trial(0, 0.4), make_trial(1, 0.9, state="pruned"), make_trial(2, 0.5)))
    assert [row["best so far"] for row in data.table()] == [0.4, 0.4, 0.5]
    assert "best: trial 2" in [trace.name for trace in history_figure(data).data]


def test_thinning_keeps_both_ends_and_the_peak():
    whole = Series(tuple(range(1, 2001)), tuple(float(epoch == 1234) for epoch in range(1, 2001)))
    thinned = thin(whole, keeps_highest=True)
    assert len(thinned.epochs) <= MAX_POINTS
    assert {1, 1234, 2000} <= set(thinned.epochs)
    assert list(thinned.epochs) == sorted(set(thinned.epochs))
    assert thinned.values[thinned.epochs.index(1234)] == 1.0


def test_a_short_curve_is_not_thinned():
    whole = Series(tuple(range(MAX_POINTS)), tuple(range(MAX_POINTS)))
    assert thin(whole, keeps_highest=True) == whole


def test_epochs_without_a_number_are_left_out():
    trial = replace(make_trial(0, 0.5), curve={"epoch": [1, 2, 3, 4], "score": [0.1, None, math.nan, 0.4]})
    assert series(trial, "score") == Series((1, 4), (0.1, 0.4))
    assert series(trial, "skip") == Series((), ())


def test_learning_curves_draw_the_best_trial_last():
    data = learning_curves_data(make_record(make_trial(0, 0.7), make_trial(1, 0.5), make_trial(2, None, "running")))
    assert [curve.number for curve in data.curves] == [2, 1, 0]
    assert data.best == 0


def test_learning_curves_mark_the_epoch_of_the_best_score(record):
    figure = learning_curves_figure(learning_curves_data(record))
    assert "mean IoU 0.5600 at epoch 6" in [trace.name for trace in figure.data]


def test_learning_curves_stay_small_with_fifty_trials_of_two_thousand_epochs():
    trials = [make_trial(i, 0.5 + i / 1000, n_epochs=2000, B=i, X=i) for i in range(50)]
    figure = learning_curves_figure(learning_curves_data(make_record(*trials)))
    assert max(len(trace.x) for trace in figure.data) <= MAX_POINTS


def searched_record(score, *, n_trials=60, space=B_AND_X):
    """Return a study of random trials whose scores follow from B, X and noise of standard deviation 1."""
    rng = generator("a study of random trials", n_trials)
    params = [{"B": int(rng.integers(1, 513)), "X": float(10 ** rng.uniform(0, 3))} for _ in range(n_trials)]
    trials = [make_trial(i, score(**each, noise=rng.normal()), **each) for i, each in enumerate(params)]
    return make_record(*trials, space=space)


def test_importance_finds_the_parameter_that_decides():
    data = parameter_importance_data(searched_record(lambda B, X, noise: 0.5 + B / 5120 + 0.02 * noise))
    first, second = data.importances
    assert (first.name, first.verdict, first.p, first.p_holm) == ("B", ABOVE_NOISE, 0.001, 0.002)
    assert first.value > 2 * first.noise[1] > 0
    assert (second.name, second.verdict) == ("X", NOISE)
    assert second.noise[0] < second.value < second.noise[1]


def test_importance_of_noise_is_called_so_in_the_figure_and_in_the_table(tmp_path):
    record = searched_record(lambda B, X, noise: 0.5 + 0.02 * noise)
    data = parameter_importance_data(record)
    assert [each.verdict for each in data.importances] == [NOISE, NOISE]
    figure = parameter_importance_figure(data)
    assert all("not distinguishable from noise" in note.text for note in figure.layout.annotations)
    assert all(f"p = {each.p:.3f}" in figure.layout.annotations[1 - i].text for i, each in enumerate(data.importances))
    path, _ = write_figures(record, tmp_path, only=["parameter_importance"]).paths
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["parameter", "importance", "noise, 5 %", "noise, 95 %", "p", "p (Holm)", "verdict"]
    assert {row["verdict"] for row in rows} == {"not distinguishable from noise"}
    assert float(rows[0]["p (Holm)"]) >= float(rows[0]["p"])


def test_importance_draws_each_bar_on_what_noise_gives():
    data = parameter_importance_data(searched_record(lambda B, X, noise: 0.5 + B / 5120 + 0.02 * noise))
    noise, above, below = parameter_importance_figure(data).data
    assert list(above.y) == ["B"]
    assert list(below.y) == ["X"]
    for each in data.importances:
        i = list(noise.y).index(each.name)
        assert noise.base[i] == each.noise[0]
        assert math.isclose(noise.base[i] + noise.x[i], each.noise[1])
    caption = parameter_importance_figure(data).layout.title.text
    assert "p: of each parameter by itself; words: after Holm's correction" in caption


def test_importance_says_nothing_on_the_terminal(record, capfd):
    parameter_importance_data(record)
    assert capfd.readouterr() == ("", "")


def test_importance_takes_lists_among_choices_and_values_outside_the_space():
    space = {"kernels": {"choices": [[3, 3], [5, 5]]}, "X": {"low": 1, "high": 10}, "B": {"choices": [1, 2]}}
    trials = [make_trial(i, 0.1 * i, kernels=[3, 3] if i % 2 else [5, 5], X=12 - i, B=1) for i in range(6)]
    importances = {each.name: each for each in parameter_importance_data(make_record(*trials, space=space)).importances}
    assert set(importances) == {"kernels", "X", "B"}
    assert importances["B"].verdict == "one value in all trials"
    assert all(-1 <= each.value <= 1 and 0 < each.p <= each.p_holm <= 1 for each in importances.values())


def test_importance_knows_no_order_of_seeds():
    trials = [make_trial(i, 0.5 + 0.01 * i, seed=i % 3, X=1 + i) for i in range(9)]
    spaces = [{"X": B_AND_X["X"], "seed": seed} for seed in ({"low": 0, "high": 2}, {"choices": [2, 0, 1]})]
    in_order, as_choice = (parameter_importance_data(make_record(*trials, space=space)) for space in spaces)
    assert in_order == as_choice


def test_importance_follows_the_order_of_the_numbers(record):
    turned = replace(record, trials=record.trials[::-1])
    assert parameter_importance_data(turned) == parameter_importance_data(record)


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([make_trial(0, 0.5, B=1, X=1)], "needs 2 complete trials, but got 1"),
        ([make_trial(i, 0.5 + i / 10, B=1, X=1) for i in range(3)], "needs a parameter that differs between trials"),
        ([make_trial(i, 0.5, B=i, X=1) for i in range(3)], "needs scores that differ"),
    ],
)
def test_importance_that_cannot_be_told_says_why(trials, reason):
    with pytest.raises(UsageError, match=reason):
        parameter_importance_data(make_record(*trials))


def test_baseline_is_the_best_trial_whose_module_changes_nothing():
    trials = [make_trial(0, 0.5, B=0, X=5), make_trial(1, 0.55, B=9, X=1), make_trial(2, 0.6, B=9, X=9)]
    assert baseline(make_record(*trials)).number == 1
    assert baseline(make_record(trials[2])) is None


def fixed(**values):
    return {name: {"value": value} for name, value in values.items()}


def test_fixed_parameters_of_the_module_count_as_drawn_ones_do():
    trials = [make_trial(0, 0.5, B=0), make_trial(1, 0.6, B=9)]
    searched_b = make_record(*trials, space={"B": B_AND_X["B"]} | fixed(X=50.0))
    assert baseline(searched_b).number == 0
    panels = enhanced_sums_data(searched_b).panels
    assert [(panel.number, panel.maps) for panel in panels] == [(0, "baseline"), (1, "enhanced"), (1, "other")]
    assert panels[1].caption == "enhanced maps (trial 1, B = 9, X = 50)"
    without_factor = make_record(*trials, space={"B": B_AND_X["B"]} | fixed(X=1))
    assert baseline(without_factor).number == 1
    both_fixed = make_record(make_trial(0, 0.5), space=fixed(B=9, X=50.0))
    assert baseline(both_fixed) is None
    assert [panel.maps for panel in enhanced_sums_data(both_fixed).panels] == ["enhanced", "other"]


@pytest.mark.parametrize("space", [{}, fixed(B=0, X=50.0), fixed(B=9, X=1), fixed(B=9), fixed(X=50.0)])
def test_study_whose_module_changes_nothing_has_a_baseline_and_no_enhanced_sums(space):
    record = make_record(make_trial(0, 0.5), space=space)
    assert baseline(record).number == 0
    with pytest.raises(UsageError, match="enhanced_sums needs a complete trial that recorded sums of enhanced maps"):
        enhanced_sums_data(record)


def test_feature_magnitude_shows_the_best_trial_and_the_baseline_once_each():
    trials = [make_trial(0, 0.5, B=0, X=1), make_trial(1, 0.6, B=9, X=9)]
    assert [trial.role for trial in feature_magnitude_data(make_record(*trials)).trials] == ["best", "baseline"]
    assert [trial.role for trial in feature_magnitude_data(make_record(trials[0])).trials] == ["best"]


def test_enhanced_sums_have_the_papers_three_panels_where_there_is_a_baseline():
    trials = [make_trial(0, 0.5, B=0, X=1), make_trial(1, 0.6, B=9, X=9)]
    panels = enhanced_sums_data(make_record(*trials)).panels
    assert [(panel.number, panel.maps) for panel in panels] == [(0, "baseline"), (1, "enhanced"), (1, "other")]
    assert [panel.maps for panel in enhanced_sums_data(make_record(trials[1])).panels] == ["enhanced", "other"]


def test_html_and_csv_are_written_for_every_figure(record, tmp_path):
    written = write_figures(record, tmp_path / "new" / "folder")
    assert [path.name for path in written.paths] == [f"{name}.{end}" for name in FIGURES for end in ("csv", "html")]
    assert (written.notes, written.lacks_pictures) == ([], False)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(
        path.name for path in written.paths
    )


def test_html_opens_offline_and_is_the_same_each_time(record, tmp_path):
    first, second = (write_figures(record, tmp_path / name, only=["history"]).paths[-1] for name in ("a", "b"))
    page = first.read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page
    assert "<title>mouse_frem: history</title>" in page
    assert page == second.read_text()


def test_csv_holds_the_plotted_numbers(record, tmp_path):
    path, _ = write_figures(record, tmp_path, only=["tpe_scatter"]).paths
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    assert rows[6] == {"trial": "6", "state": "complete", "B": "241", "X": "361", "mean IoU": "0.56"}


def test_a_figure_that_is_not_possible_is_skipped_with_its_reason(tmp_path):
    written = write_figures(make_record(make_trial(0, 0.5, B=3, X=4)), tmp_path)
    assert written.notes == [
        "mouse_frem: parameter_importance needs 2 complete trials, but got 1. Let a worker finish more."
    ]
    assert not (tmp_path / "parameter_importance.html").exists()


def test_a_figure_that_is_not_possible_but_asked_for_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="needs 2 complete trials"):
        write_figures(make_record(make_trial(0, 0.5)), tmp_path / "out", only=["history", "parameter_importance"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"only": ["tpe_scater"]}, r"Unknown figure 'tpe_scater'. Did you mean 'tpe_scatter'\? Known: tpe_scatter, "),
        ({"formats": ["pngg"]}, r"Unknown format 'pngg'. Did you mean 'png'\? Known: html, png, svg, pdf\."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(record, tmp_path, asked, message):
    with pytest.raises(UsageError, match=message):
        write_figures(record, tmp_path, **asked)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(record, tmp_path, monkeypatch):
    (tmp_path / "history.csv").write_text("old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_figures(record, tmp_path, only=["history"])
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]
    assert (tmp_path / "history.csv").read_text() == "old"


@needs_chrome
def test_pictures_are_what_their_names_say(record, tmp_path):
    written = write_figures(record, tmp_path, formats=["png", "svg", "pdf"], only=["tpe_scatter", "history"])
    starts = {path.name: path.read_bytes()[:5] for path in written.paths}
    assert starts["history.png"] == b"\x89PNG\r"
    assert starts["history.svg"] == b"<svg "
    assert starts["history.pdf"] == b"%PDF-"
    assert len(starts) == 8
    assert not written.lacks_pictures


@needs_chrome
def test_a_png_has_twice_the_pixels_of_the_layout(record, tmp_path):
    _, png = write_figures(record, tmp_path, formats=["png"], only=["history"]).paths
    header = png.read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1800, 1280)


def test_without_a_browser_one_sentence_says_how_to_get_one_and_html_is_written(record, tmp_path, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("choreographer.browsers.Chromium.find_browser", lambda **_: None)
    written = write_figures(record, tmp_path, formats=["png"], only=["history"])
    assert [path.name for path in written.paths] == ["history.csv", "history.html"]
    assert written.lacks_pictures
    assert written.notes == [
        "PNG, SVG and PDF need a Chrome or Chromium, but none was found: install the Debian or Ubuntu package chromium "
        "or Google Chrome, or run plotly_get_chrome."
    ]


def test_a_browser_path_that_is_no_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    with pytest.raises(ChromeNotFoundError, match=r"BROWSER_PATH=.*chrome is no program"):
        find_chrome()


def test_a_browser_that_does_not_start_is_named_and_html_is_written(record, tmp_path, monkeypatch):
    broken = tmp_path / "chrome"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    written = write_figures(record, tmp_path / "out", formats=["pdf"], only=["history"])
    assert written.lacks_pictures
    assert str(broken) in written.notes[0]
    assert (tmp_path / "out" / "history.html").exists()
