"""The command: its help, its exit statuses, and one clear line for whatever goes wrong."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from places import REPOSITORY

from frem_search import __version__
from frem_search.cli import app, main
from frem_search.data.cases import Case
from frem_search.data.folds import Split
from frem_search.data.nnunet import write_folder

HEAVY = ("torch", "optuna", "plotly", "sqlalchemy", "psycopg2", "numpy", "scipy")
PROGRAM = "import sys; sys.argv[0] = 'frem-search'; from frem_search.cli import main; main()"
NOBODY = "postgresql://me@127.0.0.1:1/db"  # no server listens on port 1


def commands(group=None, path=()):
    """Every command with the words that call it."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from commands(command, (*path, name))
        else:
            yield pytest.param(command, (*path, name), id=" ".join((*path, name)))


COMMANDS = list(commands())


def options():
    return [
        pytest.param(option, id=f"{each.id} {option.name}")
        for each in COMMANDS
        for option in each.values[0].params
        if option.name != "help"
    ]


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process: `call("status", "--study", path)` gives status, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("COLUMNS", "120")

    def call(*args, **settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["frem-search", *map(str, args)])
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, raised.value.code, out, err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_told(answer, status, *parts):
    """One line on stderr, nothing on stdout."""
    assert (answer.returncode, answer.stdout) == (status, ""), answer.stderr
    assert answer.stderr.startswith("frem-search: ")
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert answer.stderr.endswith("\n")
    for part in parts:
        assert part in answer.stderr


@pytest.fixture
def changed_study(tiny_study):
    """The tiny study's file with a text replaced."""

    def change(old, new):
        text = tiny_study.read_text()
        assert old in text
        tiny_study.write_text(text.replace(old, new))
        return tiny_study

    return change


# Help


def test_importing_the_command_loads_nothing_heavy():
    code = f"import sys, frem_search.cli; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_help_needs_nothing_heavy():
    code = f"import sys\ntry:\n    {PROGRAM}\nfinally:\n    print([n for n in {HEAVY} if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code, "run", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")


def test_there_are_commands():
    found = {each.id for each in COMMANDS}
    assert {"run", "status", "trials", "figures"} <= found


@pytest.mark.parametrize(("command", "path"), COMMANDS)
def test_every_command_has_a_sentence_and_an_example(command, path):
    summary, _, rest = command.help.partition("\n\n")
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert (
        f"\b\n$ frem-search {' '.join(path)} " in rest + " " or f"\b\n$ frem-search {' '.join(path)}\n" in rest + "\n"
    )


@pytest.mark.parametrize(("command", "path"), COMMANDS)
def test_every_example_is_a_call_that_parses(command, path):
    examples = [line for line in command.help.splitlines() if line.startswith("$ frem-search ")]
    for example in examples:
        words = shlex.split(example.removeprefix("$ frem-search "))
        ends = [i for i, word in enumerate(words) if word in (">", "|", "&&")]
        words = words[: min(ends, default=len(words))]
        called, group = typer.main.get_command(app), ()
        while hasattr(called, "commands"):
            called, group = called.commands[words[0]], (*group, words.pop(0))
        called.make_context(" ".join(group), words).close()


@pytest.mark.parametrize("option", options())
def test_every_option_has_a_help_text(option):
    assert option.help.endswith((".", ")", "?"))
    assert len(option.help) > 8


def test_an_option_has_the_same_variable_in_every_command():
    seen = {}
    for each in options():
        (option,) = each.values
        if option.envvar is not None:
            assert option.envvar.startswith("FREM_SEARCH_")
            seen.setdefault(option.envvar, set()).add(option.opts[0])
    assert {variable: len(names) for variable, names in seen.items()} == dict.fromkeys(seen, 1)
    assert seen["FREM_SEARCH_STUDY"] == {"--study"}


