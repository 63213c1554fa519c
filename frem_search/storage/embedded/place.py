"""Where the data lie: in FREM_SEARCH_HOME, or where an earlier version put them for root.

A home for which a database of an earlier version was found remembers the choice in its file `postgres.place`.
"""

import hashlib
import os
import re
from pathlib import Path

from frem_search.errors import StorageError
from frem_search.system.files import write_atomically
from frem_search.system.home import home

NAME = "postgres"
# Earlier versions put root's data here where the database's user could not enter FREM_SEARCH_HOME.
EARLIER = Path("/var/lib/frem-search")


def folder() -> Path:
    """Return the data folder: the one that was decided for, else the first that holds a database, else the home's.

    Raises:
        StorageError: What was decided cannot be read, or is not there.
    """
    place = remembered()
    if place is not None and place != home() / NAME and not place.exists():
        message = (
            f"{file()}: this home's database lies in {place}, and that is not there. Bring it back, or remove this "
            "file to begin an empty one."
        )
        raise StorageError(message)
    return place or next(iter(_databases()), home() / NAME)


def undecided() -> list[Path]:
    """Return the databases to choose from: none if that was done, or if this home's own folder is the only one."""
    found = [] if file().exists() else _databases()
    return [] if found == [home() / NAME] else found


def decide(data: Path) -> None:
    """Remember the data folder of this home, whatever becomes of the home's path."""
    write_atomically(file(), f"{NAME if data == home() / NAME else data}\n".encode())


def holds_database(data: Path) -> bool:
    """Whether PostgreSQL has made a database in a folder, as far as this user may know."""
    try:
        return (data / "PG_VERSION").exists()
    except PermissionError:
        return False


def file() -> Path:
    """Return the file that remembers a choice; whoever writes into it chooses."""
    return home() / "postgres.place"


def _databases() -> list[Path]:
    places = [home() / NAME]
    if os.geteuid() == 0:
        places.append(earlier_place())
    return [place for place in places if holds_database(place)]


def earlier_place() -> Path:
    """Return where an earlier version would have put this home's data for root."""
    path = str(home() / NAME).encode(errors="surrogateescape")
    return EARLIER / f"{NAME}-{hashlib.sha256(path).hexdigest()[:12]}"


def remembered() -> Path | None:
    """Return the data folder that was decided for, which may be gone; None if nothing was.

    Raises:
        StorageError: The file names no such folder.
    """
    try:
        text = file().read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if text == NAME:
        return home() / NAME
    place = Path(text)
    if place.parent != EARLIER or not re.fullmatch(rf"{NAME}-[0-9a-f]{{12}}", place.name):
        message = (
            f"{file()}: expected {NAME}, or the path of a database in {EARLIER}, but got {text[:200]!r}. Remove this "
            "file, and the database is looked for."
        )
        raise StorageError(message)
    return place
