"""Figures as files: HTML and CSV always possible, PNG, SVG and PDF where there is a browser to draw them."""

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from frem_search.errors import ChromeNotFoundError, UsageError, did_you_mean
from frem_search.figures import FIGURES, FigureData
from frem_search.figures.pictures import PICTURE_FORMATS, draw_pictures
from frem_search.study.record import StudyRecord
from frem_search.system.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMATS = ("html", *PICTURE_FORMATS)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin: 24px; background: white">
{figure}
</body>
</html>
"""


class Written(NamedTuple):
    """What `write_figures` did.

    Args:
        paths: The files, figure by figure.
        notes: One sentence for each thing that could not be written.
        lacks_pictures: Whether PNG, SVG or PDF was asked for and no browser could draw it.
    """

    paths: list[Path]
    notes: list[str]
    lacks_pictures: bool


def write_figures(
    record: StudyRecord, out: Path, *, formats: Sequence[str] = ("html",), only: Sequence[str] = ()
) -> Written:
    """Write the figures of a study and, beside each one, the numbers that it shows as CSV.

    Args:
        record: The study.
        out: The folder to write into; it is made.
        formats: Some of FORMATS. Where pictures cannot be drawn, HTML is written in their place.
        only: The figures to write, of which each must be possible. All that are possible where this is empty.
    """
    check_names("format", formats, known=FORMATS)
    check_names("figure", only, known=FIGURES)
    shown, notes = take_data(record, only=only)
    out.mkdir(parents=True, exist_ok=True)  # before the browser draws for nothing
    figures = {name: FIGURES[name].draw(data) for name, data in shown.items()}
    picture_formats = [name for name in PICTURE_FORMATS if name in formats]
    contents: dict[Path, bytes] = {}
    lacks_pictures = False
    if picture_formats:
        try:
            pictures = draw_pictures(figures, picture_formats)
            contents = {out / f"{name}.{picture_format}": content for name, picture_format, content in pictures}
        except ChromeNotFoundError as error:
            notes.append(str(error))
            lacks_pictures = True
    for name, data in shown.items():
        contents[out / f"{name}.csv"] = csv_bytes(data)
        if "html" in formats or lacks_pictures:
            contents[out / f"{name}.html"] = html_bytes(name, figures[name], study=record.name)
    order = list(shown)
    paths = sorted(contents, key=lambda path: (order.index(path.stem), path.suffix))
    for path in paths:
        write_atomically(path, contents[path])
    return Written(paths, notes, lacks_pictures)


def check_names(kind: str, names: Iterable[str], *, known: Iterable[str]) -> None:
    """Raise UsageError for a name that is none of the known ones."""
    listed = list(known)
    for name in names:
        if name not in listed:
            msg = f"Unknown {kind} {name!r}.{did_you_mean(name, listed)} Known: {', '.join(listed)}."
            raise UsageError(msg)


def take_data(record: StudyRecord, *, only: Sequence[str]) -> tuple[dict[str, FigureData], list[str]]:
    """Return the data of the figures that can be drawn, and a reason for each one that cannot."""
    shown: dict[str, FigureData] = {}
    notes: list[str] = []
    for name, spec in FIGURES.items():
        if only and name not in only:
            continue
        try:
            shown[name] = spec.data(record)
        except UsageError as error:
            if only:
                raise
            notes.append(str(error))
    return shown, notes


def csv_bytes(data: FigureData) -> bytes:
    """Return the plotted numbers as a table with a header."""
    rows = data.table()
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def html_bytes(name: str, figure: "Figure", *, study: str) -> bytes:
    """Return a page with plotly.js inside, so that it opens offline wherever it is sent."""
    settings = {"displaylogo": False, "responsive": False, "toImageButtonOptions": {"format": "svg", "filename": name}}
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, div_id=name, config=settings)
    return PAGE.format(title=escape(f"{study}: {name}"), figure=drawn).encode()
