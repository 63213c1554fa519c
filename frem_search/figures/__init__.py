"""The figures of a study, each a pair of functions: what is drawn as plain data, then the drawing of it.

Nothing here imports plotly or optuna until a figure is drawn, so that the command can list the names at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from frem_search.figures.enhanced_sums import enhanced_sums_data, enhanced_sums_figure
from frem_search.figures.feature_magnitude import feature_magnitude_data, feature_magnitude_figure
from frem_search.figures.history import history_data, history_figure
from frem_search.figures.learning_curves import learning_curves_data, learning_curves_figure
from frem_search.figures.parameter_importance import parameter_importance_data, parameter_importance_figure
from frem_search.figures.tpe_scatter import tpe_scatter_data, tpe_scatter_figure
from frem_search.study.record import StudyRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class FigureData(Protocol):
    """What a figure shows, as numbers."""

    def table(self) -> list[dict[str, Any]]:
        """Return the plotted numbers, one dict of the same keys per row."""


class FigureSpec(NamedTuple):
    """One figure.

    Args:
        data: Takes what is plotted from a study; raises UsageError where the study does not have it.
        draw: Draws what `data` returned.
        title: One line for the docs and for help.
    """

    data: Callable[[StudyRecord], FigureData]
    draw: Callable[[Any], "Figure"]
    title: str


FIGURES: dict[str, FigureSpec] = {
    "tpe_scatter": FigureSpec(
        tpe_scatter_data, tpe_scatter_figure, "The parameters that were tried, coloured by score (FREM, Figs 7 and 8)"
    ),
    "history": FigureSpec(history_data, history_figure, "The score of each trial and the best one so far"),
    "learning_curves": FigureSpec(
        learning_curves_data, learning_curves_figure, "Validation score and training loss of every trial per epoch"
    ),
    "parameter_importance": FigureSpec(
        parameter_importance_data,
        parameter_importance_figure,
        "How well each parameter foretells the score, and how well on noise",
    ),
    "feature_magnitude": FigureSpec(
        feature_magnitude_data,
        feature_magnitude_figure,
        "Features at the bottleneck and at the skip connection per epoch (FREM, Fig. 3)",
    ),
    "enhanced_sums": FigureSpec(
        enhanced_sums_data, enhanced_sums_figure, "Sums of enhanced and of other maps per epoch (FREM, Fig. 9)"
    ),
}
