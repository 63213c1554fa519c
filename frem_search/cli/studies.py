"""Commands about study files and stored studies: study list, show, check, fork, delete."""

import json
import sys
import tomllib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frem_search.cli.options import (
    ArtifactsOption,
    DatasetOption,
    EpochsOption,
    JsonOption,
    QuickOption,
    StorageOption,
    TrialsOption,
    artifacts_of,
    is_stored_alone,
    storage_of,
    study_names,
)
from frem_search.cli.rows import aligned

if TYPE_CHECKING:
    from frem_search.search.fork import Fork
    from frem_search.study.file import StudyFile
    from frem_search.study.space import Param

StudyArgument = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="Name of a study, or path of its .toml file.", autocompletion=study_names),
]
StoredOption = Annotated[bool, typer.Option("--stored", help="Look into the database as well.")]
WRONG = 2


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    for name, command in (("list", list_), ("show", show), ("check", check), ("fork", fork), ("delete", delete)):
        group.command(name)(command)
    app.add_typer(group, name="study", help="List, show, check, fork and delete studies.")


def list_(stored: StoredOption = False, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """List the study files that can be named, and with --stored the studies in the database too.

    Files in ./studies come before shipped ones of the same name; a file that is wrong is listed with its mistake.

    \b
    $ frem-search study list --stored
    """
    from frem_search.study.file import list_study_files

    files = [_file_row(str(path)) for path in list_study_files()]
    kept = _stored_rows(storage) if stored else []
    if as_json:
        typer.echo(json.dumps({"files": files} | ({"stored": kept} if stored else {}), indent=2))
        return
    columns = ["name", "dataset", "trials", "epochs", "title"]
    rows = [columns, *([str(row.get(name, "")) for name in columns] for row in files)]
    typer.echo("\n".join(aligned(rows)))
    if stored:
        columns = ["name", "dataset", "finished", "trials", "epochs", "best", "title"]
        rows = [["stored", *columns[1:]], *([_cell(row[name]) for name in columns] for row in kept)]
        typer.echo("\n" + "\n".join(aligned(rows)))


def _file_row(path: str) -> dict[str, Any]:
    from pathlib import Path

    from frem_search.errors import StudyFileError
    from frem_search.study.file import load_study_file

    try:
        study_file = load_study_file(path)
    except StudyFileError as error:
        return {"name": Path(path).stem, "path": path, "title": f"wrong: {error}"}
    return {
        "name": study_file.name,
        "path": path,
        "title": study_file.title,
        "dataset": study_file.dataset,
        "trials": study_file.n_trials,
        "epochs": study_file.n_epochs,
    }


def _stored_rows(storage: str | None) -> list[dict[str, Any]]:
    from frem_search.study.listing import list_stored

    with storage_of(storage) as opened:
        return [
            {
                "name": study.name,
                "title": study.title,
                "dataset": study.dataset,
                "finished": study.n_finished,
                "trials": study.n_trials,
                "epochs": study.n_epochs,
                "best": study.best,
            }
            for study in list_stored(opened)
        ]


def _cell(value: object) -> str:
    from frem_search.study.status import format_value

    return "" if value is None else format_value(value)


def show(
    study: StudyArgument,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    stored: StoredOption = False,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a study as a run would take it: every setting, those of [quick] merged in, and the search space.

    With --stored also under what settings it was begun, which is what a run is compared with.

    \b
    $ frem-search study show mouse_frem --quick
    """
    from frem_search.study.file import load_study_file

    if stored and is_stored_alone(study, quick=quick, dataset=dataset):
        _show_stored_alone(study, storage, as_json=as_json)
        return
    study_file = load_study_file(study, quick=quick, dataset=dataset)
    contract = _contract(study_file.name, storage) if stored else None
    settings = _settings(study_file)
    if as_json:
        from frem_search.study.space import space_to_json

        shown = {**settings, "params": space_to_json(study_file.space)} | ({"contract": contract} if stored else {})
        typer.echo(json.dumps(shown, indent=2))
        return
    typer.echo("\n".join(aligned([[key, str(value)] for key, value in settings.items()])))
    rows = [["parameter", "kind", "values"], *([name, *_describe(param)] for name, param in study_file.space.items())]
    typer.echo("\n" + "\n".join(aligned(rows)))
    if stored:
        text = "not in the database" if contract is None else json.dumps(contract, indent=2)
        typer.echo(f"\nbegun with: {text}")


def _show_stored_alone(name: str, storage: str | None, *, as_json: bool) -> None:
    """Show a study whose file lies elsewhere: what it was begun with is all that is known of it here."""
    from frem_search.study.record import read_record

    with storage_of(storage) as opened:
        contract = read_record(opened, name, has_curves=False).contract
    if as_json:
        typer.echo(json.dumps({"name": name, "contract": contract}, indent=2))
    else:
        typer.echo(f"{name}: no such study file here\n\nbegun with: {json.dumps(contract, indent=2)}")


def _contract(name: str, storage: str | None) -> dict[str, Any] | None:
    from frem_search.study.stored import stored_contract

    with storage_of(storage) as opened:
        return stored_contract(opened, name)


def _settings(study_file: "StudyFile") -> dict[str, Any]:
    pruner = ", ".join(f"{key} {value}" for key, value in study_file.pruner_settings.items())
    return {
        "name": study_file.name,
        "path": str(study_file.path),
        "title": study_file.title,
        "dataset": study_file.dataset,
        "fold": study_file.fold,
        "network": study_file.network,
        "loss": study_file.loss,
        "score": study_file.score,
        "n_trials": study_file.n_trials,
        "n_epochs": study_file.n_epochs,
        "precision": study_file.precision,
        "sampler": study_file.sampler.name,
        "n_startup_trials": study_file.sampler.n_startup_trials,
        "seed": study_file.sampler.seed,
        "pruner": study_file.pruner + (f" ({pruner})" if pruner else ""),
    }


def _describe(param: "Param") -> tuple[str, str]:
    """Return what kind of parameter it is, and its values."""
    from frem_search.study.space import Choice, Fixed

    if isinstance(param, Fixed):
        return "fixed", json.dumps(param.value)
    if isinstance(param, Choice):
        return "choice", ", ".join(map(json.dumps, param.choices))
    kind = ("integer" if param.is_integer else "float") + (", log" if param.log else "")
    return kind, f"{param.low} to {param.high}" + (f" by {param.step}" if param.step else "")


def check(
    studies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY]...", help="Names or paths; every known study without.", autocompletion=study_names
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check study files, with and without [quick], as a run does before its first trial.

    Builds the network at the edges of the space, so that a mistake is told now and not after a night.

    \b
    $ frem-search study check mouse_frem
    mouse_frem: 50 trials of 2000 epochs; quick: 30 trials of 12 epochs
    """
    from frem_search.study.file import list_study_files

    answers = [_check(name) for name in studies or map(str, list_study_files())]
    if as_json:
        typer.echo(json.dumps(answers, indent=2))
    else:
        for answer in answers:
            typer.echo(answer["error"] or answer["found"], err=bool(answer["error"]))
    if any(answer["error"] for answer in answers):
        raise typer.Exit(WRONG)


def _check(study: str) -> dict[str, Any]:
    from frem_search.errors import UsageError
    from frem_search.study.file import load_study_file
    from frem_search.training.recipe import check as check_study

    try:
        study_file = load_study_file(study)
        check_study(study_file)
        found = f"{study_file.name}: {study_file.n_trials} trials of {study_file.n_epochs} epochs"
        if "quick" in tomllib.loads(study_file.text):
            quick = load_study_file(study, quick=True)
            check_study(quick)
            found += f"; quick: {quick.n_trials} trials of {quick.n_epochs} epochs"
    except UsageError as error:
        return {"study": study, "found": "", "error": str(error)}
    return {"study": study, "found": found + _unknown_dataset(study_file.dataset), "error": ""}


def _unknown_dataset(name: str) -> str:
    """Return a remark if no dataset of that name lies on this machine: it may on the one that runs the study."""
    from pathlib import Path

    from frem_search.data.catalogue import list_datasets

    is_known = any(row.name == name for row in list_datasets()) or Path(name).expanduser().is_dir()
    return "" if is_known else f"; on this machine there is no dataset {name!r}"


def fork(
    study: StudyArgument,
    source: Annotated[str, typer.Option("--from", help="Stored study whose finished trials to copy.")],
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    n_trials: TrialsOption = None,
    n_epochs: EpochsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin a study with another space or sampler, and take over the finished trials of a stored one that fit.

    A stored study keeps the settings that it was begun with; a fork changes them without training again what was
    trained. Copied trials count towards the new budget.

    \b
    $ frem-search study fork mouse_narrow --from mouse_frem
    """
    from frem_search.search.fork import fork_study
    from frem_search.study.file import load_study_file

    study_file = load_study_file(study, quick=quick, dataset=dataset, n_trials=n_trials, n_epochs=n_epochs)
    with storage_of(storage) as opened:
        forked = fork_study(study_file, opened, source=source, artifacts=artifacts_of(artifacts))
    if as_json:
        typer.echo(json.dumps(vars(forked), indent=2))
        return
    typer.echo("\n".join(_fork_lines(forked)))


def _fork_lines(forked: "Fork") -> list[str]:
    n_copied = len(forked.copied)
    left = max(forked.n_trials - n_copied, 0)
    lines = [
        f"{forked.name}: copied {n_copied} finished trials of {forked.source}, now numbers 0 to {n_copied - 1}; "
        f"they count towards the budget of {forked.n_trials}, so {left} are left to train."
    ]
    lines += [f"  not copied: trial {number}: {reason}" for number, reason in forked.left_out.items()]
    if forked.has_other_seed:
        lines.append("  The seed differs: the copied trials began with other weights than new ones will.")
    return lines


def delete(
    study: Annotated[str, typer.Argument(metavar="NAME", help="Name under which the study is stored.")],
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while workers train its trials.")] = False,
) -> None:
    """Delete a stored study: its trials, their curves and its artifacts; nothing brings them back.

    Its file stays. While workers train its trials it refuses; with --force they end at their next report.

    \b
    $ frem-search study delete mouse_frem-quick --yes
    """
    from frem_search.study.listing import delete_stored
    from frem_search.study.record import read_record

    with storage_of(storage) as opened:
        record = read_record(opened, study, has_curves=False)
        if not is_sure:
            _ask(f"{study}: delete {len(record.trials)} trials and their artifacts from {record.storage}?")
        removed = delete_stored(opened, study, artifacts=artifacts_of(artifacts), force=force)
    found = f"and what lay in {removed.url}"
    if not removed.had_files:
        found = (
            f"but nothing lay in {removed.url}; if the study was run with --artifacts elsewhere, remove "
            f"{removed.name} there"
        )
    typer.echo(f"{study}: deleted, {len(record.trials)} trials, {found}")


def _ask(question: str) -> None:
    from frem_search.errors import UsageError

    if not sys.stdin.isatty():
        message = f"{question} Nobody is here to answer: add --yes."
        raise UsageError(message)
    if not typer.confirm(question):
        typer.echo("Nothing was deleted.")
        raise typer.Exit(1)
