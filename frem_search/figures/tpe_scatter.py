"""The parameters that were tried, one point per trial, blue where the score is low and red where it is high.

Source: FREM, Figs 7 and 8 (X across, B up).
Differs: the best trial is marked, pruned trials are hollow, the axes span the whole search space, and where a study
repeats configurations with other seeds the bar tells how far their scores lie apart.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.axes import Axis, is_numeric, parameter_axis
from frem_search.figures.label_place import find_room
from frem_search.figures.labels import describe, format_score, format_value, impossible, score_label, subtitle
from frem_search.figures.seed_spread import SEED, SeedSpread, seed_spread, seeds_line
from frem_search.figures.style import BLUE_TO_RED, GREY, INK, color_bar, dress
from frem_search.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter


class TpeScatterData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset, number of trials, and whether they share a seed.
        score: The score's name on an axis.
        searched: The searched parameters in the study file's order.
        x: The parameter across.
        y: The parameter up; None where only one can be drawn, against the score.
        complete: The trials that have a score, in the order of their numbers.
        pruned: The trials that were stopped early, in the order of their numbers.
        best: The best of the complete trials.
        spread: How far scores lie apart of which only the seed differs; None where that is not known.
    """

    subtitle: str
    score: str
    searched: tuple[str, ...]
    x: Axis
    y: Axis | None
    complete: tuple[TrialRecord, ...]
    pruned: tuple[TrialRecord, ...]
    best: TrialRecord | None
    spread: SeedSpread | None

    def table(self) -> list[dict[str, Any]]:
        """Return one row per point, in the order of the trials' numbers."""
        points = sorted([*self.complete, *self.pruned], key=lambda trial: trial.number)
        return [
            {"trial": trial.number, "state": trial.state}
            | {name: trial.params.get(name) for name in self.searched}
            | {self.score: trial.value}
            for trial in points
        ]


def tpe_scatter_data(record: StudyRecord) -> TpeScatterData:
    """Take the trials and the two parameters to draw: X and B, or else the first two searched numbers."""
    if not record.searched:
        raise impossible(
            record,
            "tpe_scatter",
            needs="a searched parameter",
            got="this study searches nothing: every parameter has one value",
            remedy="Give a parameter a list or a range in the study file",
        )
    x, y = choose_axes(record)
    axes = [x] if y is None else [x, y]
    drawn = [trial for trial in record.trials if all(axis.can_show(trial.params.get(axis.name)) for axis in axes)]
    complete = tuple(trial for trial in drawn if trial.state == "complete" and trial.value is not None)
    # Over one parameter the score is an axis, where a trial without a score has no place.
    pruned = tuple(trial for trial in drawn if trial.state == "pruned" and (y is not None or trial.value is not None))
    if not complete and not pruned:
        remedy = "Let a worker finish one"
        raise impossible(record, "tpe_scatter", needs="a finished trial", got="there is none yet", remedy=remedy)
    best = record.best if record.best in complete else None
    spread = seed_spread(record)
    line, score = f"{subtitle(record)} · {seeds_line(record, spread)}", score_label(record.score)
    return TpeScatterData(line, score, record.searched, x, y, complete, pruned, best, spread)


def choose_axes(record: StudyRecord) -> tuple[Axis, Axis | None]:
    """Return the parameter across and the one up; None where a study has only one to show.

    A seed is shown only where nothing else is searched: there is no order in seeds.
    """
    searched = [name for name in record.searched if name != SEED] or list(record.searched)
    numeric = [name for name in searched if is_numeric(record.contract["space"][name])]
    if {"B", "X"} <= set(numeric):
        numeric = ["B", "X"]
    if len(numeric) >= 2:
        return parameter_axis(record, numeric[1]), parameter_axis(record, numeric[0])
    return parameter_axis(record, [*numeric, *searched][0]), None


def tpe_scatter_figure(data: TpeScatterData) -> "Figure":
    """Draw the trials over the search space."""
    import plotly.graph_objects as go

    up = data.y.layout() if data.y else {"title": {"text": data.score}}
    against = data.y.name if data.y else data.score
    figure = go.Figure(layout={"xaxis": data.x.layout(), "yaxis": up})
    if data.complete:
        figure.add_trace(complete_points(data))
    if data.pruned:
        marker = {"symbol": "circle-open", "size": 11, "color": GREY, "line": {"width": 1.8}}
        figure.add_trace(go.Scatter(points(data, data.pruned), name="pruned", marker=marker, cliponaxis=False))
    if data.best:
        marker = {"symbol": "star", "size": 21, "color": BLUE_TO_RED[-1][1], "line": {"width": 1.2, "color": INK}}
        figure.add_trace(go.Scatter(points(data, (data.best,)), name="best", marker=marker, cliponaxis=False))
        figure.add_annotation(best_note(data, data.best))
    dress(figure, f"{against} against {data.x.name}, trial by trial", subtitle=data.subtitle)
    return figure


