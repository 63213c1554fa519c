"""A PostgreSQL server as others run one: reached by TCP, with passwords, stopped and started at will."""

import getpass
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import psycopg2
import pytest

from frem_search.storage.embedded.account import Account
from frem_search.storage.embedded.programs import programs_for

OWNER = "frem_owner"
# Every character that has broken a URL, a format string or a configuration file of somebody.
AWKWARD = "p{a}ss%w@rd:/?#"


def find_binaries():
    """The folder of initdb and pg_ctl: the system's newest, else the wheel's, where the server's user may run them."""
    folders = list(Path("/usr/lib/postgresql").glob("*/bin"))
    if (pg_config := shutil.which("pg_config")) is not None:
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False).stdout
        folders.append(Path(told.strip() or "/nowhere"))
    folders += [path.parent for path in map(shutil.which, ("pg_ctl",)) if path for path in [Path(path).resolve()]]
    system = [folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()]
    if system:
        return max(system, key=lambda folder: int(re.search(r"\d+|$", str(folder))[0] or 0))
    user = pwd.getpwnam(user_for_server() or "root")
    return programs_for(Account(user.pw_uid, user.pw_gid))


def user_for_server():
    """PostgreSQL refuses to run as root: then the first of these users runs it."""
    if os.geteuid() != 0:
        return getpass.getuser()
    for name in ("postgres", "pgserver", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


class TcpServer:
    """A server on a free port of 127.0.0.1 that asks for passwords by SCRAM.

    Args:
        folder: An empty one.
        binaries: The folder of initdb and pg_ctl.
        user: Who runs it.
    """

    def __init__(self, folder, binaries, user):
        self.folder, self.binaries, self.user = folder, binaries, user
        self.data, self.log = folder / "data", folder / "log"
        self.passwords = {"postgres": secrets.token_hex(8), OWNER: AWKWARD + secrets.token_hex(4)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def initialise(self):
        owner = pwd.getpwnam(self.user)
        os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        password_file = self.folder / "superuser"
        password_file.write_text(self.passwords["postgres"])
        os.chown(password_file, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-D", self.data, "-U", "postgres", f"--pwfile={password_file}", "--auth=scram-sha-256")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\nfsync = off\n"
                "password_encryption = 'scram-sha-256'\nlog_statement = 'all'\n"
            )
        self.start()
        self.execute(f"CREATE ROLE {OWNER} LOGIN CREATEROLE CREATEDB PASSWORD %s", values=[self.passwords[OWNER]])

    def start(self):
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.log)

    def stop(self, mode="fast"):
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def restart(self, mode="fast", *, away_s=0.0):
        """Stop it, as an administrator does it (`fast`) or a power cut (`immediate`), and start it again."""
        self.stop(mode)
        time.sleep(away_s)
        self.start()

    def is_running(self):
        return self._call("pg_ctl", "status", "-D", self.data).returncode == 0

    def url(self, role=OWNER, *, database="postgres", has_password=True):
        """The URL of a role; passwords of roles that a test makes belong into `passwords`."""
        password = f":{quote(self.passwords[role], safe='')}" if has_password else ""
        return f"postgresql://{role}{password}@127.0.0.1:{self.port}/{database}"

    def create(self):
        """Make a database of the owner, and return its name."""
        name = f"frem_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name} OWNER {OWNER}")
        return name

    def drop(self, name):
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, *statements, role="postgres", database="postgres", values=None):
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user=role, password=self.passwords[role], dbname=database
        )
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def _call(self, program, *args):
        as_user = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid} if os.geteuid() == 0 else {}
        # Not a pipe: the server inherits what pg_ctl writes to, and would keep the pipe open.
        with (self.folder / f"{program}.out").open("w+") as out:
            ended = subprocess.run(
                [self.binaries / program, *map(str, args)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder, check=False, timeout=120,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.folder)}, **as_user,
            )  # fmt: skip
            out.seek(0)
            ended.stdout = out.read()
        return ended

    def _run(self, program, *args):
        ended = self._call(program, *args)
        assert ended.returncode == 0, f"{program}: {ended.stdout}"


@pytest.fixture(scope="session")
def tcp_server(run_folder):
    """A server of this test run with passwords, which a test may stop and start."""
    binaries, user = find_binaries(), user_for_server()
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and this machine has no other user to run it.")
    folder = run_folder / f"tcp-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    server = TcpServer(folder, binaries, user)
    try:
        server.initialise()
    except PermissionError:
        pytest.skip(f"User {user} may not run the programs in {binaries}.")
    yield server
    if server.is_running():
        server.stop("immediate")


@pytest.fixture
def tcp_database(tcp_server):
    """A fresh database on it, without tables."""
    if not tcp_server.is_running():
        tcp_server.start()
    name = tcp_server.create()
    yield name
    if not tcp_server.is_running():
        tcp_server.start()
    tcp_server.drop(name)
