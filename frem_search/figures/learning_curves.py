"""Validation score and training loss of every trial per epoch, the best trial in front with IoU and loss of both."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.curves import Series, rows_of, scale_type, series
from frem_search.figures.labels import format_score, impossible, score_label, subtitle
from frem_search.figures.style import BLUE_TO_RED, GREY, INK, color_bar, color_range, dress
from frem_search.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter


class Curve(NamedTuple):
    """One trial's curves.

    Args:
        number: The trial.
        state: The trial's state.
        final: The trial's score, or None where it has none yet.
        score: Validation score per epoch.
        loss: Training loss per epoch.
        train_iou: Mean IoU of the pixels that were trained on, as they were taken for in the steps of the epoch.
        val_loss: Loss of the validation images, of the final output alone.
    """

    number: int
    state: str
    final: float | None
    score: Series
    loss: Series
    train_iou: Series
    val_loss: Series


class LearningCurvesData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        score: The score's name on an axis.
        curves: The trials that have a curve, from the lowest score to the highest.
        best: The number of the best trial, if it has a curve.
    """

    subtitle: str
    score: str
    curves: tuple[Curve, ...]
    best: int | None

    def table(self) -> list[dict[str, Any]]:
        """Return one row per plotted point, in the order of the trials' numbers."""
        rows: list[dict[str, Any]] = []
        for curve in sorted(self.curves, key=lambda curve: curve.number):
            rows += rows_of(curve.number, self.score, curve.score)
            rows += rows_of(curve.number, "training loss", curve.loss)
            rows += rows_of(curve.number, "training IoU", curve.train_iou)
            rows += rows_of(curve.number, "validation loss", curve.val_loss)
        return rows


def learning_curves_data(record: StudyRecord) -> LearningCurvesData:
    """Take the curves of all trials that have reported an epoch."""
    taken = [take_curve(trial) for trial in record.trials]
    curves = [curve for curve in taken if curve.score.epochs or curve.loss.epochs]
    if not curves:
        needs, remedy = "a trial with a reported epoch", "Let a worker train one"
        raise impossible(record, "learning_curves", needs=needs, got="there is none yet", remedy=remedy)
    # What is drawn last lies in front.
    curves.sort(key=lambda curve: (curve.final is not None, curve.final or 0.0, -curve.number))
    best = record.best.number if record.best and record.best.number in {curve.number for curve in curves} else None
    return LearningCurvesData(subtitle(record), score_label(record.score), tuple(curves), best)


def take_curve(trial: TrialRecord) -> Curve:
    """Return a trial's four series."""
    return Curve(
        trial.number,
        trial.state,
        trial.value,
        score=series(trial, "score", keeps_highest=True),
        loss=series(trial, "train_loss"),
        train_iou=series(trial, "train_iou"),
        val_loss=series(trial, "val_loss"),
    )


def learning_curves_figure(data: LearningCurvesData) -> "Figure":
    """Draw the scores above the losses, thin and coloured by the final score, the best trial thick."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    finals = [curve.final for curve in data.curves if curve.final is not None]
    others = [curve for curve in data.curves if curve.number != data.best]
    for curve in others:
        line = {"color": color_of(curve.final, finals), "width": 1}
        figure.add_traces(lines(curve, data.score, line=line, opacity=0.6), [1, 2], [1, 1])
    for curve in data.curves:
        if curve.number == data.best:
            traces = lines(curve, data.score, line={"color": INK, "width": 2}, opacity=1.0)
            traces[0].update(name=f"best: trial {curve.number}", showlegend=True)
            figure.add_traces(traces, [1, 2], [1, 1])
            for row, trace in others_of_best(curve):
                figure.add_trace(trace, row, 1)
            figure.add_trace(peak(curve, data.score), 1, 1)
    if finals and others:
        figure.add_trace(bar_trace(data.score, finals), 1, 1)
    dress(figure, "Learning curves of all trials", subtitle=data.subtitle, height=760)
    losses = [value for curve in data.curves for value in curve.loss.values]
    losses += [value for curve in data.curves if curve.number == data.best for value in curve.val_loss.values]
    figure.update_yaxes(title_text=data.score, row=1, col=1)
    figure.update_yaxes(title_text="loss", type=scale_type(losses), row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    return figure


def lines(curve: Curve, score: str, *, line: dict[str, Any], opacity: float) -> "list[Scatter]":
    """Return a trial's two lines, score first."""
    import plotly.graph_objects as go

    title = f"<b>trial {curve.number}</b> ({curve.state}), {score} {format_score(curve.final)}"
    return [
        go.Scatter(
            x=list(one.epochs),
            y=list(one.values),
            # A trial of a single epoch would be a line without length.
            mode="lines" if len(one.epochs) > 1 else "markers",
            line=line,
            marker={"color": line["color"], "size": 4},
            opacity=opacity,
            name=f"trial {curve.number}",
            showlegend=False,
            hovertemplate=f"{title}<br>epoch %{{x}}: {quantity} %{{y:.4f}}<extra></extra>",
        )
        for one, quantity in [(curve.score, score), (curve.loss, "training loss")]
    ]


def others_of_best(curve: Curve) -> "Iterator[tuple[int, Scatter]]":
    """Yield the best trial's other lines, dotted, and the row of each."""
    import plotly.graph_objects as go

    drawn = ((1, curve.train_iou, "its training IoU"), (2, curve.val_loss, "its validation loss, final output alone"))
    for row, one, quantity in drawn:
        if one.epochs:  # an earlier version did not store them
            yield (
                row,
                go.Scatter(
                    x=list(one.epochs),
                    y=list(one.values),
                    mode="lines" if len(one.epochs) > 1 else "markers",
                    line={"color": INK, "width": 1.5, "dash": "dot"},
                    marker={"color": INK, "size": 4},
                    name=quantity,
                    hovertemplate=f"trial {curve.number}<br>epoch %{{x}}: {quantity} %{{y:.4f}}<extra></extra>",
                ),
            )


def peak(curve: Curve, score: str) -> "Scatter":
    """Return the mark on the epoch of the highest score."""
    import plotly.graph_objects as go

    highest = max(curve.score.values, default=None)
    epochs = [] if highest is None else [curve.score.epochs[curve.score.values.index(highest)]]
    return go.Scatter(
        x=epochs,
        y=[highest] if epochs else [],
        mode="markers",
        marker={"symbol": "star", "size": 17, "color": BLUE_TO_RED[-1][1], "line": {"width": 1.2, "color": INK}},
        name=f"{score} {format_score(highest)} at epoch {epochs[0]}" if epochs else "",
        hoverinfo="name",
        showlegend=bool(epochs),
    )


def color_of(score: float | None, finals: list[float]) -> str:
    """Return the colour of a line: that of its final score, or grey where it has none."""
    from plotly.colors import sample_colorscale

    if score is None:
        return GREY
    low, high = color_range(finals)
    return sample_colorscale(BLUE_TO_RED, [min(max((score - low) / (high - low), 0.0), 1.0)])[0]


def bar_trace(score: str, finals: list[float]) -> "Scatter":
    """Return a trace of no points that carries the bar explaining the lines' colours."""
    import plotly.graph_objects as go

    marker = {"color": [finals[0]], **color_bar(f"final<br>{score}", finals)}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")
