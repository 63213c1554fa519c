"""Begin a study with the finished trials of another one that would have come out the same in it."""

import inspect
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from frem_search.errors import ContractError, UsageError
from frem_search.segmentation.losses import LOSSES
from frem_search.segmentation.networks import network_params
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.leases.claims import keep_note
from frem_search.storage.trial_notes import SHOWN, artifact_attrs, trial_note
from frem_search.study.file import StudyFile
from frem_search.study.parameters import TrainingParams
from frem_search.study.record import StudyRecord, read_record
from frem_search.study.samplers import distributions
from frem_search.study.space import Choice, Fixed, Param, Space, resolve, space_from_json
from frem_search.study.stored import artifacts_prefix, hold_study, make_contract, write_attrs
from frem_search.training.recipe import check, load_images
from frem_search.training.results import EPOCH_PICTURE, INSPECTED, PREDICTIONS, WEIGHTS

if TYPE_CHECKING:
    from frem_search.storage.database import Storage

# What a score depends on, beside the parameters: where one of these differs, two trials cannot be compared.
MUST_AGREE = (
    "dataset_fingerprint",
    "class_names",
    "fold",
    "n_folds",
    "network",
    "loss",
    "score",
    "n_epochs",
    "precision",
)

COPY_CURVE = sa.text("INSERT INTO frem_curve SELECT :to, curve FROM frem_curve WHERE trial_id = :origin")
COPY_LEASE = sa.text("""
    INSERT INTO frem_lease (trial_id, study_id, worker, host, boot_id, pid_namespace, pid, pid_started, device,
                            attempts, total_attempts, epoch, checkpoint_epoch, reason, taken_at, expires_at)
    SELECT :to, :study_id, worker, host, boot_id, pid_namespace, pid, pid_started, device,
           attempts, total_attempts, epoch, checkpoint_epoch, reason, taken_at, expires_at
    FROM frem_lease WHERE trial_id = :origin
""")


@dataclass(frozen=True)
class Fork:
    """What came of it.

    Args:
        name: The new study's.
        source: The study whose trials were copied.
        n_trials: The new study's budget; the copied trials count towards it.
        copied: Numbers in the source, in the order of their new numbers 0, 1, 2, ...
        left_out: Why the other trials were not copied, by their numbers in the source.
        has_other_seed: Whether the copied trials were trained from other initial weights than new ones will be.
    """

    name: str
    source: str
    n_trials: int
    copied: tuple[int, ...]
    left_out: Mapping[int, str]
    has_other_seed: bool


@dataclass(frozen=True)
class _Plan:
    trials: tuple[tuple[FrozenTrial, FrozenTrial], ...]  # a trial of the source, and what becomes of it
    left_out: Mapping[int, str]


def fork_study(study_file: StudyFile, storage: "Storage", *, source: str, artifacts: str) -> Fork:
    """Begin the study of a file and copy the trials of a stored study that fit, in one transaction.

    Args:
        study_file: The new study's.
        storage: The database of both.
        source: The stored study's name.
        artifacts: The URL of both studies' artifacts.

    Raises:
        ContractError: The trials of the two studies could not be compared.
        UsageError: The new study is there already, or no trial fits.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = read_record(storage, source, has_curves=False)
    contract = _contract(study_file, record)
    _require_comparable(study_file, record, contract)
    plan = _plan(study_file, record, optuna.load_study(study_name=source, storage=storage.optuna).trials)
    uid = uuid.uuid4().hex
    target = Artifacts(artifacts, artifacts_prefix(study_file.name, uid))
    try:
        # Files first: a transaction must not wait for them, and without its rows nobody looks at them.
        origin = Artifacts(artifacts, artifacts_prefix(source, record.uid))
        files = _copy_artifacts(origin, target, plan, n_folds=study_file.n_folds)
        storage.retrying(lambda: _store(storage, study_file, contract, plan, uid=uid, source=record, files=files))
    except BaseException:
        target.remove_all()
        raise
    return Fork(
        name=study_file.name,
        source=source,
        n_trials=study_file.n_trials,
        copied=tuple(trial.number for trial, _ in plan.trials),
        left_out=plan.left_out,
        has_other_seed=contract["seed"] != record.contract["seed"],
    )


def _contract(study_file: StudyFile, record: StudyRecord) -> dict[str, Any]:
    check(study_file)
    dataset = load_images(study_file)
    return make_contract(
        study_file,
        precision=record.contract["precision"] if study_file.precision == "auto" else study_file.precision,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
    )


def _require_comparable(study_file: StudyFile, record: StudyRecord, contract: Mapping[str, Any]) -> None:
    differing = [key for key in MUST_AGREE if contract.get(key) != record.contract.get(key)]
    if differing:
        lines = [f"  {key}: stored {record.contract.get(key)!r}, now {contract[key]!r}" for key in differing]
        message = (
            f"{study_file.name}: the trials of {record.name} cannot be compared with those of this study:\n"
            + "\n".join(lines)
            + f"\nUndo the change, or begin without them by `frem-search run --study {study_file.path}`."
        )
        raise ContractError(message)


def _plan(study_file: StudyFile, record: StudyRecord, trials: list[FrozenTrial]) -> _Plan:
    old_space = space_from_json(record.contract["space"])
    defaults = _defaults(study_file)
    kept: list[tuple[FrozenTrial, FrozenTrial]] = []
    left_out: dict[int, str] = {}
    for trial in trials:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            left_out[trial.number] = f"it is {trial.state.name}"
            continue
        params = _params(study_file.space, defaults, defaults | resolve(old_space, trial.params))
        if isinstance(params, str):
            left_out[trial.number] = params
        else:
            kept.append((trial, _template(study_file, trial, params, origin=record)))
    if not kept:
        reasons = "; ".join(f"trial {number}: {reason}" for number, reason in list(left_out.items())[:3])
        message = (
            f"{study_file.name}: none of the {len(trials)} trials of {record.name} fits ({reasons or 'it has none'}). "
            f"Begin without them by `frem-search run --study {study_file.path}`."
        )
        raise UsageError(message)
    return _Plan(tuple(kept), left_out)


def _defaults(study_file: StudyFile) -> dict[str, Any]:
    """Return what a parameter is where a study file is silent about it."""
    network = {name: each.default for name, each in network_params(study_file.network).items()}
    training = {field.name: field.default for field in fields(TrainingParams)}
    known = network | training | LOSSES[study_file.loss].defaults
    return {name: value for name, value in known.items() if value is not inspect.Parameter.empty}


def _params(space: Space, defaults: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return what the new study would have drawn to get the parameters that were used, or why it never would."""
    drawn: dict[str, Any] = {}
    known = distributions(space)
    for name in dict.fromkeys((*space, *used)):
        param = space.get(name, Fixed(defaults.get(name)))
        at = _position(param, used.get(name))
        if at is None:
            return f"{name} = {used.get(name)!r} is not in the new space"
        if isinstance(param, Choice):
            drawn[name] = known[name].choices[at]  # type: ignore[attr-defined]
        elif not isinstance(param, Fixed):
            drawn[name] = at
    return drawn