def points(data: TpeScatterData, trials: tuple[TrialRecord, ...]) -> dict[str, Any]:
    """Return where trials lie and what they say under the pointer, as plotly takes it."""
    return {
        "x": [data.x.place(trial.params[data.x.name]) for trial in trials],
        "y": [data.y.place(trial.params[data.y.name]) if data.y else trial.value for trial in trials],
        "mode": "markers",
        "hovertext": [describe(trial, score=data.score, names=data.searched) for trial in trials],
        "hoverinfo": "text",
    }


def complete_points(data: TpeScatterData) -> "Scatter":
    """Return the trials that have a score, coloured by it, with the bar that explains the colours."""
    import plotly.graph_objects as go

    scores = [trial.value for trial in data.complete if trial.value is not None]
    bar = color_bar(data.score, scores, notes=spread_notes(data.spread) if data.spread else ())
    drawn = points(data, data.complete)
    sizes = ring_sizes(list(zip(drawn["x"], drawn["y"], strict=True)))
    marker = {"size": sizes, "opacity": 1.0, "color": scores, "line": {"width": 0.8, "color": INK}, **bar}
    return go.Scatter(drawn, name="complete", marker=marker, cliponaxis=False)


def ring_sizes(places: Sequence[Hashable]) -> list[int]:
    """Return the size of each point, larger than what is drawn later at the same place, so that all of them show.

    >>> ring_sizes(["a", "b", "a", "a"])
    [24, 12, 18, 12]
    """
    n_later: Counter[Hashable] = Counter()
    sizes = []
    for place in reversed(places):
        sizes.append(12 + 6 * min(n_later[place], 4))
        n_later[place] += 1
    return sizes[::-1]


def spread_notes(spread: SeedSpread) -> tuple[str, ...]:
    """Return what stands above the bar of colours about scores of which only the seed differs.

    >>> spread_notes(SeedSpread(0.0123, 4, 12))
    ('spread over seeds:', 'sd 0.0123 (8 df),', 'n = 4 configurations')
    """
    n = spread.n_configurations
    return (
        "spread over seeds:",
        f"sd {spread.sd:.3g} ({spread.n_degrees} df),",
        f"n = {n} configuration{'s' if n > 1 else ''}",
    )


def best_note(data: TpeScatterData, best: TrialRecord) -> dict[str, Any]:
    """Return the label of the best trial, where it covers the fewest other trials."""
    values = [(axis.name, best.params[axis.name]) for axis in (data.y, data.x) if axis]
    parts = [f"{name} = {format_value(value)}" for name, value in values]
    others = [trial for trial in [*data.complete, *data.pruned] if trial != best]
    room = find_room(fractions(data, best), [fractions(data, trial) for trial in others])
    return {
        "x": data.x.place_note(best.params[data.x.name]),
        "y": data.y.place_note(best.params[data.y.name]) if data.y else best.value,
        "text": f"<b>best: trial {best.number}</b><br>{', '.join(parts)}<br>{data.score} = {format_score(best.value)}",
        "align": "left",
        "ax": room.right_px,
        "ay": room.down_px,
        "xanchor": "left" if room.right_px > 0 else "right",
        "yanchor": "bottom" if room.down_px < 0 else "top",
        "arrowhead": 0,
        "arrowwidth": 1.2,
        "arrowcolor": INK,
        "standoff": 9,
        "bgcolor": "rgba(255,255,255,0.9)",
        "bordercolor": GREY,
        "borderpad": 5,
        "font": {"size": 13},
    }


def fractions(data: TpeScatterData, trial: TrialRecord) -> tuple[float, float]:
    """Return where a trial lies on the two axes, from 0 to 1."""
    across = data.x.fraction(trial.params[data.x.name])
    if data.y:
        return across, data.y.fraction(trial.params[data.y.name])
    scores = [trial.value for trial in [*data.complete, *data.pruned] if trial.value is not None]
    # Plotly leaves about a twentieth free above and below the scores.
    height = ((trial.value or 0.0) - min(scores)) / ((max(scores) - min(scores)) or 1.0)
    return across, 0.05 + 0.9 * height
