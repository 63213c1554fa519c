"""Datasets by name, in the order of the docs."""

from frem_search.data import drosophila, drosophila_synthetic, mouse, mouse_synthetic
from frem_search.data.source import Source

__all__ = ["DATASETS", "Source"]

DATASETS: dict[str, Source] = {
    "mouse": mouse.SOURCE,
    "drosophila": drosophila.SOURCE,
    "mouse_synthetic": mouse_synthetic.SOURCE,
    "drosophila_synthetic": drosophila_synthetic.SOURCE,
}
