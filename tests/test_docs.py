"""The documentation is true of the program: links, commands, names, modules, versions."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from cogapp import Cog
from places import MADE_BEFORE, REPOSITORY
from typer.main import get_command

from frem_search import __version__
from frem_search.cli import app
from frem_search.data import DATASETS
from frem_search.figures import FIGURES
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.metrics import METRICS
from frem_search.segmentation.networks import NETWORKS, network_params
from frem_search.study import file as study_file
from frem_search.study.parameters import TRAINING_PARAMS

DOCS = REPOSITORY / "docs"
FRONT = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*FRONT, *sorted(DOCS.glob("*.md"))]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
# Brackets keep these patterns from finding themselves.
MACHINE_PATH = re.compile(r"/(wor[k]|hom[e]|roo[t]|User[s]|mn[t])/|\b[A-Z]:\\\w")
PACKAGE_INDEX = re.compile(r"index-ur[l]|pypi\.or[g]|pythonhoste[d]|/simpl[e]\b|download\.pytorc[h]")


def commands(command, name):
    yield name, command
    for each in getattr(command, "commands", {}).values():
        yield from commands(each, f"{name} {each.name}")


COMMANDS = dict(commands(get_command(app), "frem-search"))


def command_lines():
    """Every `frem-search ...` line of a fenced block, as page and words."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                if re.match(r"(\w+=\S+ )*frem-search ", line.strip().removeprefix("$ ")):
                    words = list(lexer)
                    end = next((i for i, word in enumerate(words) if set(word) <= set("<>|&;")), len(words))
                    yield page.name, words[words.index("frem-search") + 1 : end]


LINES = list(command_lines())
GENERATED = ["cli.md", "networks.md"]


def text_files():
    yield from FRONT
    others = "LICENSE Makefile pyproject.toml constraints.txt .gitignore CITATION.cff .pre-commit-config.yaml"
    yield from (REPOSITORY / name for name in others.split())
    for folder in ("docs", "frem_search", "studies", "tests", "benchmarks", "recipes", "tools", ".ci", ".github"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".png", ".pyc") and MADE_BEFORE not in path.parents:
                yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert broken == []


def test_every_page_is_in_the_contents():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "frem-search"])
def test_every_command_is_documented(name):
    assert f"\n## {name}\n" in (DOCS / "cli.md").read_text()
    if not hasattr(COMMANDS[name], "commands"):
        assert f"\n| `{name}` |" in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("page", GENERATED)
def test_generated_page_is_current(page, capsys):
    assert Cog().main(["cog", "--check", str(DOCS / page)]) == 0, "Run `make docs`." + capsys.readouterr().out


def test_make_writes_and_compares_every_generated_page():
    generated = [page.name for page in PAGES if "[[[cog" in page.read_text()]
    assert generated == GENERATED
    makefile = (REPOSITORY / "Makefile").read_text()
    for option in ("-r", "--check"):
        assert f"cogapp {option} {' '.join(f'docs/{page}' for page in GENERATED)}\n" in makefile


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}: {' '.join(words)}" for page, words in LINES])
def test_command_lines_parse(page, words):
    command = get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands
        command, words = command.commands[words[0]], words[1:]
    assert command.make_context(command.name, words).command is command


def test_command_lines_are_found():
    assert {page for page, _ in LINES} >= {"README.md", "studies.md", "data.md", "figures.md", "workers.md", "cli.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_exist(page):
    for words in re.findall(r"`frem-search ([a-z][a-z ]*)", page.read_text()):
        first, *rest = words.split()
        name = f"frem-search {first}"
        assert (f"{name} {rest[0]}" if hasattr(COMMANDS[name], "commands") and rest else name) in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), flags=re.MULTILINE)) <= set(targets)


def test_named_studies_exist():
    shipped = {path.stem for path in (REPOSITORY / "studies").glob("*.toml")}
    texts = [page.read_text() for page in PAGES]
    assert {Path(name).stem for text in texts for name in re.findall(r"studies/(\w+\.toml)", text)} <= shipped
    named = {words[words.index("--study") + 1] for _, words in LINES if "--study" in words}
    assert {name for name in named if not name.endswith(".toml")} <= shipped
    assert len(named) > 2


