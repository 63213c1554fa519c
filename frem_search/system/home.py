"""Where frem-search keeps its files: FREM_SEARCH_HOME, or the usual place of the user or of root."""

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of the embedded database, the datasets and the artifacts.

    Root's default is the machine's place for such files, /var/lib/frem-search.
    """
    if given := os.environ.get("FREM_SEARCH_HOME"):
        return Path(given).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/lib/frem-search")
    return Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "frem-search"


def datasets_folder() -> Path:
    """Return the folder under which prepared and synthetic datasets lie, one folder each."""
    return home() / "datasets"
