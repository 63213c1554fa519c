"""The figure of a bench: trials an hour as bars, with the range over the rounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.bench.report import LEFT_OUT, decimals
from frem_search.bench.result import Bench, Row, Spread
from frem_search.errors import ChromeNotFoundError
from frem_search.figures.pictures import PICTURE_FORMATS, draw_pictures
from frem_search.figures.style import BLUE, GREY, INK, dress
from frem_search.figures.write import FORMATS, Written, check_names, csv_bytes, html_bytes
from frem_search.system.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NAME = "bench"
BAR_PX = 34
AROUND_PX = 200  # title, axis and its label


class Bar(NamedTuple):
    """A row of the bench.

    Args:
        name: Who trained, and in which precision.
        is_plain: Whether by the plain loop.
        trials_per_hour: Median and range over the rounds; None if it could not be run.
        ratio: To the plain loop, median and range.
    """

    name: str
    is_plain: bool
    trials_per_hour: Spread | None
    ratio: Spread | None


class BenchData(NamedTuple):
    """What the figure shows.

    Args:
        study: The study's name.
        subtitle: Study, dataset and device.
        bars: From top to bottom.
    """

    study: str
    subtitle: str
    bars: tuple[Bar, ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per bar."""
        rows: list[dict[str, Any]] = []
        for bar in self.bars:
            median, low, high = bar.trials_per_hour or (None, None, None)
            ratio, ratio_low, ratio_high = bar.ratio or (None, None, None)
            row: dict[str, Any] = {"row": bar.name, "trials per hour": median, "lowest": low, "highest": high}
            row |= {"ratio to plain": ratio, "lowest ratio": ratio_low, "highest ratio": ratio_high}
            rows.append(row)
        return rows


def bench_data(bench: Bench) -> BenchData:
    """Take trials an hour and ratios in the order of the rows."""
    subtitle = f"{bench.study} · {bench.dataset} · {bench.device} · n = {bench.n_rounds}, median and range"
    return BenchData(bench.study, subtitle, tuple(_bar(bench, row) for row in bench.rows))


def bench_figure(data: BenchData) -> "Figure":
    """Draw the bars, the plain loop in grey."""
    import plotly.graph_objects as go

    medians = [bar.trials_per_hour.median if bar.trials_per_hour else 0 for bar in data.bars]
    above = [bar.trials_per_hour.high - bar.trials_per_hour.median if bar.trials_per_hour else 0 for bar in data.bars]
    below = [bar.trials_per_hour.median - bar.trials_per_hour.low if bar.trials_per_hour else 0 for bar in data.bars]
    bars = go.Bar(
        x=medians,
        y=[bar.name for bar in data.bars],
        orientation="h",
        width=0.66,
        marker={"color": [GREY if bar.is_plain else BLUE for bar in data.bars]},
        error_x={"array": above, "arrayminus": below, "color": INK, "thickness": 1.4, "width": 4},
        hovertemplate="%{y}: %{x:.3g} trials an hour<extra></extra>",
    )
    figure = go.Figure(bars)
    for bar, median, more in zip(data.bars, medians, above, strict=True):
        figure.add_annotation(
            x=median + more, y=bar.name, text=_label(bar), showarrow=False, xanchor="left", xshift=8, font={"size": 13}
        )
    dress(figure, "Trials an hour", subtitle=data.subtitle, height=AROUND_PX + BAR_PX * len(data.bars))
    longest = max(median + more for median, more in zip(medians, above, strict=True)) or 1
    figure.update_xaxes(range=[0, 1.28 * longest], title={"text": f"trials an hour ({LEFT_OUT})"})
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", ticklabelstandoff=6, tickfont={"size": 13})
    return figure


def write_bench(bench: Bench, out: Path, *, formats: Sequence[str] = ("html",)) -> Written:
    """Write the figure, and the numbers that it shows as CSV.

    Args:
        bench: What was measured.
        out: The folder to write into; it is made.
        formats: Some of FORMATS. Where pictures cannot be drawn, HTML is written in their place.
    """
    check_names("format", formats, known=FORMATS)
    data = bench_data(bench)
    figure = bench_figure(data)
    out.mkdir(parents=True, exist_ok=True)
    contents, notes = {out / f"{NAME}.csv": csv_bytes(data)}, []
    picture_formats = [name for name in PICTURE_FORMATS if name in formats]
    lacks_pictures = False
    try:
        for name, picture_format, content in draw_pictures({NAME: figure}, picture_formats) if picture_formats else []:
            contents[out / f"{name}.{picture_format}"] = content
    except ChromeNotFoundError as error:
        notes.append(str(error))
        lacks_pictures = True
    if "html" in formats or lacks_pictures:
        contents[out / f"{NAME}.html"] = html_bytes(NAME, figure, study=data.study)
    for path in sorted(contents):
        write_atomically(path, contents[path])
    return Written(sorted(contents), notes, lacks_pictures)


def _bar(bench: Bench, row: Row) -> Bar:
    name = f"{row.entrant}, {row.entrant.precision}"
    return Bar(name, row.entrant.is_plain, bench.trials_per_hour(row), bench.ratio_to_plain(row))


def _label(bar: Bar) -> str:
    if bar.trials_per_hour is None:
        return "could not be run"
    median = bar.trials_per_hour.median
    number = f"{median:,.{decimals(median)}f}"
    return number if bar.ratio is None else f"{number}  ({bar.ratio.median:.2f} x plain)"