def test_everything_that_a_study_can_name_is_described():
    shipped = {path.stem for path in (REPOSITORY / "studies").glob("*.toml")}
    params = {name for network in NETWORKS for name in network_params(network)} | set(TRAINING_PARAMS)
    params |= {name for loss in LOSSES.values() for name in loss.coefficients}
    named = {*shipped, *params, *LOSSES, *METRICS}
    for page, names in (
        ("studies.md", named), ("networks.md", NETWORKS), ("data.md", DATASETS), ("figures.md", FIGURES),
    ):  # fmt: skip
        first_cells = re.findall(r"^\| (`[^|]*) \|", (DOCS / page).read_text(), flags=re.MULTILINE)
        described = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
        assert sorted(set(names) - described) == [], page


def test_design_names_every_room():
    package = REPOSITORY / "frem_search"
    folders = {str(path.parent.relative_to(package)) for path in package.rglob("__init__.py")} - {"."}
    text = (DOCS / "design.md").read_text()
    house = set(re.findall(r"^ {8}(\w+)(?:/|\.py) ", text, flags=re.MULTILINE))
    assert house == {name for name in folders if "/" not in name} | {path.stem for path in package.glob("*.py")} - {
        "__init__"
    }
    assert [name for name in folders if "/" in name and f" {name.rpartition('/')[2]}/" not in text] == []


@pytest.mark.parametrize(
    "room", sorted((REPOSITORY / "frem_search").rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_every_room_says_what_it_is_for_and_names_no_file_that_is_not_there(room):
    text = ast.get_docstring(ast.parse(room.read_text()))
    assert len(text.split()) >= 5
    named = re.findall(r"`(\w+(?:\.py|/))`", text)
    assert [name for name in named if not (room.parent / name).exists()] == []


def test_design_has_the_layers_that_are_checked():
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    assert "".join(f"    {layer}\n" for layer in contract["layers"]) in (DOCS / "design.md").read_text()


def test_no_file_imports_both_optuna_and_torch():
    sources = {path: path.read_text() for path in (REPOSITORY / "frem_search").rglob("*.py")}
    optuna, torch = (
        {path for path, text in sources.items() if re.search(rf"^\s*(import|from) {name}\b", text, flags=re.MULTILINE)}
        for name in ("optuna", "torch")
    )
    assert optuna
    assert torch
    assert optuna & torch == set()


def test_decisions_are_dated_and_short():
    entries = [part for part in (DOCS / "decisions.md").read_text().split("\n\n")[2:] if not part.startswith("#")]
    for entry in entries:
        assert re.match(r"\*\*\d{4}-\d\d-\d\d\. [^*]+\?\*\* ", entry), entry
        assert "Given up: " in " ".join(entry.split()), entry
        assert len(entry.strip().splitlines()) <= 5, entry


def test_the_wheel_ships_the_studies_where_they_are_looked_up():
    shipped = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {"studies": str((Path(study_file.__file__).parent / "shipped").relative_to(REPOSITORY))}


def test_every_dependency_has_its_reason():
    text = (DOCS / "decisions.md").read_text().lower()
    names = [re.split(r"[<>=]", each)[0] for each in PYPROJECT["project"]["dependencies"]]
    assert [name for name in names if name not in text and name not in ("numpy", "optuna")] == []


def test_changelog_has_this_version():
    assert f"\n## {__version__}, " in (DOCS / "changelog.md").read_text()


def test_nothing_is_left_to_fill_in():
    assert [page.name for page in PAGES if "TODO" in page.read_text()] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, PACKAGE_INDEX], ids=["machine_path", "package_index"])
def test_no_file_names_a_machine(pattern):
    found = {str(path): match[0] for path in text_files() if (match := pattern.search(path.read_text()))}
    assert found == {}