def _position(param: Param, value: Any) -> Any:
    """Return a value as a range spells it, or its index among choices or the one fixed value; None if it is outside."""
    if isinstance(param, Fixed | Choice):
        return next((i for i, choice in enumerate(param.bounds()) if _is_same(choice, value)), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not param.low <= value <= param.high:
        return None
    step = param.step or (1 if param.is_integer else None)
    if step is not None and abs((value - param.low) / step - round((value - param.low) / step)) > 1e-8:
        return None
    return round(value) if param.is_integer else float(value)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values mean the same: 1 and 1.0 do, 1 and true do not.

    >>> _is_same(1, 1.0), _is_same(1, True), _is_same([64, 32], (64, 32))
    (True, False, True)
    """
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _template(study_file: StudyFile, trial: FrozenTrial, params: dict[str, Any], *, origin: StudyRecord) -> FrozenTrial:
    has_same_steps = study_file.is_pruned_by_fold == (origin.contract["pruner"]["name"] == "wilcoxon")
    forked_from = {"study": origin.name, "uid": origin.uid, "trial": trial.number}
    template = optuna.trial.create_trial(
        state=trial.state,
        value=trial.value,
        params=params,
        distributions=distributions(study_file.space),
        user_attrs=trial.user_attrs | {"forked_from": forked_from},
        # Steps are images where trials are pruned by fold, and epochs elsewhere.
        intermediate_values=trial.intermediate_values if has_same_steps else None,
    )
    template.datetime_start, template.datetime_complete = trial.datetime_start, trial.datetime_complete
    return template


def _copy_artifacts(origin: Artifacts, target: Artifacts, plan: _Plan, *, n_folds: int | None) -> dict[int, list[str]]:
    """Copy the files of every trial; return their names by the new number."""
    copied: dict[int, list[str]] = {}
    pictures: dict[str, list[str]] = {}  # after epochs that the study named
    for path in origin.names():
        trial_number, _, name = path.partition("/")
        if re.fullmatch(EPOCH_PICTURE.format(r"\d+"), name):
            pictures.setdefault(trial_number, []).append(name)
    for number, (trial, _) in enumerate(plan.trials):
        folds = [f"fold{fold}/" for fold in range(n_folds)] if n_folds else [""]
        of_folds = [f"{fold}{name}" for fold in folds for name in (WEIGHTS, PREDICTIONS)]
        for name in (*of_folds, *SHOWN, INSPECTED, *pictures.get(str(trial.number), [])):
            content = origin.read(f"{trial.number}/{name}")
            if content is not None:
                target.write(f"{number}/{name}", content)
                copied.setdefault(number, []).append(name)
    return copied


def _store(
    storage: "Storage",
    study_file: StudyFile,
    contract: Mapping[str, Any],
    plan: _Plan,
    *,
    uid: str,
    source: StudyRecord,
    files: Mapping[int, Sequence[str]],
) -> None:
    with storage.transaction() as connection:
        study = hold_study(storage, connection, study_file.name)
        stored = study.user_attrs
        if stored.get("uid") == uid:
            return  # stored before, but the connection was lost before the answer came
        if stored:
            raise UsageError(_exists(study_file))
        origin = {"study": source.name, "uid": source.uid}
        write_attrs(study, study_file, contract, uid=uid, forked_from=origin)
        study_id = study._study_id  # Optuna has no public name for it
        for number, (trial, template) in enumerate(plan.trials):
            shown = [name for name in files.get(number, ()) if name in SHOWN]
            template._system_attrs = artifact_attrs(uid, number, shown)  # Optuna refuses them once it is stored
            new_id = storage.optuna.create_new_trial(study_id, template_trial=template)
            ids = {"to": new_id, "origin": trial._trial_id, "study_id": study_id}
            keep_note(connection, study_id, new_id, trial_note(trial.state.name.lower(), trial.user_attrs))
            connection.execute(COPY_LEASE, ids)
            connection.execute(COPY_CURVE, ids)


def _exists(study_file: StudyFile) -> str:
    return (
        f"{study_file.name}: a fork begins a new study, but one of that name is stored already. "
        f"Copy {study_file.path} under another name and fork that, or remove the stored one by "
        f"`frem-search study delete {study_file.name}`."
    )
