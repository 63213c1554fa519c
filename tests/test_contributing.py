"""The files for contributors are true: what they name is there, and what two files say is the same in both."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from places import REPOSITORY

from frem_search import __version__
from frem_search.study.parameters import ALLOWED, TRAINING_PARAMS

MAKEFILE = (REPOSITORY / "Makefile").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
WORKFLOW = ".github/workflows/ci.yml"
FORMS = ".github/ISSUE_TEMPLATE"


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [WORKFLOW]),
        ("custom.github-workflows-require-timeout", [WORKFLOW]),
        ("vendor.github-issue-forms", [f"{FORMS}/bug.yml", f"{FORMS}/feature.yml"]),
        ("vendor.citation-file-format", ["CITATION.cff"]),
    ],
)
def test_what_others_read_keeps_to_its_schema(schema, files):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *files], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_may_only_read_and_runs_what_must_hold_on_the_oldest_python():
    workflow = yaml.safe_load((REPOSITORY / WORKFLOW).read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"


def test_the_workflow_installs_what_ci_run_would_have_to_be_root_for():
    (installs,) = re.findall(r"--no-install-recommends (.*)", (REPOSITORY / WORKFLOW).read_text())
    (wanted,) = re.findall(r"slurmctld .*lacking\+=\((.*)\)", (REPOSITORY / ".ci" / "run").read_text())
    assert installs == wanted


def test_make_help_names_every_target():
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    shown = dict(re.findall(r"^make (\w+) +(\S.*)$", done.stdout, flags=re.MULTILINE))
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert list(shown) == targets.split()


def test_hooks_run_what_make_lint_runs():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    (repository,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]


def test_contributing_names_files_that_are_there():
    named = set(re.findall(r"\b(?:frem_search|tests|docs)/[\w/.]*\w/?", CONTRIBUTING))
    assert len(named) > 15
    assert [name for name in named if "NAME" not in name and not (REPOSITORY / name).exists()] == []
    assert [name for name in named if "NAME" in name and not (REPOSITORY / name).parent.is_dir()] == []


def test_contributing_names_dicts_that_are_there():
    placed = re.findall(r"`([A-Z]+)` in `(frem_search/[\w/.]+)`", CONTRIBUTING)
    assert len(placed) == 5
    for name, file in placed:
        assert f"\n{name}: dict[" in (REPOSITORY / file).read_text()


def test_every_training_parameter_says_what_it_may_be():
    assert sorted(ALLOWED) == sorted(TRAINING_PARAMS)


def test_the_citation_is_of_this_version():
    released = f"\n## {CITATION['version']}, {CITATION['date-released']}\n"
    assert CITATION["version"] == __version__
    assert released in (REPOSITORY / "docs" / "changelog.md").read_text()


def test_the_citation_has_the_papers_of_the_readme():
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    for paper in CITATION["references"]:
        authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
        assert f'{authors}, "{paper["title"]}"' in readme
    assert len(CITATION["references"]) == 4
