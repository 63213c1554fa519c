"""Commands for one network: train, evaluate, predict, rerun."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frem_search.cli.options import (
    ArtifactsOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    OutOption,
    QuickOption,
    StorageOption,
    StudyOption,
    artifacts_of,
    record_of,
    study_names,
)
from frem_search.errors import StudyFileError, UsageError

if TYPE_CHECKING:
    from frem_search.segmentation.weights import Weights
    from frem_search.study.record import StudyRecord

WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="A weights file that `frem-search train` wrote.", show_default=False)
]
AnyStudyOption = Annotated[
    str | None,
    typer.Option(
        "--study",
        "-s",
        envvar="FREM_SEARCH_STUDY",
        autocompletion=study_names,
        help="A stored study, of which --trial is used.",
        show_default=False,
    ),
]
TrialOption = Annotated[str, typer.Option("--trial", help="Number of a trial, or best.")]
PredictFoldOption = Annotated[
    int | None, typer.Option("--fold", help="Of a cross-validation, whose weights; else 0.", show_default=False)
]
FoldOption = Annotated[
    int | None,
    typer.Option(
        "--fold",
        help="Of a cross-validation, the fold whose weights are taken, the first one if not given; else the fold whose "
        "images are scored, the one trained on if not given.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands, in the order in which help shows them."""
    for command in (train, evaluate, predict, rerun):
        app.command()(command)


def train(
    study: StudyOption,
    out: Annotated[Path, typer.Option("--out", help="The weights file to write.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A parameter's value; may be given often.", show_default=False
        ),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option("--trial", help="Take the parameters of this trial, or of the best.", show_default=False),
    ] = None,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "auto",
    n_epochs: EpochsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one configuration without a search, and write its weights to a file.

    Only --trial needs the database. Interrupted, it leaves no file; a search would go on where it was.

    \b
    $ frem-search train --study mouse_frem --quick --set B=8 --set X=250 --out weights.pt
    """
    from dataclasses import replace

    from frem_search.cli.epochs import epoch_progress, scores_table
    from frem_search.search.stored_trial import find_trial, matching_dataset, stored_study_file, trial_params
    from frem_search.study.file import load_study_file
    from frem_search.study.space import resolve
    from frem_search.training.recipe import left_out, load_images
    from frem_search.training.single import check_target, parse_settings, save_weights, settle
    from frem_search.training.single import train as train_model

    params = parse_settings(settings or [])
    check_target(out)
    if trial is None:
        settled = settle(load_study_file(study, quick=quick, dataset=dataset, n_epochs=n_epochs), params)
        images = load_images(settled)
    else:
        with record_of(study, quick=quick, dataset=dataset, storage=storage) as (_, record):
            stored = find_trial(record, trial)
        begun = stored_study_file(record, stored, dataset=_dataset_of(study, record, quick=quick, dataset=dataset))
        begun = replace(begun, n_epochs=n_epochs or begun.n_epochs)
        settled = settle(begun, trial_params(record, stored) | params)
        images = matching_dataset(record, settled)
    if line := left_out(settled):
        typer.echo(line, err=True)
    with epoch_progress(settled.name, n_epochs=settled.n_epochs_of_trial, score=settled.score) as on_epoch:
        trained = train_model(settled, images, device=device, on_epoch=on_epoch)
    written = save_weights(trained.weights, out)
    result = trained.outcome.result
    if as_json:
        files = [str(path) for path in written]
        answer = {
            "study": settled.name,
            "weights": files[0] if len(files) == 1 else files,
            "params": resolve(settled.space, {}),
            "result": result,
        }
        typer.echo(json.dumps(answer | {"provenance": trained.provenance}, indent=2))
        return
    for path, fold in zip(written, result.get("folds", [result]), strict=True):
        typer.echo(f"{path}: {settled.name}, epoch {fold['best_epoch']} of {settled.n_epochs}, the best on val")
    columns: dict[str, Any] = {part: result[part] for part in ("val", "test") if part in result}
    if "phases" in result:
        own = {part: columns[part] for part in columns}
        other = next(phase for phase, scores in result["phases"].items() if scores != own or phase == "enhanced")
        columns |= {f"{part}, {other}": scores for part, scores in result["phases"][other].items()}
    typer.echo(scores_table(settled.score, columns), nl=False)


def evaluate(
    weights: WeightsOption = None,
    study: AnyStudyOption = None,
    trial: TrialOption = "best",
    part: Annotated[str, typer.Option("--part", help="test, val or train.")] = "test",
    fold: FoldOption = None,
    enhanced: Annotated[
        bool | None,
        typer.Option("--enhanced/--plain", help="Test with FREM or without (its Table 1); else as the study does."),
    ] = None,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score the images of a dataset with kept weights, class by class.

    With --weights, --dataset is any dataset of the same channels and classes; with --study it is, as everywhere, the
    one that the study was started with.

    \b
    $ frem-search evaluate --weights weights.pt --part val
    """
    from dataclasses import asdict

    from frem_search.cli.epochs import scores_table
    from frem_search.segmentation.evaluate import evaluate as evaluate_weights

    kept, images = _kept(
        weights, study, trial, quick=quick, dataset=dataset, storage=storage, artifacts=artifacts, fold=fold
    )
    scored = evaluate_weights(kept, dataset=images, part=part, fold=fold, device=device, enhanced=enhanced)
    if as_json:
        typer.echo(json.dumps({"study": kept.study, "trial": kept.trial} | asdict(scored), indent=2))
        return
    typer.echo(f"{_named(kept)}: {scored.n_images} {part} images of {scored.dataset}, fold {scored.fold}")
    values = {scored.score: scored.value, "per_class": scored.per_class}
    typer.echo(scores_table(scored.score, {part: values}), nl=False)


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="PNG or TIFF files.", show_default=False)],
    out: OutOption,
    weights: WeightsOption = None,
    study: AnyStudyOption = None,
    trial: TrialOption = "best",
    fold: PredictFoldOption = None,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Predict the classes of new images: a picture of class numbers for each, and an overlay to look at.

    An image may have any size; where the training resized images, it should show a field as large as theirs.

    \b
    $ frem-search predict --weights weights.pt cells.tif --out predictions
    """
    from frem_search.segmentation.predict import predict_files

    kept, _ = _kept(
        weights, study, trial, quick=quick, dataset=dataset, storage=storage, artifacts=artifacts, fold=fold
    )
    for path in predict_files(kept, images, out=out, device=device):
        typer.echo(path)


def rerun(
    study: StudyOption,
    trial: TrialOption,
    quick: QuickOption = False,
    dataset: DatasetOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a trial once more from nothing, and say whether its score is the same.

    The same means every bit, on the same device with the same versions. On others the difference is told; only a
    difference on the same ones is a failure, with exit status 1.

    \b
    $ frem-search rerun --study mouse_frem --quick --trial 3
    """
    from frem_search.cli.epochs import epoch_progress
    from frem_search.search.rerun import repeat_json, repeat_lines
    from frem_search.search.rerun import rerun as rerun_trial
    from frem_search.search.stored_trial import find_trial

    with record_of(study, quick=quick, dataset=dataset, storage=storage) as (_, record):
        stored = find_trial(record, trial)
    images = _dataset_of(study, record, quick=quick, dataset=dataset)
    title, n_epochs = f"{record.name} trial {stored.number}", record.n_epochs
    with epoch_progress(title, n_epochs=n_epochs, score=record.score) as on_epoch:
        repeat = rerun_trial(record, stored, dataset=images, device=device, on_epoch=on_epoch)
    typer.echo(json.dumps(repeat_json(repeat), indent=2) if as_json else "\n".join(repeat_lines(repeat)))
    if repeat.is_fault:
        raise typer.Exit(1)


