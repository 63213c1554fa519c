"""What tests share: a home of their own, a real PostgreSQL, a tiny study, the command as a process."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from places import REPOSITORY
from servers import tcp_database, tcp_server  # noqa: F401 fixtures of every test

# Before torch is imported: tests run side by side, and threads that wait for each other would burn both cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Numbers that tests compare with stored ones are those of AVX2, whatever more a processor has.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
COMMAND = (sys.executable, "-c", "import sys; sys.argv[0] = 'frem-search'; from frem_search.cli import main; main()")
USUAL_HOMES = (Path("/var/lib/frem-search"), Path("~/.local/share/frem-search").expanduser())

TINY_STUDY = """
title = "A study that trains in a second"
dataset = "{dataset}"
network = "unet"
precision = "fp32"

[budget]
n_trials = 3
n_epochs = 3

[params]
image_size = 32
base_channels = 4
depth = 2
batch_size = 4
B = {{ low = 0, high = 16 }}
X = {{ low = 1, high = 1000, log = true }}
"""


# Ends the servers of a test run that was killed itself: its stdin ends with that process, whatever happens to it.
GUARD = """
import os, pathlib, shutil, signal, sys, time
folder = pathlib.Path(sys.argv[1])
sys.stdin.read()
for file in folder.rglob("postmaster.pid"):
    try:
        os.kill(int(file.read_text().split()[0]), signal.SIGQUIT)
    except (OSError, ValueError, IndexError):
        pass
for _ in range(100):
    if not list(folder.rglob("postmaster.pid")):
        break
    time.sleep(0.1)
shutil.rmtree(folder, ignore_errors=True)
"""


def pytest_configure(config):
    """Let tests run as in the foreground, and so the processes that they start.

    A background job of a script ignores SIGINT, one of nohup SIGHUP, and whatever it starts inherits that.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # where tests run
        restored = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL}
        # The tests themselves outlive the terminal, as nohup wants; a handler is not inherited.
        restored[signal.SIGHUP] = lambda *_: None
        for number, handler in restored.items():
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)


def open_folder():
    """Make a folder that every user may enter: for root, the server with passwords runs as another user."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        ways = (Path(parent).resolve(), *Path(parent).resolve().parents)
        if os.geteuid() != 0 or all(way.stat().st_mode & 0o055 == 0o055 for way in ways):
            folder = Path(tempfile.mkdtemp(prefix="frem-", dir=ways[0]))
            folder.chmod(0o755)
            return folder
    pytest.exit("Tests of a server with passwords need a temporary folder that every user may enter. Set TMPDIR.")


def stop_servers_under(folder):
    for file in folder.rglob("postmaster.pid"):
        with suppress(psutil.Error, ValueError, IndexError):
            server = psutil.Process(int(file.read_text().splitlines()[0]))
            if server.name() == "postgres":
                server.send_signal(signal.SIGQUIT)
                server.wait(10)


@pytest.fixture(scope="session", autouse=True)
def _usual_homes_stay_as_they_are():
    before = [sorted(path.glob("*")) for path in USUAL_HOMES]
    yield
    assert [sorted(path.glob("*")) for path in USUAL_HOMES] == before


@pytest.fixture(scope="session")
def run_folder():
    """Where this test run keeps databases: every user may enter it, and nothing of it stays."""
    folder = open_folder()
    guard = subprocess.Popen([sys.executable, "-c", GUARD, folder], stdin=subprocess.PIPE, start_new_session=True)
    yield folder
    guard.communicate()


@pytest.fixture(autouse=True)
def home(monkeypatch, run_folder):
    """FREM_SEARCH_HOME: a folder of this test; no other setting of the environment reaches it."""
    for name in list(os.environ):
        if name.startswith(("FREM_SEARCH_", "PG")):
            monkeypatch.delenv(name)
    folder = run_folder / f"home-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setenv("FREM_SEARCH_HOME", str(folder))
    yield folder
    stop_servers_under(folder)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Server:
    """The PostgreSQL of this test run."""

    folder: Path
    databases: list[str] = field(default_factory=list)

    def url(self, database):
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def connect(self, database):
        import psycopg2

        connection = psycopg2.connect(host=str(self.folder), user="postgres", dbname=database)
        connection.autocommit = True
        return connection

    def execute(self, *statements, database="postgres"):
        connection = self.connect(database)
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def create(self, *, template=None):
        name = f"frem_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        self.databases.append(name)
        return name


@pytest.fixture(scope="session")
def postgres(run_folder):
    """A server of this process alone, so that pytest-xdist needs no agreement among its workers."""
    from frem_search.storage.embedded.embedded import serve

    with serve(run_folder / "pg") as url:
        server = Server(Path(url.query["host"]))
        server.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
        yield server
        stop_servers_under(run_folder / "pg")


@pytest.fixture(scope="session")
def _template(postgres):
    from frem_search.storage.database import Storage
    from frem_search.storage.url import normalise_url

    name = postgres.create()
    Storage(normalise_url(postgres.url(name))).close()
    return name


@pytest.fixture
def empty_database_url(postgres):
    name = postgres.create()
    yield postgres.url(name)
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def storage_url(postgres, _template):
    """A fresh database that has the tables already."""
    name = postgres.create(template=_template)
    yield postgres.url(name)
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def storage(storage_url):
    from frem_search.storage.database import open_storage

    with open_storage(storage_url) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """Twelve images of discs and squares, 32 x 32, three classes, one fold."""
    from frem_search.data.cases import Case
    from frem_search.data.folds import Split
    from frem_search.data.nnunet import write_folder

    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    cases = []
    for i in range(12):
        label = np.zeros((32, 32), np.uint8)
        (r, c), (top, left) = rng.integers(8, 24, 2), rng.integers(0, 22, 2)
        label[top : top + 9, left : left + 9] = 2
        label[(rows - r) ** 2 + (columns - c) ** 2 < 40] = 1
        image = np.clip(60 + 70 * label + rng.normal(0, 15, label.shape), 0, 255).astype(np.uint8)
        cases.append(Case(f"case{i:02d}", image, label))
    names = [case.name for case in cases]
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    split = Split(tuple(names[:8]), tuple(names[8:10]), tuple(names[10:]))
    write_folder(folder, cases, class_names=("ground", "disc", "square"), splits=[split])
    return folder


@pytest.fixture
def tiny_study(tmp_path, tiny_dataset):
    """The path of a study file: 3 trials of 3 epochs."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_STUDY.format(dataset=tiny_dataset))
    return path


