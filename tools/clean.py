"""Remove the database of FREM_SEARCH_HOME where an earlier version put it for root, outside of that folder.

    FREM_SEARCH_HOME=quickstart/home PYTHONPATH=. python tools/clean.py

Needs nothing installed. What lies in FREM_SEARCH_HOME itself is left alone. A database outside of it that may be
another home's is named and left alone. Exit status 1: a database may be there, and was not removed.
"""

import shutil
import sys

from frem_search.errors import StorageError
from frem_search.storage.embedded.place import NAME, earlier_place, folder, holds_database, remembered
from frem_search.system.home import home


def main() -> int:
    """Remove it, if there is one; return the exit status."""
    earlier = earlier_place()
    try:
        data = remembered() or folder()
        if data == earlier and data.exists():
            shutil.rmtree(data)
            for name in ("users", "lock"):
                data.with_name(f"{data.name}.{name}").unlink(missing_ok=True)
            print(f"removed {data}")
            return 0
    except (OSError, StorageError) as error:
        print(f"nothing removed: {error}", file=sys.stderr)
        return 1
    if data != home() / NAME and not data.exists():
        print(f"{data}: the database is gone already")
    # A checkout that was copied names the database of the first; one that was moved away uses the one of this path.
    for other in {data, earlier} - {home() / NAME}:
        if holds_database(other):
            print(f"left alone, since another home may use it: {other}. If none does: rm -r {other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
