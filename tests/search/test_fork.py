import json
import shutil

import optuna
import pytest
from optuna.trial import TrialState

from frem_search.data.dataset import load_dataset
from frem_search.errors import ContractError, StudyNotFoundError, UsageError
from frem_search.search.begin import open_worker
from frem_search.search.fork import fork_study
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import load_study_file
from frem_search.study.record import read_record
from frem_search.study.samplers import distributions
from frem_search.study.stored import artifacts_prefix, make_contract, open_study


def write(tiny_study, name, *replacements):
    text = tiny_study.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tiny_study.with_name(f"{name}.toml")
    path.write_text(text)
    return load_study_file(str(path))


def train(study_file, storage, artifacts):
    with open_worker(study_file, storage, artifacts=artifacts, device="cpu") as (_, worker, _):
        list(worker.work())
    return read_record(storage, study_file.name)


@pytest.fixture
def artifacts(tmp_path):
    return str(tmp_path / "artifacts")


@pytest.fixture
def source(tiny_study, storage, artifacts):
    return train(load_study_file(str(tiny_study)), storage, artifacts)


def fork(study_file, storage, artifacts, source="tiny"):
    return fork_study(study_file, storage, source=source, artifacts=artifacts)


def optuna_trials(storage, name):
    return optuna.load_study(study_name=name, storage=storage.optuna).trials


def test_trials_are_copied_whole(tiny_study, storage, artifacts, source):
    forked = fork(write(tiny_study, "wider", ("high = 16", "high = 15")), storage, artifacts)
    assert forked.copied == (0, 1, 2)
    assert not forked.left_out
    copy = read_record(storage, "wider")
    for old, new in zip(source.trials, copy.trials, strict=True):
        assert new.user_attrs.pop("forked_from") == {"study": "tiny", "uid": source.uid, "trial": old.number}
        assert (new.state, new.value, new.params, new.user_attrs) == (old.state, old.value, old.params, old.user_attrs)
        assert (new.started, new.finished, new.epoch) == (old.started, old.finished, old.epoch)
        assert new.curve == old.curve
        assert len(new.curve["score"]) == 3
    for old, new in zip(optuna_trials(storage, "tiny"), optuna_trials(storage, "wider"), strict=True):
        assert new.intermediate_values == old.intermediate_values
        assert new.intermediate_values


def test_weights_are_copied(tiny_study, storage, artifacts, source):
    fork(write(tiny_study, "wider", ("high = 16", "high = 15")), storage, artifacts)
    uid = read_record(storage, "wider").uid
    old = Artifacts(artifacts, artifacts_prefix("tiny", source.uid))
    new = Artifacts(artifacts, artifacts_prefix("wider", uid))
    assert old.read("1/weights.pt") is not None
    assert new.read("1/weights.pt") == old.read("1/weights.pt")
    assert new.read("2/predictions.npz") == old.read("2/predictions.npz")


def test_the_source_stays_as_it_was(tiny_study, storage, artifacts, source):
    fork(write(tiny_study, "wider", ("high = 16", "high = 15")), storage, artifacts)
    assert read_record(storage, "tiny") == source


def test_trials_outside_the_new_space_are_left_out_with_the_reason(tiny_study, storage, artifacts, source):
    drawn = [trial.params["B"] for trial in source.trials]
    assert len(set(drawn)) > 1
    forked = fork(write(tiny_study, "narrow", ("high = 16", f"high = {max(drawn) - 1}")), storage, artifacts)
    assert forked.left_out == {
        trial.number: f"B = {max(drawn)} is not in the new space"
        for trial in source.trials
        if trial.params["B"] == max(drawn)
    }
    assert [trial.params["B"] for trial in read_record(storage, "narrow").trials] == [
        b for b in drawn if b != max(drawn)
    ]


def test_copied_trials_count_towards_the_budget(tiny_study, storage, artifacts, source):
    study_file = write(tiny_study, "wider", ("high = 16", "high = 15"), ("n_trials = 3", "n_trials = 4"))
    fork(study_file, storage, artifacts)
    record = train(study_file, storage, artifacts)
    assert [trial.state for trial in record.trials] == ["complete"] * 4
    assert ["forked_from" in trial.user_attrs for trial in record.trials] == [True, True, True, False]


@pytest.mark.parametrize(
    ("old", "new", "name", "value"),
    [
        ("depth = 2", "depth = [2, 3]", "depth", 2),
        ("depth = 2", "depth = { low = 2, high = 3 }", "depth", 2),
        ("depth = 2", "depth = 2\nlearning_rate = { low = 1e-4, high = 1e-2, log = true }", "learning_rate", 1e-3),
        ("depth = 2", "depth = 2\naugmentation = [true, false]", "augmentation", True),
    ],
)
def test_a_fixed_value_fits_where_it_is_now_searched(tiny_study, storage, artifacts, source, old, new, name, value):
    fork(write(tiny_study, "other", (old, new)), storage, artifacts)
    trials = read_record(storage, "other").trials
    assert [trial.params[name] for trial in trials] == [value] * 3