def command_environment(settings):
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "120"}
    return os.environ | fixed | {name: str(value) for name, value in settings.items()}


@pytest.fixture
def run_cli(tmp_path):
    """The command to its end: `run_cli("status", "--study", path, FREM_SEARCH_STORAGE=url)`."""

    def run(*args, timeout_s=120, **settings):
        return subprocess.run(
            [*COMMAND, *map(str, args)],
            env=command_environment(settings),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def start_cli(tmp_path, home):
    """The command as a process that runs on; what is left of it is killed at the test's end."""
    started = []

    def start(*args, **settings):
        process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            env=command_environment(settings),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


class DoNothing:
    """An objective whose score of an epoch is `score(params, epoch)`; a checkpoint is a number in a dict.

    Args:
        n_epochs: Of every trial.
        score: Of an epoch.
        before_epoch: Called with number and epoch: where a test lets something happen.
        checkpoints: Shared by objectives that stand for workers with one artifact store.
    """

    searches_shapes = False

    def __init__(self, n_epochs=3, *, score=None, before_epoch=None, checkpoints=None, image_scores=None):
        self.n_epochs = n_epochs
        self.score = score or (lambda params, epoch: epoch * 0.01 + sum(map(float, params.values())) * 1e-4)
        self.before_epoch = before_epoch or (lambda number, epoch: None)
        self.checkpoints = {} if checkpoints is None else checkpoints
        # Of folds in sequence, an epoch each: what its images score with a trial's parameters.
        self.image_scores = image_scores
        self.members, self.params, self.discarded, self.swept, self.n_trained = {}, {}, [], [], 0

    def admit(self, number, params):
        epoch, curve = self.checkpoints.get(number, (0, {"epoch": [], "score": [], "best_score": []}))
        best = max(curve["score"], default=float("-inf"))
        curve = {name: list(column) for name, column in curve.items()}
        self.members[number] = SimpleNamespace(
            key=number,
            epoch=epoch,
            curve=curve,
            best_score=best,
            has_ended=False,
            set_aside="",
            is_done=epoch >= self.n_epochs,
            in_sequence=self.image_scores is not None,
            image_scores=[score for done in range(epoch) for score in self.image_scores(params, done + 1)]
            if self.image_scores
            else [],
        )
        self.params[number] = params
        return self.members[number]

    def epochs(self):
        from frem_search.errors import DeviceMemoryError
        from frem_search.training.member import EpochReport

        while active := [m for m in self.members.values() if m.epoch < self.n_epochs and not m.has_ended]:
            for member in active:
                if self.members.get(member.key) is not member:
                    continue
                try:
                    self.before_epoch(member.key, member.epoch + 1)
                except DeviceMemoryError:
                    raise
                except Exception as error:  # noqa: BLE001
                    member.has_ended = True
                    yield EpochReport(member.key, member.epoch, 0.0, 0.0, 0.0, False, False, 0.0, error)
                    continue
                member.epoch += 1
                self.n_trained += 1
                value = self.score(self.params[member.key], member.epoch)
                is_finite = value == value
                member.best_score = max(member.best_score, value) if is_finite else member.best_score
                member.curve["epoch"].append(member.epoch)
                member.curve["score"].append(value if is_finite else None)
                member.curve["best_score"].append(member.best_score)
                if self.image_scores:
                    member.image_scores += self.image_scores(self.params[member.key], member.epoch)
                is_done = member.epoch == self.n_epochs
                yield EpochReport(member.key, member.epoch, 0.5, value, member.best_score, is_finite, is_done, 0.0)

    def trial(self, number):
        return self.members[number]

    def train_in_turn(self):
        return False

    def sweep(self, finished):
        self.swept.append(sorted(finished))

    def save_checkpoint(self, number):
        member = self.members[number]
        self.checkpoints[number] = (member.epoch, {name: list(column) for name, column in member.curve.items()})

    def finish(self, number):
        from frem_search.training.objective import Outcome

        member = self.members[number]
        val = {"mean_iou": member.best_score, "per_class": {}}
        return Outcome(member.best_score, {"best_epoch": member.epoch, "val": val})

    def release(self, number):
        self.members.pop(number, None)

    def provenance(self, number):
        return {"seconds": 1.0}

    def discard(self, number, *, weights):
        self.discarded.append((number, weights))


@pytest.fixture
def do_nothing():
    """The class `DoNothing`: an objective without images and torch."""
    return DoNothing
