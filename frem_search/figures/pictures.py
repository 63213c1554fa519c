"""PNG, SVG and PDF, drawn by a Chrome or Chromium that is on this machine and reaches nothing outside of it."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from frem_search.errors import ChromeNotFoundError

if TYPE_CHECKING:
    from choreographer.browsers import Chromium
    from plotly.graph_objects import Figure

PICTURE_FORMATS = ("png", "svg", "pdf")
SCALE = 2  # pixels of a PNG per pixel of the layout


class Picture(NamedTuple):
    """One figure in one format."""

    name: str
    format: str
    content: bytes


def find_chrome() -> Path:
    """Return the browser that pictures are drawn with: BROWSER_PATH, or else what choreographer finds."""
    from choreographer.browsers import Chromium

    given = os.environ.get("BROWSER_PATH")
    found = given or Chromium.find_browser(skip_local=False)
    if found and os.access(found, os.X_OK) and Path(found).is_file():
        return Path(found)
    got = f"BROWSER_PATH={given} is no program" if given else "none was found"
    remedy = "install the Debian or Ubuntu package chromium or Google Chrome, or run plotly_get_chrome"
    msg = (
        f"PNG, SVG and PDF need a Chrome or Chromium, but {got}: {remedy}{', and unset BROWSER_PATH' if given else ''}."
    )
    raise ChromeNotFoundError(msg)


def draw_pictures(figures: "dict[str, Figure]", formats: Sequence[str]) -> list[Picture]:
    """Draw every figure in every format with one browser."""
    chrome = find_chrome()
    wanted = [(name, figure, picture_format) for name, figure in figures.items() for picture_format in formats]
    return asyncio.run(draw_all(wanted, chrome)) if wanted else []


async def draw_all(wanted: "list[tuple[str, Figure, str]]", chrome: Path) -> list[Picture]:
    """Start the browser, draw one picture after another, end the browser."""
    from choreographer.browsers import BrowserClosedError, BrowserFailedError
    from kaleido import Kaleido

    pictures: list[Picture] = []
    try:
        # MathJax would come from a CDN; no label here holds a formula.
        async with Kaleido(path=chrome, browser_cls=offline_chromium(), mathjax=False) as kaleido:
            for name, figure, picture_format in wanted:
                options = {"format": picture_format, "scale": SCALE if picture_format == "png" else 1}
                pictures.append(Picture(name, picture_format, await kaleido.calc_fig(figure, opts=options)))
    except (BrowserClosedError, BrowserFailedError, TimeoutError) as error:
        failed = f"{chrome} failed with {type(error).__name__}"
        msg = f"PNG, SVG and PDF need a Chrome or Chromium that works, but {failed}: set BROWSER_PATH to another one."
        raise ChromeNotFoundError(msg) from error
    return pictures


def offline_chromium() -> "type[Chromium]":
    """Return choreographer's Chromium with the switches that keep it from calling home."""
    from choreographer.browsers import Chromium

    class OfflineChromium(Chromium):
        """A Chromium that opens local files only."""

        def get_cli(self) -> Sequence[str]:
            """Return the command line that starts it."""
            return [*super().get_cli(), "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]

    return OfflineChromium
