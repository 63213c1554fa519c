"""Whatever the arguments are: success, or an error of ours in words; never a traceback."""

import io
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frem_search.cli import app, main

SECRET = "s3cret"
# Stand for paths of the test, which are known only when it runs.
HERE = ["<missing>", "<missing>/x", "<folder>", "<text>", "<text>/x", "<bytes>"]
NUMBERS = ["-1", "0", "1.5", "nan", "inf", "-inf", "1e999", "0x10", "9" * 400, "\u0663\u066b\u0665"]
WORDS = [
    "",
    " ",
    "\n",
    "a\nb",
    "\udcff",
    "é\u202e",
    "--",
    "-",
    "--study",
    "%s",
    "{0}",
    "$HOME",
    "..",
    "null",
    "true",
]
LISTS = [",", ",,", "1,,2", "0,1", "a,b", "=", "a=b", "[", "x" * 300, "x" * 5000]
HOSTILE = st.sampled_from(HERE + NUMBERS + WORDS + LISTS) | st.text("aé-_./=,:{%\\ \U0001f52c", max_size=8)
NOBODY = "postgresql://me@127.0.0.1:1/db"
# What is right by the parameter's name. Nothing here trains for long, asks a network or leaves the folder of the test;
# the study <tiny> is finished. What may be left out stands here only where it must not be.
RIGHT = {
    "study": ["<tiny>"],
    "studies": ["<tiny>"],
    "source": ["tiny"],
    "dataset": ["<dataset>"],
    "artifacts": ["<artifacts>"],
    "device": ["cpu"],
    "workers": ["1"],
    "engine": ["local"],
    "cohort": ["1"],
    "n_trials": ["1"],
    "n_epochs": ["1"],
    "checkpoint_every": ["0"],
    "format": ["json", "html", "csv"],
    "only": ["history"],
    "settings": ["B=1", "X=2.5"],
    "trial": ["0", "best"],
    "part": ["test", "val"],
    "fold": ["0"],
    "images": ["<image>"],
    "out": ["<folder>/new"],
    "sqlite": ["<folder>/new.db"],
    "name": ["folder"],
    "new_name": ["cells"],
    "class_names": ["ground,disc,square"],
    "port": ["0"],
    "host": ["127.0.0.1"],
    "precision": ["fp32"],
    "repeats": ["1"],
    "seconds": ["0"],
    "cohorts": ["1"],
    "layouts": ["in_turn"],
    "processes": ["1"],
}
# What is nearly so; where nothing stands, what is hostile to any parameter must do.
NEARLY = {
    "study": ["tiny", "<broken>", "mouse_fram", "tiny@cells"],
    "studies": ["mouse_fram", "<broken>"],
    "source": ["tiny-quick", "<dataset>"],
    "dataset": ["mouse", "mouse_syntetic", "<folder>"],
    "storage": [
        NOBODY, NOBODY.replace("me@", f"me:{SECRET}@"), f"{NOBODY}?password={SECRET}", "sqlite:///x.db", "postgres://",
        "postgresql://[::1/db", "postgresql://me@127.0.0.1:99999/db", "postgresql+nothing://me@127.0.0.1:1/db",
        "postgresql://me@127.0.0.1:1/db?connect_timeout=x", "postgresql://me@127.0.0.1:1/db?nothing=x",
    ],
    "artifacts": ["memory://a", "nothing://a", "s3://a/b", "file://"],
    "device": ["cuda:99", "cuda", "gpu", "cpu,cpu", "cpu,"],
    "engine": ["slurm"],
    "gpus_per_worker": ["0.5"],
    "cohort": ["one"],
    "format": ["table", "html,csv", "bmp"],
    "only": ["histroy", "history,tpe_scatter"],
    "settings": ["B", "B=", "=1", "B=nan", "B=[1", "X=1e999", "depth=2", "B=true", "image_size=[32,32]", "B=17"],
    "trial": ["7", "worst", "01"],
    "part": ["tets"],
    "fold": ["7"],
    "weights": ["<text>", "<bytes>", "<missing>"],
    "images": ["<text>", "<bytes>", "<label>"],
    "out": ["<text>", "<folder>"],
    "sqlite": ["<text>"],
    "file": ["<text>", "<bytes>"],
    "name": ["mouse", "drosophila"],
    "class_names": ["a,a", "ground"],
    "port": ["70000"],
    "host": ["::1", "256.1.1.1"],
    "token_file": ["<text>"],
    "precision": ["fp8"],
    "cohorts": ["0", "1,1", "64"],
    "layouts": ["stacked", "in_trun"],
}  # fmt: skip
ALWAYS = {  # what would train, measure or draw for seconds otherwise, or take the study away from the other calls
    "train": {"dataset": ["<missing>"]},
    "bench": {"dataset": ["<missing>"]},
    "figures": {"format": ["html", "bmp", "html,,"], "only": ["history", "histroy"]},
    "db upgrade": {"storage": NEARLY["storage"]},
    "study delete": {"study": ["mouse_fram", "<tiny>", "tiny-quick"]},
    "study check": {"studies": ["<tiny>", "<broken>", "mouse_fram"]},
}


USUALLY = {"study fork": {"study": ["<other>"]}, "data prepare": {"source": ["<pictures>"]}}


def commands(group=None, path=()):
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


