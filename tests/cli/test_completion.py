"""Completion in a shell: commands, options and the names of studies, asked as bash asks."""

import os
import shlex
import subprocess
import sys

import pytest
import typer

from frem_search.cli import app

HEAVY = ("torch", "optuna", "plotly", "sqlalchemy", "psycopg2", "numpy", "scipy")
PROGRAM = "import sys; sys.argv[0] = 'frem-search'; from frem_search.cli import main; main()"
# What bash does when the last of some words is to be completed; its answers come on one line.
ASK = """
ask() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    _frem_search_completion frem-search
    echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def bash(tmp_path):
    """Run a script in a bash whose home is empty and which finds the command; return what it prints."""
    program = tmp_path / "bin" / "frem-search"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", PROGRAM])} "$@"\n')
    program.chmod(0o755)
    places = {"HOME": str(tmp_path), "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    def bash(script):
        done = subprocess.run(
            ["bash", "-c", script], env=os.environ | places, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout

    return bash


@pytest.fixture
def ask(bash):
    """The words that bash offers for the last one of a line, by the script that the command shows."""

    def ask(*words):
        script = f'eval "$(frem-search --show-completion)"\n{ASK}ask {shlex.join(["frem-search", *words])}'
        return bash(script).split()

    return ask


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["st"], ["status", "study"]),
        (["--version", "st"], ["status", "study"]),  # and not the version too
        (["status", "--js"], ["--json"]),
        (["run", "--study", "drosophila_feedback_l"], ["drosophila_feedback_lstm", "drosophila_feedback_lstm_at"]),
        (["study", "check", "mouse_frem", "h1299_e"], ["h1299_elastic"]),
        (["run", "--study", "no_such_study"], []),
    ],
)
def test_bash_offers_commands_options_and_names_of_studies(ask, words, offered):
    assert ask(*words) == offered


def test_own_studies_are_offered_but_no_name_that_a_shell_would_take_apart_or_run(ask, tmp_path):
    (tmp_path / "studies").mkdir()
    for name in (
        "my_own",
        "my-2.5",
        "my$(touch run)",
        "my`touch run`",
        "my;touch run",
        "my two",
        "my*",
        "-my",
        "my\nx",
    ):
        (tmp_path / "studies" / f"{name}.toml").touch()
    assert ask("run", "-s", "my_o") == ["my_own"]
    assert ask("run", "-s", "my") == ["my-2.5", "my_own"]
    assert not (tmp_path / "run").exists()


def test_completion_that_is_installed_is_there_in_the_next_shell(bash, tmp_path):
    (tmp_path / ".bashrc").write_text("alias mine=true\n")
    assert "completion installed in" in bash("frem-search --install-completion && true")
    assert (tmp_path / ".bashrc").read_text().startswith("alias mine=true\n")
    assert bash(f"source ~/.bashrc\n{ASK}ask frem-search workers").strip() == ""
    assert bash(f"source ~/.bashrc\n{ASK}ask frem-search work").strip() == "worker"


def test_completion_needs_nothing_heavy():
    code = f"import sys\ntry:\n    {PROGRAM}\nfinally:\n    print([n for n in {HEAVY} if n in sys.modules])"
    asked = {"_FREM_SEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "frem-search run -s mouse_fr", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout == "mouse_frem\n[]\n"


def named_studies(group=None, path=("frem-search",)):
    """Every option and argument that takes the name of a study file, with its command."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from named_studies(command, (*path, name))
            continue
        for param in command.params:
            if "--study" in param.opts or "STUDY" in (param.metavar or ""):
                yield pytest.param(command, param, id=" ".join((*path, name)))


NAMED = list(named_studies())


def test_commands_that_take_a_study_are_found():
    assert {each.id for each in NAMED} >= {"frem-search run", "frem-search doctor", "frem-search study check"}


@pytest.mark.parametrize(("command", "param"), NAMED)
def test_wherever_a_study_is_named_its_name_is_completed(command, param):
    context = command.make_context(command.name, [], resilient_parsing=True)
    assert [item.value for item in param.shell_complete(context, "mouse_fr")] == ["mouse_frem"]
