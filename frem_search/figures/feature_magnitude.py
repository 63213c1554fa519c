"""Mean absolute features at the bottleneck and at the skip connection it is concatenated with, per epoch.

Source: FREM, Fig. 3.
Differs: besides the trained network of a baseline, the best trial is shown, and every epoch of training.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.curves import Series, baseline, rows_of, scale_type, series
from frem_search.figures.labels import impossible, subtitle
from frem_search.figures.style import BLUE, ORANGE, dress
from frem_search.study.record import StudyRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class Magnitudes(NamedTuple):
    """One trial's magnitudes.

    Args:
        number: The trial.
        role: "best" or "baseline".
        bottleneck: Mean absolute value at the bottleneck, before enhancement.
        skip: Mean absolute value at the skip connection.
    """

    number: int
    role: str
    bottleneck: Series
    skip: Series


class FeatureMagnitudeData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        trials: The best trial, and a baseline where the study has one.
    """

    subtitle: str
    trials: tuple[Magnitudes, ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per plotted point."""
        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            rows += rows_of(trial.number, "bottleneck", trial.bottleneck)
            rows += rows_of(trial.number, "skip connection", trial.skip)
        return rows


def feature_magnitude_data(record: StudyRecord) -> FeatureMagnitudeData:
    """Take the magnitudes of the best trial and of a baseline."""
    best, plain = record.best, baseline(record)
    roles = [(best, "best"), (plain if plain != best else None, "baseline")]
    taken = [
        Magnitudes(trial.number, role, series(trial, "bottleneck"), series(trial, "skip"))
        for trial, role in roles
        if trial
    ]
    trials = tuple(trial for trial in taken if trial.bottleneck.epochs and trial.skip.epochs)
    if not trials:
        needs, remedy = "a complete trial that recorded its features", "Search a network that reports them"
        raise impossible(record, "feature_magnitude", needs=needs, got="there is none", remedy=remedy)
    return FeatureMagnitudeData(subtitle(record), trials)


def feature_magnitude_figure(data: FeatureMagnitudeData) -> "Figure":
    """Draw the place by colour and the trial by line style."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for trial in data.trials:
        suffix = f", {trial.role} (trial {trial.number})"
        dash, width = ("solid", 2.2) if trial.role == "best" else ("dot", 1.6)
        for place, one, color in [("skip connection", trial.skip, ORANGE), ("bottleneck", trial.bottleneck, BLUE)]:
            figure.add_scatter(
                x=list(one.epochs),
                y=list(one.values),
                mode="lines" if len(one.epochs) > 1 else "markers",
                line={"color": color, "width": width, "dash": dash},
                marker={"color": color},
                name=place + suffix,
                hovertemplate=f"epoch %{{x}}: %{{y:.4g}}<extra>{place}{suffix}</extra>",
            )
    dress(figure, "Feature magnitude at the bottleneck and at the skip connection", subtitle=data.subtitle)
    values = [value for trial in data.trials for one in (trial.bottleneck, trial.skip) for value in one.values]
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="mean absolute feature", type=scale_type(values), rangemode="tozero")
    return figure
