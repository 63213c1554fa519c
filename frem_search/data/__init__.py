"""Images: found, read, checked, split and resized; here the datasets that have a name, in the order of the docs.

`catalogue.py` finds or makes a dataset, `nnunet.py` reads its folder, `dataset.py` holds it in memory. `sources/` has a
file for each named dataset, `augmentation/` what changes by the epoch.
"""

from frem_search.data.sources import drosophila, drosophila_synthetic, h1299, isbi2012, mouse, mouse_synthetic
from frem_search.data.sources.source import Source

__all__ = ["DATASETS", "Source"]

DATASETS: dict[str, Source] = {
    "mouse": mouse.SOURCE,
    "drosophila": drosophila.SOURCE,
    "isbi2012": isbi2012.SOURCE,
    "h1299": h1299.SOURCE,
    "mouse_synthetic": mouse_synthetic.SOURCE,
    "drosophila_synthetic": drosophila_synthetic.SOURCE,
}
