"""The score of each trial in the order of the trials, and the best score so far."""

from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.labels import describe, impossible, score_label, subtitle
from frem_search.figures.style import BLUE, GREY, INK, ORANGE, dress
from frem_search.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class HistoryData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        score: The score's name on an axis.
        searched: The searched parameters in the study file's order.
        complete: The trials that have a score, in the order of their numbers.
        pruned: The trials that were stopped early and have reported a score.
        best_so_far: The highest score among the complete trials up to and with each one of them.
        best: The best of the complete trials.
    """

    subtitle: str
    score: str
    searched: tuple[str, ...]
    complete: tuple[TrialRecord, ...]
    pruned: tuple[TrialRecord, ...]
    best_so_far: tuple[float, ...]
    best: TrialRecord | None

    def table(self) -> list[dict[str, Any]]:
        """Return one row per trial; a pruned trial does not move the best so far."""
        so_far = {trial.number: best for trial, best in zip(self.complete, self.best_so_far, strict=True)}
        rows: list[dict[str, Any]] = []
        best: float | None = None
        for trial in sorted([*self.complete, *self.pruned], key=lambda trial: trial.number):
            best = so_far.get(trial.number, best)
            rows.append({"trial": trial.number, "state": trial.state, self.score: trial.value, "best so far": best})
        return rows


def history_data(record: StudyRecord) -> HistoryData:
    """Take the scores in the order of the trials' numbers."""
    valued = sorted((trial for trial in record.trials if trial.value is not None), key=lambda trial: trial.number)
    complete = tuple(trial for trial in valued if trial.state == "complete")
    pruned = tuple(trial for trial in valued if trial.state == "pruned")
    if not complete and not pruned:
        remedy = "Let a worker finish one"
        raise impossible(record, "history", needs="a trial with a score", got="there is none yet", remedy=remedy)
    best_so_far = tuple(accumulate((trial.value for trial in complete if trial.value is not None), max))
    label = score_label(record.score)
    return HistoryData(subtitle(record), label, record.searched, complete, pruned, best_so_far, record.best)


def history_figure(data: HistoryData) -> "Figure":
    """Draw the scores as points and the best so far as steps."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": data.score}}})
    steps, heights = [trial.number for trial in data.complete], list(data.best_so_far)
    last = max([*steps, *(trial.number for trial in data.pruned)])
    if steps and last > steps[-1]:
        steps, heights = [*steps, last], [*heights, heights[-1]]
    line = {"shape": "hv", "color": ORANGE, "width": 2.5}
    figure.add_trace(go.Scatter(x=steps, y=heights, mode="lines", line=line, name="best so far", hoverinfo="skip"))
    marker: dict[str, Any] = {"size": 10, "color": BLUE, "opacity": 0.85, "line": {"width": 0.8, "color": "white"}}
    figure.add_trace(go.Scatter(points(data, data.complete), name="complete", marker=marker, cliponaxis=False))
    if data.pruned:
        marker = {"symbol": "circle-open", "size": 10, "color": GREY, "line": {"width": 1.8}}
        figure.add_trace(go.Scatter(points(data, data.pruned), name="pruned", marker=marker, cliponaxis=False))
    if data.best:
        marker = {"symbol": "star", "size": 19, "color": ORANGE, "line": {"width": 1.2, "color": INK}}
        name = f"best: trial {data.best.number}"
        figure.add_trace(go.Scatter(points(data, (data.best,)), name=name, marker=marker, cliponaxis=False))
    dress(figure, "Score of each trial", subtitle=data.subtitle)
    ticks: dict[str, Any] = {"dtick": 1} if last < 12 else {"tickformat": "d"}
    figure.update_xaxes(range=[-0.02 * last - 0.5, 1.02 * last + 0.5], showgrid=False, **ticks)
    return figure


def points(data: HistoryData, trials: tuple[TrialRecord, ...]) -> dict[str, Any]:
    """Return where trials lie and what they say under the pointer, as plotly takes it."""
    return {
        "x": [trial.number for trial in trials],
        "y": [trial.value for trial in trials],
        "mode": "markers",
        "hovertext": [describe(trial, score=data.score, names=data.searched) for trial in trials],
        "hoverinfo": "text",
    }