@pytest.mark.parametrize(("command", "path"), COMMANDS)
def test_help_shows_every_option_and_its_variable(call, command, path):
    shown = call(*path, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    assert f"Usage: frem-search {' '.join(path)}" in text
    for option in command.params:
        if option.param_type_name == "option":
            assert option.opts[0] in text
        if option.envvar:
            assert f"env var: {option.envvar}" in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_command_itself_has_help(call, flag):
    shown = call(flag)
    assert shown.returncode == 0
    assert "Start here: frem-search run --study mouse_frem --quick" in shown.stdout


def test_without_a_command_it_shows_help(call):
    shown = call()
    assert shown.returncode == 2
    assert "Usage: frem-search" in shown.stdout + shown.stderr


def test_the_version(call):
    shown = call("--version")
    assert (shown.returncode, shown.stdout) == (0, f"frem-search {__version__}\n")


# What is wrong with the call


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fly"], "No such command 'fly'"),
        (["run"], "Missing option '--study'"),
        (["run", "--study"], "requires an argument"),
        (["run", "--stduy", "s"], "No such option: --stduy"),
        (["run", "--study", "s", "--n-trials", "0"], "Invalid value for '--n-trials'"),
        (["run", "--study", "s", "--n-trials", "many"], "Invalid value for '--n-trials'"),
        (["run", "--study", "s", "--n-epochs", "1.5"], "Invalid value for '--n-epochs'"),
        (["run", "--study", "s", "--checkpoint-every", "-1"], "Invalid value for '--checkpoint-every'"),
        (["status", "--study", "s", "more"], "unexpected extra argument"),
    ],
)
def test_a_call_that_cannot_be_read_is_2(call, args, says):
    answer = call(*args)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"args": ["--dataset", "secret\udcff"], "named": "argument 5: "},
        {"settings": {"FREM_SEARCH_STORAGE": "secret\udcff"}, "named": "FREM_SEARCH_STORAGE: "},
    ],
)
def test_what_is_no_utf8_is_refused(call, tiny_study, given):
    """As a file system has it that was written in another encoding: neither the database nor stdout takes it."""
    told = call("status", "--study", tiny_study, *given.get("args", []), **given.get("settings", {}))
    assert_told(
        told, 2, given["named"], "expected text in UTF-8, but its character 7 is none. Rename what it stands for."
    )
    assert "secret" not in told.stderr


@pytest.mark.parametrize("where", ["argument", "argument and environment"])
def test_a_password_on_the_command_line_is_refused_whatever_the_environment_holds(call, tiny_study, where):
    """Even if the environment holds the same: every user of the machine reads arguments."""
    for option, url in (
        ("--storage", "postgresql://me:secret@127.0.0.1:1/x"),
        ("--artifacts", "sftp://me:secret@db/x"),
    ):
        settings = {f"FREM_SEARCH_{option[2:].upper()}": url} if where != "argument" else {}
        told = call("run", "--study", tiny_study, option, url, **settings)
        assert_told(told, 2, f"{option}: a password on the command line can be read by every user of this machine.")
        assert "secret" not in told.stderr


def test_the_password_of_artifacts_is_shown_by_nothing(call):
    told = call("doctor", FREM_SEARCH_ARTIFACTS="memory://me:secret@bucket/x")
    assert "memory://***@bucket/x, written, read and removed" in told.stdout
    told = call("doctor", FREM_SEARCH_ARTIFACTS="nothing://me:secret@bucket/x")
    assert "nothing://***@bucket/x: cannot be used for artifacts" in told.stdout
    assert "secret" not in told.stdout + told.stderr


def test_a_variable_that_cannot_be_read_is_named(call):
    answer = call("run", "--study", "s", FREM_SEARCH_N_TRIALS="many")
    assert answer.returncode == 2
    assert "FREM_SEARCH_N_TRIALS" in answer.stderr


@pytest.mark.parametrize("command", ["run", "trials"])
def test_an_unknown_study_is_2(call, command):
    args = ["--quick"] if command == "trials" else []
    told = call(command, "--study", "mouse_fram", *args)
    assert_told(told, 2, "Unknown study 'mouse_fram'. Did you mean 'mouse_frem'? `frem-search study list` shows")
    assert len(told.stderr) < 200


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[budget]", "budgte = 1\n[budget]", "budgte: unknown key. Did you mean 'budget'?"),
        ("n_trials = 3", "n_trials = 'three'", "budget.n_trials: expected an integer of at least 1, but got 'three'."),
        ("low = 0, high = 16", "low = 16, high = 0", "params.B: low must be below high, but got 16 and 0. Swap them"),
        ("[params]", "[params", "not a TOML file: "),
        ("high = 16", "high = 17", "params.B: expected 0 to 16, the bottleneck's maps, but got 17."),
        ('"unet"', '"unte"', "network: Unknown network 'unte'. Did you mean 'unet'? Known: "),
        ("depth = 2", "deepth = 2", "params.deepth: expected one of the parameters of unet"),
        ("batch_size = ", "batch_size = 0 # ", "params.batch_size: expected an integer of at least 1, but got 0."),
    ],
)
def test_a_wrong_study_file_is_2_and_begins_nothing(call, changed_study, storage_url, storage, old, new, says):
    path = changed_study(old, new)
    told = call("run", "--study", path, FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 2, f"frem-search: {path}: ", says)
    assert storage.optuna.get_all_studies() == []


