"""Commands about images: data list, prepare, check, synthesize."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frem_search.cli.options import JsonOption
from frem_search.cli.rows import aligned

if TYPE_CHECKING:
    from frem_search.data.catalogue import DatasetSummary

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name that `data list` shows.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what lies there.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    for name, command in (("list", list_), ("prepare", prepare), ("check", check), ("synthesize", synthesize)):
        group.command(name)(command)
    app.add_typer(group, name="data", help="List, prepare, check and generate datasets.")


def list_(as_json: JsonOption = False) -> None:
    """List the datasets that a study can name, and whether they are here.

    Generated ones come with the first search that names them; real images are brought with `data prepare`.

    \b
    $ frem-search data list
    """
    from frem_search.data import DATASETS
    from frem_search.data.catalogue import list_datasets

    rows = list_datasets()
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=2, default=str))
        return
    cells = [["name", "here", "folder", "title"]]
    for row in rows:
        is_generated = row.name in DATASETS and DATASETS[row.name].synthesize is not None
        here = "yes" if row.is_present else ("generated" if is_generated else "no")
        cells.append([row.name, here, str(row.folder), row.title])
    typer.echo("\n".join(aligned(cells)))


def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mouse, drosophila, or folder for images of your own.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder that you bring.")],
    new_name: Annotated[
        str | None, typer.Option("--name", help="Of `folder`: what to call the dataset.", show_default=False)
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(help="Of `folder`: a name for each label value, with commas between.", show_default=False),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a folder of images into a dataset that studies can name.

    `folder` takes anybody's images: SOURCE holds images/ and labels/, PNG or TIFF, that go by the same names; labels
    are 0, 1, 2, ... for the classes.

    \b
    $ frem-search data prepare folder ~/cells --name cells --class-names background,membrane
    $ frem-search run --study mouse_frem --dataset cells
    """
    from frem_search.data.catalogue import prepare as prepare_known
    from frem_search.data.sources.folder import prepare_folder
    from frem_search.errors import UsageError

    if name == "folder":
        if new_name is None:
            message = "--name: `data prepare folder` needs a name for the dataset, such as `--name cells`."
            raise UsageError(message)
        names = None if class_names is None else [each.strip() for each in class_names.split(",")]
        written = prepare_folder(source, name=new_name, class_names=names, force=force)
    elif new_name is not None or class_names is not None:
        message = f"--name and --class-names belong to `data prepare folder`, but got {name!r}, which has its own."
        raise UsageError(message)
    else:
        written = prepare_known(name, source, force=force)
    typer.echo(f"{new_name or name}: prepared in {written}")


def check(
    dataset: Annotated[str, typer.Argument(metavar="NAME|DIR", help="A dataset's name, or an nnU-Net folder.")],
    as_json: JsonOption = False,
) -> None:
    """Read every image of a dataset, as a search does, and show what is in it.

    A missing or broken file, a wrong label or an unequal pair is told here and not in the middle of a night.

    \b
    $ frem-search data check mouse_synthetic
    """
    from frem_search.data.catalogue import check as read_all
    from frem_search.data.catalogue import summary_lines

    summary = read_all(dataset)
    typer.echo(json.dumps(_summary_json(summary), indent=2) if as_json else "\n".join(summary_lines(summary)))


def _summary_json(summary: "DatasetSummary") -> dict[str, Any]:
    return {
        "name": summary.name,
        "folder": str(summary.folder),
        "n_cases": summary.n_cases,
        "sizes": [{"rows": rows, "columns": columns, "images": n} for rows, columns, n in summary.sizes],
        "channel_names": list(summary.channel_names),
        "dtypes": list(summary.dtypes),
        "class_ratios": summary.class_ratios,
        "folds": [{"train": train, "val": val, "test": test} for train, val, test in summary.split_sizes],
        "fingerprint": summary.fingerprint,
    }


def synthesize(name: NameArgument, force: ForceOption = False) -> None:
    """Generate a dataset now, rather than with the first search that names it.

    The same images on every machine: its fingerprint says so.

    \b
    $ frem-search data synthesize mouse_synthetic
    """
    from frem_search.data.catalogue import synthesize as generate

    typer.echo(f"{name}: generated in {generate(name, force=force)}")