def test_a_setting_spelled_out_at_its_default_fits(tiny_study, storage, artifacts, source):
    forked = fork(write(tiny_study, "other", ("depth = 2", "depth = 2\nlearning_rate = 0.001")), storage, artifacts)
    assert forked.copied == (0, 1, 2)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("depth = 2", "depth = 3", "depth = 2 is not in the new space"),
        ("depth = 2", "", "depth = 2 is not in the new space"),
        ("depth = 2", "depth = 2\nlearning_rate = 0.01", "learning_rate = 0.001 is not in the new space"),
        (
            "X = { low = 1, high = 1000, log = true }",
            "X = { low = 2000, high = 3000 }",
            "X = .* is not in the new space",
        ),
    ],
)
def test_a_fork_without_a_fitting_trial_is_refused(tiny_study, storage, artifacts, source, old, new, reason):
    with pytest.raises(UsageError, match=reason):
        fork(write(tiny_study, "other", (old, new)), storage, artifacts)
    with pytest.raises(StudyNotFoundError):
        read_record(storage, "other")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("n_epochs = 3", "n_epochs = 4", "n_epochs: stored 3, now 4"),
        ('precision = "fp32"', 'precision = "bf16"', "precision: stored 'fp32', now 'bf16'"),
    ],
)
def test_a_study_whose_scores_cannot_be_compared_is_refused(tiny_study, storage, artifacts, source, old, new, key):
    with pytest.raises(ContractError, match=key):
        fork(write(tiny_study, "other", (old, new)), storage, artifacts)


def test_a_study_of_other_images_is_refused(tiny_study, tiny_dataset, storage, artifacts, source, tmp_path):
    other = tmp_path / "other_images"
    shutil.copytree(tiny_dataset, other)
    content = json.loads((other / "splits_final.json").read_text())
    content[0]["train"].pop()
    (other / "splits_final.json").write_text(json.dumps(content))
    with pytest.raises(ContractError, match="dataset_fingerprint: stored"):
        fork(write(tiny_study, "other", (str(tiny_dataset), str(other))), storage, artifacts)


def test_automatic_precision_is_that_of_the_source(tiny_study, storage, artifacts, source):
    fork(write(tiny_study, "other", ('precision = "fp32"', 'precision = "auto"')), storage, artifacts)
    assert read_record(storage, "other").contract["precision"] == "fp32"


def test_another_seed_is_told(tiny_study, storage, artifacts, source):
    assert not fork(write(tiny_study, "same", ("high = 16", "high = 15")), storage, artifacts).has_other_seed
    study_file = write(tiny_study, "other", ("[params]", "[sampler]\nseed = 7\n\n[params]"))
    assert fork(study_file, storage, artifacts).has_other_seed


def test_a_fork_is_there_whole_or_not_at_all(tiny_study, storage, artifacts, source, tmp_path, monkeypatch):
    usual, copied = storage.optuna.create_new_trial, []

    def fails_at_the_second(*args, **kwargs):
        if copied:
            raise RuntimeError("pulled the plug")
        copied.append(usual(*args, **kwargs))
        return copied[-1]

    monkeypatch.setattr(storage.optuna, "create_new_trial", fails_at_the_second)
    study_file = write(tiny_study, "other", ("high = 16", "high = 15"))
    with pytest.raises(RuntimeError, match="plug"):
        fork(study_file, storage, artifacts)
    assert optuna.get_all_study_names(storage.optuna) == ["tiny"]
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [artifacts_prefix("tiny", source.uid)]


def test_a_stored_study_is_not_forked_into(tiny_study, storage, artifacts, source):
    with pytest.raises(UsageError, match="is stored already"):
        fork(load_study_file(str(tiny_study)), storage, artifacts)
    assert read_record(storage, "tiny") == source


def test_an_unknown_source_is_told_with_the_known_ones(tiny_study, storage, artifacts, source):
    with pytest.raises(StudyNotFoundError, match="Did you mean 'tiny'"):
        fork(write(tiny_study, "other", ("high = 16", "high = 15")), storage, artifacts, source="tinny")


def test_a_fork_can_be_joined_as_any_study(tiny_study, storage, artifacts, source):
    study_file = write(tiny_study, "other", ("high = 16", "high = 15"))
    fork(study_file, storage, artifacts)
    attrs = {name: optuna.load_study(study_name=name, storage=storage.optuna).user_attrs for name in ("tiny", "other")}
    # Not the cohort: another one is a reason to fork.
    assert set(attrs["other"]) == set(attrs["tiny"]) - {"cohort"} | {"forked_from"}
    assert attrs["other"]["forked_from"] == {"study": "tiny", "uid": source.uid}
    with open_worker(study_file, storage, artifacts=artifacts, device="cpu") as (study, _, _):
        assert study.uid == attrs["other"]["uid"]


def test_pruned_trials_are_copied_and_failed_or_running_ones_are_not(tiny_study, storage, artifacts):
    study_file = load_study_file(str(tiny_study))
    dataset = load_dataset(study_file.dataset, image_size=32)
    study = open_study(
        storage,
        study_file,
        make_contract(
            study_file,
            precision="fp32",
            dataset=dataset.name,
            dataset_fingerprint=dataset.fingerprint,
            class_names=dataset.class_names,
        ),
    )
    with Leases(storage, study.optuna, distributions=distributions(study_file.space)) as leases:
        pruned, failed, running = leases.claim(), leases.claim(), leases.claim()
        leases.report(pruned, 0.25, step=1)
        leases.tell(pruned, state=TrialState.PRUNED, attrs={"reason": "too low"}, curve={"epoch": [1]})
        leases.tell(failed, state=TrialState.FAIL, attrs={"reason": "broken"})
        forked = fork(write(tiny_study, "other", ("high = 16", "high = 15")), storage, artifacts)
        assert running.number == 2
    assert forked.copied == (0,)
    assert forked.left_out == {1: "it is FAIL", 2: "it is RUNNING"}
    (trial,) = read_record(storage, "other").trials
    assert (trial.state, trial.reason, trial.curve) == ("pruned", "too low", {"epoch": [1]})
    assert optuna_trials(storage, "other")[0].intermediate_values == {1: 0.25}
