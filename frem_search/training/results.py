"""What a trained network came to, with the weights of its best epoch: scores, predictions and files."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frem_search.data.augmentation.orientations import N_ORIENTATIONS
from frem_search.data.dataset import Dataset
from frem_search.segmentation.inference import precision_context, predict
from frem_search.segmentation.metrics import METRICS, Score, lacking
from frem_search.segmentation.networks import has_effect, in_phase, is_enhanced_in_test
from frem_search.segmentation.pictures import MOST_IMAGES, curve_csv, predictions_png
from frem_search.segmentation.weights import Weights, dump_weights
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.trial_notes import CURVE, PICTURE, artifact_attrs
from frem_search.study.file import StudyFile
from frem_search.training.member import Member
from frem_search.training.recipe import split_params
from frem_search.training.resident import Part
from frem_search.training.trial import Folds, mean

WEIGHTS = "weights.pt"
PREDICTIONS = "predictions.npz"
INSPECTED = "inspected.npz"  # what some networks show beside a prediction
EPOCH_PICTURE = "predictions_after_{}.png"
PHASES = ("plain", "enhanced")  # of the test: FREM off, as the paper proposes it, or on


def place(number: int, fold: int | None) -> str:
    """Return the folder of a trial's artifacts, or of one of its folds.

    >>> place(3, None), place(3, 1)
    ('3', '3/fold1')
    """
    return str(number) if fold is None else f"{number}/fold{fold}"


@dataclass(frozen=True, eq=False)
class Results:
    """Scores the trained trials of a study, and stores what they leave behind.

    Args:
        study_file: Which network and scores.
        dataset: Its images.
        precision: `fp32` or `bf16`.
        artifacts: Where files go.
        study_uid: Under which the dashboard finds them.
    """

    study_file: StudyFile
    dataset: Dataset
    precision: str
    artifacts: Artifacts
    study_uid: str

    def image_scores(self, member: Member, params: Mapping[str, Any]) -> list[float]:
        """Return the score of each validation image of a fold; of none as worst as can be.

        The orientations of an image are one image: they are no evidence of their own.

        Args:
            member: The fold, all its epochs done.
            params: The trial's parameters.
        """
        member.network.load_state_dict(member.best_weights)
        part, metric = member.data.val, METRICS[self.study_file.score]
        pred, labels = self._predict(member, part.images, takes=metric.takes), part.labels
        n_classes = member.data.n_classes
        scores = [
            metric.function(pred[i : i + 1], labels[i : i + 1], n_classes=n_classes).value.item()
            for i in range(len(part))
        ]
        n_orientations = N_ORIENTATIONS if split_params(self.study_file, params).training.eightfold else 1
        n_images = len(scores) // n_orientations
        worst_for_nan = [0.0 if score != score else score for score in scores]
        return [sum(worst_for_nan[i::n_images]) / n_orientations for i in range(n_images)]

    def store(self, trial: Folds, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Score the test images once, with the weights of the best epoch, and store what the trial leaves behind.

        Args:
            trial: All its epochs done.
            params: Its parameters.

        Returns:
            The scores in full, with several folds means over them and each fold's own; and attributes that announce
            files to Optuna's dashboard.
        """
        self.store_predictions(trial)
        results: list[dict[str, Any]] = []
        shown: dict[str, str] = {}
        for member in trial.members:
            member.network.load_state_dict(member.best_weights)
            result, pred = self._score_parts(member)
            results.append(result)
            self._write_fold(trial.number, params, member, pred)
            shown = shown or self._write_shown(trial, member, pred)
        return results[0] if self.study_file.n_folds is None else _mean_result(results), shown

    def keep_prediction(self, trial: Folds, member: Member) -> None:
        """Keep a picture of what a member predicts now, if its study names the epoch that it has done.

        Args:
            trial: Whose picture it is, until `store_predictions` writes it.
            member: Of several folds the first is shown.
        """
        if member is trial.members[0] and member.epoch in self.study_file.predictions_after:
            member.prepare_score(precision=self.precision)
            part = self._shown_part(member)
            trial.pictures[member.epoch] = self._picture(part, self._predict(member, part.images[:MOST_IMAGES]))
            member.resume()

    def store_predictions(self, trial: Folds) -> None:
        """Store the pictures that were kept since the last time."""
        for epoch, picture in trial.pictures.items():
            self.artifacts.write(f"{trial.number}/{EPOCH_PICTURE.format(epoch)}", picture)
        trial.pictures.clear()

    def remove_weights(self, number: int) -> None:
        """Remove the weights of a trial that is not among the best; nothing happens if there are none."""
        for fold in self.study_file.folds:
            self.artifacts.remove(f"{self._place(number, fold)}/{WEIGHTS}")

    def _place(self, number: int, fold: int) -> str:
        return place(number, None if self.study_file.n_folds is None else fold)

    def _score_parts(self, member: Member) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return the scores of a fold, and the prediction of its test images, if there are any."""
        data, pred = member.data, None
        result: dict[str, Any] = {
            "best_epoch": member.best_epoch,
            "val": self._named(member.best_score, member.best_per_class),
        }
        if len(data.test):
            pred, score = self._score(member, data.test, self.study_file.score)
            result["test"] = self._named(score.value.item(), score.per_class.tolist())
        parts = {"val": data.val} | ({"test": data.test} if len(data.test) else {})
        if has_effect(member.network):
            result["phases"] = self._score_phases(member, parts, {part: result[part] for part in parts})
        if self.study_file.extra_scores:
            result["extra"] = self._extra_scores(member, parts)
        return result, pred

    def _score_phases(
        self, member: Member, parts: Mapping[str, Part], own: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the scores of the same weights with enhancement and without it (FREM, Table 1).

        Args:
            member: With the weights of its best epoch.
            parts: Its images.
            own: Their scores in the phase that the study tests in.
        """
        own_is_enhanced = is_enhanced_in_test(member.network)
        with in_phase(member.network, is_enhanced=not own_is_enhanced):
            scores = {part: self._score(member, images, self.study_file.score)[1] for part, images in parts.items()}
        other = {part: self._named(score.value.item(), score.per_class.tolist()) for part, score in scores.items()}
        plain, enhanced = (other, own) if own_is_enhanced else (own, other)
        return dict(zip(PHASES, (plain, enhanced), strict=True))

    def _extra_scores(self, member: Member, parts: Mapping[str, Part]) -> dict[str, dict[str, float | None]]:
        """Return by name and part what a study also tells; None of what this machine has no package for."""
        missing = lacking(self.study_file.extra_scores)
        return {
            name: {
                part: None if name in missing else self._score(member, images, name)[1].value.item()
                for part, images in parts.items()
            }
            for name in self.study_file.extra_scores
        }

    def _score(self, member: Member, part: Part, name: str) -> tuple[torch.Tensor, Score]:
        """Return the prediction of some images, and a score of it."""
        metric = METRICS[name]
        pred = self._predict(member, part.images, takes=metric.takes)
        return pred, metric.function(pred, part.labels, n_classes=member.data.n_classes)

    def _predict(self, member: Member, images: torch.Tensor, *, takes: str = "classes") -> torch.Tensor:
        return predict(member.network, images, precision=self.precision, takes=takes, tiles=member.tiles)

    def _named(self, value: float, per_class: list[float]) -> dict[str, Any]:
        names = self.dataset.class_names
        classes = {n: None if v != v else v for n, v in zip(names, per_class, strict=True)}
        return {self.study_file.score: value, "per_class": classes}

    def _write_fold(self, number: int, params: Mapping[str, Any], member: Member, pred: torch.Tensor | None) -> None:
        """Store the weights of a fold, and the prediction of its test images."""
        folder = self._place(number, member.fold)
        if pred is not None:
            self.artifacts.write(f"{folder}/{PREDICTIONS}", _packed(member.data.test.cases, pred=pred))
        self.artifacts.write(f"{folder}/{WEIGHTS}", self._pack_weights(number, params, member))

    def _pack_weights(self, number: int, params: Mapping[str, Any], member: Member) -> bytes:
        split = split_params(self.study_file, params)
        return dump_weights(
            Weights(
                network=self.study_file.network,
                network_params=split.network,
                in_channels=member.data.in_channels,
                class_names=self.dataset.class_names,
                image_size=split.training.image_size,
                dataset=self.dataset.name,
                dataset_fingerprint=self.dataset.fingerprint,
                fold=member.fold,
                n_folds=self.study_file.n_folds,
                score=self.study_file.score,
                precision=self.precision,
                study=self.study_file.name,
                trial=number,
                params=dict(params),
                state=member.best_weights,
            )
        )

    def _write_shown(self, trial: Folds, member: Member, pred: torch.Tensor | None) -> dict[str, str]:
        """Store curve and pictures: of test images, or without any of validation images; return how to find them."""
        part = self._shown_part(member)
        images = part.images[:MOST_IMAGES]
        if pred is None:
            pred = self._predict(member, images)
        self.artifacts.write(f"{trial.number}/{CURVE}", curve_csv(trial.curve, self.dataset.class_names))
        self.artifacts.write(f"{trial.number}/{PICTURE}", self._picture(part, pred))
        inspect = getattr(member.network, "inspect", None)
        if inspect is not None and member.tiles == 1:  # tiles are there as whole images may need too much memory
            member.network.eval()
            with precision_context(images.device, self.precision):
                seen = inspect(images)
            self.artifacts.write(f"{trial.number}/{INSPECTED}", _packed(part.cases[:MOST_IMAGES], **seen))
        return artifact_attrs(self.study_uid, trial.number)

    def _shown_part(self, member: Member) -> Part:
        return member.data.test if len(member.data.test) else member.data.val

    def _picture(self, part: Part, pred: torch.Tensor) -> bytes:
        images, labels, pred = part.images[:MOST_IMAGES], part.labels[:MOST_IMAGES], pred[:MOST_IMAGES]
        classes = pred.argmax(dim=1) if pred.ndim > labels.ndim else pred
        return predictions_png(*(each.cpu().numpy() for each in (images, labels, classes)))


def _packed(cases: tuple[str, ...], **tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }
    np.savez_compressed(buffer, cases=np.array(cases), **arrays)
    return buffer.getvalue()


def _mean_scores(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over folds of the scores of each part that all of them have."""
    whole: dict[str, Any] = {}
    for part in (part for part in ("val", "test") if all(part in result for result in results)):
        scores = [result[part] for result in results]
        classes = {name: mean([each["per_class"][name] for each in scores]) for name in scores[0]["per_class"]}
        values = {name: mean([each[name] for each in scores]) for name in scores[0] if name != "per_class"}
        whole[part] = values | {"per_class": classes}
    return whole


def _mean_result(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over folds of their scores, and each fold's own."""
    whole = _mean_scores(results)
    if "phases" in results[0]:
        whole["phases"] = {phase: _mean_scores([result["phases"][phase] for result in results]) for phase in PHASES}
    if "extra" in results[0]:
        whole["extra"] = {
            name: {part: mean([result["extra"][name][part] for result in results]) for part in parts if part in whole}
            for name, parts in results[0]["extra"].items()
        }
    return whole | {"folds": [dict(result) for result in results]}
