"""Other users of this machine: strangers who try to get in, and ordinary users who run the command."""

import os
import pwd
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

from frem_search.storage.embedded.account import Account
from frem_search.storage.embedded.programs import wheel_folders

STRANGER = 54321  # a user id that no machine gives


def modes(*paths):
    """Mode and owner of these paths and of every folder on the way to them."""
    ways = {way for path in paths for way in (path, *path.parents)}
    return {str(way): (oct(way.stat().st_mode), way.stat().st_uid, way.stat().st_gid) for way in ways}


def become(uid):
    """The beginning of a command that another user runs."""
    if os.geteuid() != 0:
        pytest.skip("Only root can act as another user.")
    if shutil.which("setpriv") is None:
        pytest.skip("There is no setpriv to act as another user with.")
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


def copy_psql(folder):
    """Copy psql to where everybody may run it, and return its path."""
    package = wheel_folders()[-1].parents[1]
    target = folder / "client" / package.name / "pginstall18" / "bin"
    target.mkdir(parents=True)
    shutil.copy(wheel_folders()[-1] / "psql", target)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / "client" / libraries.name)
    for path in (folder / "client").rglob("*"):
        path.chmod(0o755)
    return target / "psql"


def ordinary_user(keep):
    """Return the name of an ordinary user, and the beginning of commands of that user, who then reaches this Python.

    Args:
        keep: An empty folder.
    """
    name = "nobody"
    user = pwd.getpwnam(name)
    command = [*_reaching(user, keep), *become(user.pw_uid)]
    tried = subprocess.run(
        [*command, sys.executable, "-c", "pass"], capture_output=True, text=True, check=False, cwd="/"
    )
    if tried.returncode != 0:
        pytest.skip(f"User {name} cannot run {sys.executable}, and no mount lets it: {tried.stderr.strip()}")
    return user, command


def _reaching(user, keep):
    # Where a folder above Python is closed, an open one lies over it, in a mount namespace of that command alone.
    account = Account(user.pw_uid, user.pw_gid)
    needed = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, REPOSITORY)}
    closed = {}
    for path in needed:
        for way in reversed(path.parents):
            if not account.may_enter(way):
                closed.setdefault(way, []).append(path)
                break
    if not closed:
        return []
    script = ["set -e"]
    for i, path in enumerate(path for paths in closed.values() for path in paths):
        (keep / str(i)).mkdir()
        script.append(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(keep / str(i)))}")
    script += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(way))}" for way in closed]
    for i, path in enumerate(path for paths in closed.values() for path in paths):
        there = shlex.quote(str(path))
        script.append(f"mkdir -p {there}; mount --bind {shlex.quote(str(keep / str(i)))} {there}")
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join([*script, 'exec "$@"']), "sh"]
