"""Remove the database of FREM_SEARCH_HOME where an earlier version put it for root, outside of that folder.

    FREM_SEARCH_HOME=quickstart/home PYTHONPATH=. python tools/clean.py

Needs nothing installed. What lies in FREM_SEARCH_HOME itself is left alone, and so is every other database.
"""

import shutil
import sys

from frem_search.errors import StorageError
from frem_search.storage.embedded.place import NAME, folder
from frem_search.system.home import home


def main() -> None:
    """Remove it, if there is one."""
    try:
        data = folder()
    except StorageError as error:
        print(f"nothing removed: {error}", file=sys.stderr)
        return
    if data != home() / NAME:
        shutil.rmtree(data)
        for name in ("users", "lock"):
            data.with_name(f"{data.name}.{name}").unlink(missing_ok=True)
        print(f"removed {data}")


if __name__ == "__main__":
    main()