def test_the_mouse_images_are_asked_for_from_their_owners(call, storage_url):
    told = call("run", "--study", "mouse_unet", FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 1, "Dataset 'mouse': expected its images in ", "ask the authors of Imanishi et al. 2018")
    assert "`--dataset mouse_synthetic` or `--quick` runs on generated cells" in told.stderr


def test_an_unknown_dataset_is_told_with_the_nearest(call, tiny_study, storage_url):
    told = call("run", "--study", tiny_study, "--dataset", "mouse_syntetic", FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 2, "Unknown dataset 'mouse_syntetic'. Did you mean 'mouse_synthetic'? Known: ")


@pytest.mark.parametrize("part", ["imagesTr/case03_0000.png", "labelsTr/case03.png"])
def test_an_unreadable_image_is_named_before_the_first_trial(
    call, tiny_study, tiny_dataset, tmp_path, storage, storage_url, part
):
    folder = tmp_path / "torn"
    shutil.copytree(tiny_dataset, folder)
    (folder / part).write_bytes((folder / part).read_bytes()[:60])
    told = call("run", "--study", tiny_study, "--dataset", folder, FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 1, f"frem-search: {folder / part}: expected a readable PNG or TIFF image, but got: ")
    assert storage.optuna.get_all_studies() == []


@pytest.mark.parametrize("fold", [1, 99])
def test_a_fold_that_is_not_there_is_told(call, changed_study, storage_url, fold):
    path = changed_study("[budget]", f"fold = {fold}\n[budget]")
    told = call("run", "--study", path, FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 1, f"expected a fold from 0 to 0, but got {fold}.")


@pytest.mark.parametrize(
    ("device", "status", "says"),
    [
        (["gpu"], 2, "--device: expected auto, cpu, cuda or cuda:N, but got 'gpu'."),
        (["cpu:7"], 2, "--device: expected auto, cpu, cuda or cuda:N, but got 'cpu:7'."),
        (
            ["cpu,cpu,cpu", "--workers", 2],
            2,
            "--device: expected at most one for each of --workers 2, but got cpu, cpu",
        ),
        (["cuda:99"], 1, "--device cuda:99: this machine has "),
    ],
)
def test_a_device_that_is_none_is_2_and_one_that_is_not_here_is_1(call, tiny_study, storage_url, device, status, says):
    told = call("run", "--study", tiny_study, "--device", *device, FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, status, says)


@pytest.mark.parametrize("command", ["run", "worker"])
def test_a_cohort_that_is_none_is_refused_before_anything_is_opened(call, tiny_study, command):
    told = call(command, "--study", tiny_study, "--cohort", "foo", "--storage", NOBODY)
    assert_told(told, 2, "--cohort: expected auto or a number of trials from 1 to 64, but got 'foo'.")


def test_an_unknown_format_is_2(call, tiny_study):
    told = call("trials", "--study", tiny_study, "--format", "xml", FREM_SEARCH_STORAGE=NOBODY)
    assert_told(told, 2, "--format: expected one of table, csv, json, but got 'xml'.")


def test_a_study_that_was_never_begun_is_1(call, tiny_study, storage_url):
    told = call("status", "--study", tiny_study, FREM_SEARCH_STORAGE=storage_url)
    assert_told(told, 1, "tiny: no such study in the storage (postgresql://", "). Start it with `frem-search run`")


# The database