def _kept(
    weights: Path | None,
    study: str | None,
    trial: str,
    *,
    quick: bool,
    dataset: str | None,
    storage: str | None,
    artifacts: str | None,
    fold: int | None,
) -> "tuple[Weights, str | None]":
    """Return the weights that were asked for, and the dataset to score; None is the one that they were trained on."""
    from frem_search.search.stored_trial import find_trial, stored_weights
    from frem_search.segmentation.weights import read_weights

    is_asked = study is not None and study != os.environ.get("FREM_SEARCH_STUDY")
    if weights is not None and is_asked:
        message = f"--weights {weights}: expected either --weights or --study, but got both. Leave one out."
        raise UsageError(message)
    if weights is not None:
        return read_weights(weights), dataset
    if study is None:
        message = "expected --weights FILE, or --study with --trial, but got neither. Give the one that you have."
        raise UsageError(message)
    with record_of(study, quick=quick, dataset=dataset, storage=storage) as (_, record):
        stored = find_trial(record, trial)
    images = _dataset_of(study, record, quick=quick, dataset=dataset)
    return stored_weights(record, stored, artifacts=artifacts_of(artifacts), fold=fold), images


def _dataset_of(study: str, record: "StudyRecord", *, quick: bool, dataset: str | None) -> str:
    """Return where a stored study's images lie: as its file says, or by their name alone if it has no file here."""
    from frem_search.study.file import find_study_file, load_study_file

    try:
        find_study_file(study)
    except StudyFileError:
        return record.dataset
    return load_study_file(study, quick=quick, dataset=dataset).dataset


def _named(weights: "Weights") -> str:
    return weights.study if weights.trial is None else f"{weights.study} trial {weights.trial}"
