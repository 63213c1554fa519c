"""Sums of the bottleneck's maps per epoch: without the module, of the enhanced maps, of the maps not enhanced.

Source: FREM, Fig. 9, whose three panels these are.
Differs: panel (a) is there only where the study has a trial whose module changes nothing.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.curves import Series, baseline, enhances, full_params, rows_of, series
from frem_search.figures.labels import format_value, impossible, subtitle
from frem_search.figures.style import BLUE, GREY, MUTED, ORANGE, dress
from frem_search.study.record import StudyRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLORS = {"baseline": GREY, "enhanced": ORANGE, "other": BLUE}


class Panel(NamedTuple):
    """One panel.

    Args:
        number: The trial.
        maps: "baseline", "enhanced" or "other".
        caption: What the panel shows, in the paper's order.
        sums: Sum of the maps per epoch.
    """

    number: int
    maps: str
    caption: str
    sums: Series


class EnhancedSumsData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        panels: Two or three panels, from above.
    """

    subtitle: str
    panels: tuple[Panel, ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per plotted point."""
        return [row for panel in self.panels for row in rows_of(panel.number, f"{panel.maps} maps", panel.sums)]


def enhanced_sums_data(record: StudyRecord) -> EnhancedSumsData:
    """Take the sums of the best trial and, where there is one, of a baseline."""
    plain = baseline(record)
    enhancing = [trial for trial in record.complete if trial.value is not None and series(trial, "enhanced_sum").epochs]
    enhancing = [trial for trial in enhancing if enhances(record, trial)]
    if not enhancing:
        needs, remedy = "a complete trial that recorded sums of enhanced maps", "Search a network with the module"
        raise impossible(record, "enhanced_sums", needs=needs, got="there is none", remedy=remedy)
    best = max(enhancing, key=lambda trial: (trial.value, -trial.number))
    params = full_params(record, best)
    setting = f"trial {best.number}, " + ", ".join(f"{name} = {format_value(params[name])}" for name in ("B", "X"))
    panels = [
        Panel(best.number, "enhanced", f"enhanced maps ({setting})", series(best, "enhanced_sum")),
        Panel(best.number, "other", f"maps not enhanced ({setting})", series(best, "other_sum")),
    ]
    if plain:
        caption = f"without the module (trial {plain.number})"
        panels.insert(0, Panel(plain.number, "baseline", caption, series(plain, "other_sum")))
    return EnhancedSumsData(subtitle(record), tuple(panel for panel in panels if panel.sums.epochs))


def enhanced_sums_figure(data: EnhancedSumsData) -> "Figure":
    """Draw the panels one above the other, as their sums differ by how many maps they hold."""
    from plotly.subplots import make_subplots

    n = len(data.panels)
    captions = [f"({letter}) {panel.caption}" for letter, panel in zip("abc", data.panels, strict=False)]
    figure = make_subplots(rows=n, cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=captions)
    for row, panel in enumerate(data.panels, start=1):
        figure.add_scatter(
            x=list(panel.sums.epochs),
            y=list(panel.sums.values),
            mode="lines" if len(panel.sums.epochs) > 1 else "markers",
            line={"color": COLORS[panel.maps], "width": 1.8},
            marker={"color": COLORS[panel.maps]},
            name=panel.caption,
            showlegend=False,
            hovertemplate=f"epoch %{{x}}: %{{y:.4g}}<extra>{panel.caption}</extra>",
            row=row,
            col=1,
        )
    figure.update_annotations(x=0, xanchor="left", font={"size": 14, "color": MUTED})
    dress(figure, "Sums of feature maps at the bottleneck", subtitle=data.subtitle, height=200 + 200 * n)
    figure.update_layout(margin_t=112)
    figure.update_yaxes(title_text="sum", rangemode="tozero")
    figure.update_xaxes(title_text="epoch", row=n, col=1)
    return figure