@pytest.mark.parametrize("command", ["run", "status", "trials", "figures"])
def test_a_database_out_of_reach_is_1(call, tiny_study, command):
    told = call(command, "--study", tiny_study, "--storage", NOBODY)
    assert_told(told, 1, "storage postgresql://me@127.0.0.1:1/db: the database cannot be reached or refuses: ")
    assert "Connection refused. Check that it runs, the URL, the role" in told.stderr


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://me:secret@h/db", "no url", "postgresql://me@h:port/db"])
def test_a_storage_that_is_no_postgresql_is_2(call, tiny_study, url):
    told = call("status", "--study", tiny_study, FREM_SEARCH_STORAGE=url)
    assert_told(told, 2, "storage: expected ")
    assert "secret" not in told.stderr


SECRETS = ["se{cret}", "s3cret@w0rd", "50%s3cret", "%zzs3cret", "s3cret%40w0rd", "12:s3cret", "{SCHEMA_VERSION}"]


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://me:{secret}@127.0.0.1:1/db" for secret in (*SECRETS, "a/s3cret#?w0rd")),
        *(f"postgresql://me@127.0.0.1:1/db?password={secret}" for secret in SECRETS),
    ],
)
def test_a_password_is_never_printed(call, tiny_study, url):
    told = call("status", "--study", tiny_study, FREM_SEARCH_STORAGE=url)
    assert_told(told, 2 if "storage: expected " in told.stderr else 1, "storage")
    for piece in ("cret", "w0rd", "SCHEMA", "%zz", "50%"):
        assert piece not in told.stderr


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@localhost:1/db", "postgresql://me@localhost:1/db?password=secret"]
)
def test_a_password_on_the_command_line_is_refused(call, tiny_study, url):
    told = call("status", "--study", tiny_study, "--storage", url)
    assert_told(told, 2, "--storage: a password on the command line can be read by every user of this machine.")
    assert "FREM_SEARCH_STORAGE" in told.stderr
    assert "secret" not in told.stderr


# A search


STATUS_KEYS = [
    "study", "storage", "dataset", "score", "n_trials", "n_epochs", "states", "best", "workers", "waiting",
    "time_left_s",
]  # fmt: skip
STATES = ["complete", "pruned", "running", "waiting", "enqueued", "fail"]
TRIAL_KEYS = [
    "number", "state", "value", "params", "user_attrs", "started", "finished", "epoch", "attempts", "total_attempts",
    "reason",
]  # fmt: skip


