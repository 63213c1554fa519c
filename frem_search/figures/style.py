"""How every figure looks: size, fonts, colours, grid."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDTH = 900
HEIGHT = 640

INK = "#1f2430"
MUTED = "#5d6470"
GRID = "#e6e8ec"
# Okabe and Ito's palette, told apart with every common colour blindness.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREY = "#9aa0a8"

# FREM's Figs 7 and 8 ask for blue = low, red = high. Moreland's diverging map keeps the middle grey, where a plain
# blend would be a purple that looks like both ends.
BLUE_TO_RED = [[0.0, "#3b4cc0"], [0.25, "#8db0fe"], [0.5, "#d8d8d8"], [0.75, "#f4987a"], [1.0, "#b40426"]]

FONT = "Inter, Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"


def dress(figure: "Figure", title: str, *, subtitle: str, height: int = HEIGHT) -> "Figure":
    """Give a figure its title and the look of all figures; return it."""
    axis: dict[str, Any] = {
        "showline": True,
        "mirror": True,
        "linecolor": MUTED,
        "linewidth": 1,
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": MUTED,
        "ticklen": 5,
        "title": {"standoff": 12, "font": {"size": 16}},
        "automargin": True,
    }
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(
        template="none",
        width=WIDTH,
        height=height,
        margin={"l": 80, "r": 40, "t": 88, "b": 80},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 14, "color": INK},
        title={
            "text": f"<b>{title}</b><br><span style='font-size: 14px; color: {MUTED}'>{subtitle}</span>",
            "font": {"size": 20},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1 - 38 / height,
            "yanchor": "top",
        },
        # Below the axes there is room for as many entries as a figure has.
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": -64 / (height - 168),
            "yanchor": "top",
            "font": {"size": 13},
        },
        hoverlabel={"bgcolor": "white", "bordercolor": MUTED, "font": {"family": FONT, "size": 13, "color": INK}},
        hovermode="closest",
    )
    return figure


def color_bar(label: str, scores: list[float], *, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the part of a marker that colours scores from blue to red and explains it in a bar.

    Args:
        label: The score's name.
        scores: What is coloured.
        notes: Lines in small letters below the label.
    """
    low, high = color_range(scores)
    n_below = sum(score < low for score in scores)
    small = [f"{n_below} below {low:.3f}"] if n_below else []
    title = "<br>".join([label, *(f"<span style='font-size: 12px'>{line}</span>" for line in [*small, *notes])])
    bar = {"title": {"text": title}, "thickness": 16, "outlinewidth": 0, "tickformat": ".3f"}
    return {"colorscale": BLUE_TO_RED, "cmin": low, "cmax": high, "colorbar": bar, "showscale": True}


def color_range(scores: list[float]) -> tuple[float, float]:
    """Return the scores at the two ends of the colours.

    A few trials that failed to learn would paint all others in one red: what lies far below the middle half of the
    scores takes the lowest colour.

    >>> color_range([0.1, 0.58, 0.59, 0.6, 0.61, 0.62])
    (0.545, 0.62)
    """
    import numpy as np

    low, high = min(scores), max(scores)
    quarter, three_quarters = np.quantile(scores, [0.25, 0.75])
    low = max(low, round(float(quarter - 1.5 * (three_quarters - quarter)), 4))
    return (low, high) if low < high else (low - 0.005, high + 0.005)