@st.composite
def calls(draw):
    """Words and variables of a call of which up to two parameters are wrong, and the others right or left out."""
    path = draw(st.sampled_from(list(COMMANDS)))
    always, usually = ALWAYS.get(" ".join(path), {}), RIGHT | USUALLY.get(" ".join(path), {})
    given = [
        param
        for param in COMMANDS[path].params
        if param.name in always
        or (param.name != "help" and (param.required or param.name == "study" or not draw(st.integers(0, 3))))
    ]
    n_wrong = draw(st.sampled_from([0, 0, 1, 1, 2]))
    wrong = {param.name for param in draw(st.permutations(given))[:n_wrong]}
    if draw(st.integers(0, 9)) == 0:
        given = [param for param in given if param.name not in wrong.difference(always)]  # required or not
    words, variables = [], {}
    for param in given:
        nearly, right = NEARLY.get(param.name, []), usually.get(param.name, [])
        usual = right if right and param.name not in wrong else nearly or ["1"]
        values = st.sampled_from(always.get(param.name) or usual)
        value = draw(values | HOSTILE if param.name in wrong and param.name not in always else values)
        if param.param_type_name == "argument":
            words += ["--", value] if value.startswith("-") else [value]
        elif param.envvar and draw(st.booleans()):
            variables[param.envvar] = value
        elif param.is_flag:
            words.append(param.opts[0])
        else:
            words += draw(st.sampled_from([[param.opts[0], value], [f"{param.opts[0]}={value}"]]))
    if draw(st.integers(0, 19)) == 0:
        words += draw(st.lists(HOSTILE, min_size=1, max_size=2))
    return [*path, *words], variables


class Streams:
    """stdout and stderr as a terminal of UTF-8 has them: what cannot be encoded is an error on the first alone."""

    def __init__(self):
        self.out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        self.err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")

    def told(self):
        self.out.flush()
        self.err.flush()
        return self.out.buffer.getvalue().decode(), self.err.buffer.getvalue().decode()


@contextmanager
def replaced(words, variables):
    before, argv, streams = dict(os.environ), sys.argv, (sys.stdout, sys.stderr)
    ours = Streams()
    os.environ.update(variables)
    sys.argv, sys.stdout, sys.stderr = ["frem-search", *words], ours.out, ours.err
    try:
        yield ours
    finally:
        sys.argv, (sys.stdout, sys.stderr) = argv, streams
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def world(tmp_path, tiny_study, tiny_dataset, storage_url, storage, monkeypatch):
    """What the calls find: a finished study, its images, and files that are no good. Gives the paths by their names."""
    from frem_search.search.begin import open_worker
    from frem_search.study.file import load_study_file

    text = tiny_study.read_text()
    tiny_study.write_text(text.replace("n_trials = 3", "n_trials = 1").replace("n_epochs = 3", "n_epochs = 1"))
    artifacts = tmp_path / "artifacts"
    with open_worker(load_study_file(str(tiny_study)), storage, device="cpu", artifacts=str(artifacts)) as opened:
        list(opened.worker.work())
    deep = tmp_path / "so" / "deep" / "that" / "dots" / "lead" / "nowhere" / "else"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setenv("FREM_SEARCH_STORAGE", storage_url)
    monkeypatch.setenv("FREM_SEARCH_ARTIFACTS", str(artifacts))
    paths = {"tiny": tiny_study, "dataset": tiny_dataset, "artifacts": artifacts}
    paths |= {"image": tiny_dataset / "imagesTr/case00_0000.png", "label": tiny_dataset / "labelsTr/case00.png"}
    paths |= {name: tmp_path / name for name in ("missing", "folder", "text", "bytes")}
    paths |= {name: tmp_path / f"{name}.toml" for name in ("broken", "other")}
    paths["broken"].write_text(text.replace("high = 16", "high = 17"))
    paths["other"].write_text(tiny_study.read_text())
    paths["pictures"] = tmp_path / "pictures"
    for kind, suffix in (("images", "_0000"), ("labels", "")):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for i in range(4):
            source = tiny_dataset / f"{kind}Tr" / f"case{i:02d}{suffix}.png"
            (tmp_path / "pictures" / kind / f"{i}.png").write_bytes(source.read_bytes())
    paths["folder"].mkdir()
    paths["text"].write_text("some\ntext\n")
    paths["bytes"].write_bytes(b"\x89PNG\r\n\x1a\n\xff\x00" + bytes(64))
    monkeypatch.setattr("frem_search.dashboard.server.serve", lambda *_, **__: None)  # it would until Ctrl-C
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield {f"<{name}>": str(path) for name, path in paths.items()}
    for number, handler in handlers.items():
        signal.signal(number, handler)


def in_world(world, text):
    for name, path in world.items():
        text = text.replace(name, path)
    return text


@given(call=calls())
@settings(
    derandomize=True,
    max_examples=1000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_the_arguments_are_it_succeeds_or_says_why(world, call):
    words = [in_world(world, word) for word in call[0]]
    variables = {name: in_world(world, value) for name, value in call[1].items()}
    with replaced(words, variables) as streams, pytest.raises(SystemExit) as ended:
        main()
    out, err = streams.told()
    assert ended.value.code in (0, 1, 2), err
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    if ended.value.code:
        assert err.strip() or out.strip()  # doctor and `study check` print what they found
    assert Path(world["<text>"]).read_text() == "some\ntext\n"


def test_every_command_is_called():
    assert len(COMMANDS) >= 24
    assert {name for each in ALWAYS for name in [tuple(each.split())]} <= set(COMMANDS)