def test_a_search_from_its_first_call_to_its_tables(call, tiny_study, storage_url, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    first = call("run", "--study", tiny_study, "--n-trials", "2", "--device", "cpu", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["states"]["complete"] == 2
    begun, so_far, *told, end = first.stderr.splitlines()
    assert re.fullmatch(r"tiny: dataset tiny, artifacts .*/artifacts/tiny-\w{8}, device cpu, 1 thread", begun)
    assert so_far == "tiny: 0 of 2 trials finished"
    assert [line.partition(": mean_iou ")[0] for line in told] == ["[1/2] trial 0", "[2/2] trial 1"]
    assert told[0].endswith("  best so far")
    assert end == "budget spent: 2 of 2 trials finished"

    again = call("run", "--study", tiny_study, "--n-trials", "2", "--device", "cpu")
    assert (again.returncode, again.stderr.splitlines()) == (0, [begun, "tiny: 2 of 2 trials finished", end])
    assert "  trials    2 of 2 finished: 2 complete\n" in again.stdout

    more = call("worker", "--study", tiny_study, "--device", "cpu")
    assert [line.partition(": mean_iou ")[0] for line in more.stderr.splitlines()] == [
        begun,
        "tiny: 2 of 3 trials finished",
        "[3/3] trial 2",
        "budget spent: 3 of 3 trials finished",
    ]
    assert (more.returncode, more.stdout) == (0, "")

    status = json.loads(call("status", "--study", tiny_study, "--json").stdout)
    assert list(status) == STATUS_KEYS
    assert list(status["states"]) == STATES
    assert list(status["best"]) == ["number", "value", "params"]
    assert (status["study"], status["dataset"], status["n_trials"], status["workers"]) == ("tiny", "tiny", 3, [])
    assert (status["score"], status["n_epochs"], status["waiting"], status["time_left_s"]) == ("mean_iou", 3, [], 0.0)

    trials = json.loads(call("trials", "--study", tiny_study, "--format", "json").stdout)
    assert [list(trial) for trial in trials] == [TRIAL_KEYS] * 3
    assert [list(trial["user_attrs"]) for trial in trials] == [["result", "provenance"]] * 3
    assert [sorted(trial["params"]) for trial in trials] == [["B", "X"]] * 3
    assert max(trial["value"] for trial in trials) == status["best"]["value"]

    rows = list(csv.DictReader(io.StringIO(call("trials", "--study", tiny_study, "--format", "csv").stdout)))
    assert [float(row["value"]) for row in rows] == [trial["value"] for trial in trials]
    assert [(int(row["B"]), float(row["X"])) for row in rows] == [
        (trial["params"]["B"], trial["params"]["X"]) for trial in trials
    ]
    table = call("trials", "--study", tiny_study).stdout.splitlines()
    assert table[0].split() == ["trial", "state", "mean_iou", "test", "B", "X", "epoch", "seconds", "reason"]
    assert [line.split()[:2] for line in table[1:]] == [["0", "complete"], ["1", "complete"], ["2", "complete"]]


SECTIONS = """
dataset = "{dataset}"
network = "clmser"
loss = "smooth_l1"
score = "v_rand"
extra_scores = ["v_info", "v_rand_multicut", "v_info_multicut"]
budget = {{ n_trials = 2, n_epochs = 1 }}
params = {{ base_channels = 2, depth = 2, batch_size = 2 }}
"""


@pytest.fixture
def sections(tmp_path):
    """The path of a study of images of two classes, membrane and cell."""
    rng = np.random.default_rng(0)
    cases = []
    for i in range(6):
        label = np.ones((24, 24), np.uint8)
        label[4 + i * 2], label[:, 12] = 0, 0
        cases.append(Case(f"case{i}", rng.poisson(60 + 60 * label).astype(np.uint8), label))
    names = [case.name for case in cases]
    folder = tmp_path / "sections"
    folder.mkdir()
    split = Split(tuple(names[:4]), tuple(names[4:5]), tuple(names[5:]))
    write_folder(folder, cases, class_names=("membrane", "cell"), splits=[split])
    path = tmp_path / "cut.toml"
    path.write_text(SECTIONS.format(dataset=folder))
    return path


@pytest.fixture
def plain_install(monkeypatch, tmp_path):
    """A machine without the package that cuts cells apart, in this process and in those that it starts."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "bioimage_cpp.py").write_text("raise ModuleNotFoundError(name='bioimage_cpp')\n")
    monkeypatch.setitem(sys.modules, "bioimage_cpp", None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(shadow), str(REPOSITORY)]))


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_study_runs_without_the_package_of_an_extra_score(call, sections, plain_install, storage_url, n_workers):
    options = ("--study", sections, "--device", "cpu")
    ran = call("run", *options, "--workers", str(n_workers), FREM_SEARCH_STORAGE=storage_url)
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if "left out" in line]
    assert len(told) == 1, ran.stderr
    assert told[0].startswith("cut: left out and stored as null: v_rand_multicut, v_info_multicut. Multicut: expected ")
    assert '`pip install "frem-search[multicut]"`' in told[0]
    trials = json.loads(call("trials", "--study", sections, "--format", "json").stdout)
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    for trial in trials:
        extra = trial["user_attrs"]["result"]["extra"]
        assert list(extra) == ["v_info", "v_rand_multicut", "v_info_multicut"]
        assert extra["v_rand_multicut"] == extra["v_info_multicut"] == {"val": None, "test": None}
        assert all(0 <= value <= 1 for value in extra["v_info"].values())
    trained = call("train", *options, "--out", sections.with_name("weights.pt"), "--json")
    assert trained.returncode == 0, trained.stderr
    assert "cut: left out and stored as null: v_rand_multicut, v_info_multicut. " in trained.stderr
    assert json.loads(trained.stdout)["result"]["extra"]["v_rand_multicut"] == {"val": None, "test": None}


def test_a_study_that_searches_for_a_score_needs_its_package(call, sections, plain_install, storage_url):
    sections.write_text(sections.read_text().replace('score = "v_rand"\n', 'score = "v_rand_multicut"\n'))
    ran = call("run", "--study", sections, "--device", "cpu", FREM_SEARCH_STORAGE=storage_url)
    assert ran.returncode == 2
    assert "expected the package bioimage-cpp, but it is not installed." in ran.stderr


def test_other_settings_are_refused_and_nothing_is_changed(call, changed_study, tiny_study, storage_url, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    assert call("run", "--study", tiny_study, "--n-trials", "1", "--n-epochs", "1").returncode == 0
    before = call("trials", "--study", tiny_study, "--format", "json").stdout
    changed_study("high = 16", "high = 8")
    told = call("run", "--study", tiny_study, "--n-epochs", "1")
    assert (told.returncode, told.stdout) == (1, "")
    assert "tiny: this study was begun with other settings" in told.stderr
    assert '"high": 16' in told.stderr
    assert "study fork" in told.stderr
    assert call("trials", "--study", tiny_study, "--format", "json").stdout == before


def test_artifacts_that_do_not_fit_the_disk_lose_no_trial(tiny_study, storage_url, home, call):
    limited = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh", sys.executable, "-c", PROGRAM]  # files of at most 8 kB
    environment = os.environ | {"FREM_SEARCH_STORAGE": storage_url, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*limited, "run", "--study", str(tiny_study)], env=environment, capture_output=True, text=True, check=False
    )
    *begun, last = run.stderr.splitlines()
    assert [line.partition(":")[0] for line in begun] == ["tiny", "tiny"]
    run.stderr = f"{last}\n"
    assert_told(run, 1, "weights.pt: cannot be written (", "File too large. Free space", "set FREM_SEARCH_ARTIFACTS")
    assert [path for path in (home / "artifacts").rglob("*") if "weights" in path.name] == []
    status = call("status", "--study", tiny_study, "--json", FREM_SEARCH_STORAGE=storage_url)
    assert json.loads(status.stdout)["states"] == dict.fromkeys(STATES, 0) | {"waiting": 1}


def test_ctrl_c_lets_go_of_the_trial_with_its_checkpoint(start_cli, call, tiny_study, storage_url, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    running = start_cli("run", "--study", tiny_study, "--n-epochs", "100000")
    give_up_at = time.monotonic() + 60
    workers = []
    while not workers and time.monotonic() < give_up_at:
        shown = call("status", "--study", tiny_study, "--json")
        workers = json.loads(shown.stdout)["workers"] if shown.returncode == 0 else []
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "SIGINT: stopping after this epoch; once more to stop at once. No trial is lost." in err
    assert err.endswith("trial 0: released: stopped\nstopped: 0 of 3 trials finished\n")
    assert "Traceback" not in err
    assert "0 of 3 finished: 1 waiting" in out
    (trial,) = json.loads(call("trials", "--study", tiny_study, "--format", "json").stdout)
    assert (trial["number"], trial["state"], trial["reason"]) == (0, "waiting", "stopped")
    assert trial["epoch"] > 0


def test_a_stop_while_the_database_is_away_is_a_stop(start_cli, call, tiny_study, tcp_server, tcp_database, tmp_path):
    """What is not told any more is looked up later; its trials wait."""
    url = tcp_server.url(database=tcp_database)
    options = ["--study", tiny_study, "--n-epochs", 100_000, "--checkpoint-every", 0]
    commands = [start_cli(command, *options, FREM_SEARCH_STORAGE=url) for command in ("run", "worker")]
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at:
        shown = call("status", "--study", tiny_study, "--json", FREM_SEARCH_STORAGE=url)
        if shown.returncode == 0 and len(json.loads(shown.stdout)["workers"]) == 2:
            break
    tcp_server.stop()
    try:
        for command in commands:
            command.send_signal(signal.SIGINT)
        told = [command.communicate(timeout=60) for command in commands]
    finally:
        tcp_server.start()
    assert [command.returncode for command in commands] == [130, 130]
    for out, err in told:
        assert out == ""
        assert err.splitlines()[-1].startswith("stopped; storage postgresql://")
    states = json.loads(call("status", "--study", tiny_study, "--json", FREM_SEARCH_STORAGE=url).stdout)["states"]
    assert {state: n for state, n in states.items() if n} == {"waiting": 2}


@pytest.mark.parametrize("command", [["status"], ["trials"], ["trials", "--format", "json"]])
def test_a_reader_that_has_gone_is_no_error(call, tiny_study, storage_url, monkeypatch, command):
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    call("run", "--study", tiny_study, "--n-trials", "1", "--n-epochs", "1")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, nothing would be left to write when Python exits
    reader, writer = os.pipe()
    os.close(reader)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", PROGRAM, *command, "--study", str(tiny_study)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert answer.stderr == ""
    assert answer.returncode in (1, 141)
