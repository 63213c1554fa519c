import json
import shutil

import optuna
import pytest

from frem_search.errors import LeaseLostError, StorageError, StudyNotFoundError
from frem_search.search.begin import open_worker
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.leases.leases import Leases
from frem_search.study.file import list_study_files, load_study_file
from frem_search.study.listing import delete_stored, list_stored
from frem_search.study.record import read_record
from frem_search.study.samplers import distributions
from frem_search.study.stored import make_contract, open_study


@pytest.fixture
def begin(tiny_study, storage):
    """Begin the tiny study under a name, without training anything."""

    def begin(name):
        path = tiny_study.with_name(f"{name}.toml")
        if path != tiny_study:
            shutil.copy(tiny_study, path)
        study_file = load_study_file(str(path))
        contract = make_contract(
            study_file, precision="fp32", dataset="tiny", dataset_fingerprint="0" * 64, class_names=["ground", "disc"]
        )
        return open_study(storage, study_file, contract)

    return begin


def leases_of(storage, study):
    return Leases(storage, study.optuna, distributions=distributions(study.file.space))


def test_list_names_every_study_file_and_starts_no_database(run_cli, home):
    listed = run_cli("study", "list")
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert names == [path.stem for path in list_study_files()]
    assert "mouse_frem" in names
    assert not (home / "postgres").exists()


def test_a_wrong_file_is_listed_with_its_mistake(run_cli, tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "broken.toml").write_text('dataset = "mouse"\nnetwrk = "unet"\n')
    listed = run_cli("study", "list", "--json")
    assert listed.returncode == 0
    (broken,) = [row for row in json.loads(listed.stdout)["files"] if row["name"] == "broken"]
    assert "netwrk: unknown key" in broken["title"]


def test_stored_studies_are_listed_with_their_progress(run_cli, begin, storage, storage_url):
    study = begin("tiny")
    optuna.create_study(storage=storage.optuna, study_name="another program's")
    with leases_of(storage, study) as leases:
        for value in (0.5, 0.25):
            leases.tell(leases.claim(), state=optuna.trial.TrialState.COMPLETE, value=value, attrs={})
    listed = run_cli("study", "list", "--stored", "--json", FREM_SEARCH_STORAGE=storage_url)
    title = "A study that trains in a second"
    row = {"name": "tiny", "title": title, "dataset": "tiny", "finished": 2, "trials": 3, "epochs": 3, "best": 0.5}
    assert json.loads(listed.stdout)["stored"] == [row]


def test_show_merges_quick(run_cli):
    shown = run_cli("study", "show", "mouse_frem", "--quick")
    quick = load_study_file("mouse_frem", quick=True)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split(maxsplit=1) for line in shown.stdout.splitlines() if line]
    assert ["n_trials", str(quick.n_trials)] in lines
    assert ["dataset", quick.dataset] in lines
    for name, param in quick.space.items():
        (values,) = [line[1].split() for line in lines if line[0] == name]
        last = param.bounds()[-1]
        assert (f'"{last}"' if isinstance(last, str) else str(last)) in values


def test_show_tells_what_a_stored_study_was_begun_with(run_cli, begin, tiny_study, storage_url):
    before = run_cli("study", "show", tiny_study, "--stored", "--json", FREM_SEARCH_STORAGE=storage_url)
    assert json.loads(before.stdout)["contract"] is None
    contract = begin("tiny").contract
    after = run_cli("study", "show", tiny_study, "--stored", "--json", FREM_SEARCH_STORAGE=storage_url)
    assert json.loads(after.stdout)["contract"] == contract
    assert json.loads(after.stdout)["params"] == contract["space"]


def test_every_shipped_study_passes_its_check(run_cli):
    checked = run_cli("study", "check")
    assert checked.returncode == 0, checked.stderr
    assert [line.split(":")[0] for line in checked.stdout.splitlines()] == [path.stem for path in list_study_files()]


def test_check_shows_every_mistake_and_fails(run_cli, tiny_study):
    texts = {
        "no_such_key": tiny_study.read_text().replace("[budget]", "seeed = 1\n[budget]"),
        "too_many_maps": tiny_study.read_text().replace("high = 16", "high = 17"),
        "wrong_quick": tiny_study.read_text() + "\n[quick.params]\ndepht = 2\n",
    }
    for name, text in texts.items():
        tiny_study.with_name(f"{name}.toml").write_text(text)
    paths = [tiny_study.with_name(f"{name}.toml") for name in texts]
    checked = run_cli("study", "check", paths[0], tiny_study, *paths[1:], "nosuch")
    assert checked.returncode == 2
    assert checked.stdout == "tiny: 3 trials of 3 epochs\n"
    mistakes = checked.stderr.splitlines()
    assert len(mistakes) == 4
    for mistake, expected in zip(mistakes, ("seeed", "params.B", "depht", "Unknown study 'nosuch'"), strict=True):
        assert expected in mistake


def test_check_remarks_on_a_dataset_that_is_not_here(run_cli, tiny_study, tiny_dataset):
    tiny_study.write_text(tiny_study.read_text().replace(str(tiny_dataset), "mouze"))
    checked = run_cli("study", "check", tiny_study)
    assert checked.returncode == 0
    assert "there is no dataset 'mouze'" in checked.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_show_tells_what_a_study_was_begun_with_whose_file_is_elsewhere(run_cli, begin, storage_url, options):
    contract = begin("tiny").contract  # its file is named by its path alone
    shown = run_cli("study", "show", "tiny", "--stored", *options, FREM_SEARCH_STORAGE=storage_url)
    assert shown.returncode == 0, shown.stderr
    if options:
        assert json.loads(shown.stdout) == {"name": "tiny", "contract": contract}
    else:
        assert shown.stdout.startswith("tiny: no such study file here\n\nbegun with: {\n")
    assert run_cli("study", "show", "tiny", *options).returncode == 2
    unknown = run_cli("study", "show", "tinny", "--stored", *options, FREM_SEARCH_STORAGE=storage_url)
    assert unknown.returncode == 1
    assert "Did you mean 'tiny'?" in unknown.stderr


def test_fork_says_what_it_copied_and_what_not(run_cli, tiny_study, storage, storage_url, tmp_path):
    settings = {"FREM_SEARCH_STORAGE": storage_url, "FREM_SEARCH_ARTIFACTS": tmp_path / "artifacts"}
    artifacts = str(tmp_path / "artifacts")
    with open_worker(load_study_file(str(tiny_study)), storage, artifacts=artifacts, device="cpu") as (
        study,
        worker,
        _,
    ):
        list(worker.work())
    study.optuna.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    other = tiny_study.with_name("other.toml")
    other.write_text(tiny_study.read_text().replace("n_trials = 3", "n_trials = 10") + "\n[sampler]\nseed = 5\n")
    forked = run_cli("study", "fork", other, "--from", "tiny", **settings)
    assert forked.stdout == (
        "other: copied 3 finished trials of tiny, now numbers 0 to 2; they count towards the budget of 10, "
        "so 7 are left to train.\n"
        "  not copied: trial 3: it is FAIL\n"
        "  The seed differs: the copied trials began with other weights than new ones will.\n"
    )


def test_delete_asks_first(run_cli, begin, storage, storage_url):
    begin("tiny")
    asked = run_cli("study", "delete", "tiny", FREM_SEARCH_STORAGE=storage_url)
    assert asked.returncode == 2
    assert "add --yes" in asked.stderr
    assert [study.name for study in list_stored(storage)] == ["tiny"]
    assert run_cli("study", "delete", "tiny", "--yes", FREM_SEARCH_STORAGE=storage_url).returncode == 0
    assert list_stored(storage) == []


def test_delete_says_whether_there_were_artifacts(run_cli, begin, storage_url, home):
    study = begin("tiny")
    Artifacts(str(home / "artifacts"), study.artifacts_prefix).write("0/weights.pt", b"w")
    deleted = run_cli("study", "delete", "tiny", "--yes", FREM_SEARCH_STORAGE=storage_url)
    where = home / "artifacts" / study.artifacts_prefix
    assert deleted.stdout == f"tiny: deleted, 0 trials, and what lay in {where}\n"
    study = begin("tiny")
    deleted = run_cli("study", "delete", "tiny", "--yes", FREM_SEARCH_STORAGE=storage_url)
    assert deleted.stdout == (
        f"tiny: deleted, 0 trials, but nothing lay in {home / 'artifacts' / study.artifacts_prefix}; if the study was "
        f"run with --artifacts elsewhere, remove {study.artifacts_prefix} there\n"
    )


def test_delete_removes_all_of_one_study_and_nothing_of_another(begin, storage, tmp_path):
    studies = [begin("tiny"), begin("tiny-too")]
    url = str(tmp_path / "artifacts")
    for study in studies:
        Artifacts(url, study.artifacts_prefix).write("0/weights.pt", b"w")
        with leases_of(storage, study) as leases:
            curve = {"epoch": [1]}
            leases.tell(leases.claim(), state=optuna.trial.TrialState.COMPLETE, value=1.0, attrs={}, curve=curve)
    other = read_record(storage, "tiny-too")
    removed = delete_stored(storage, "tiny", artifacts=url)
    assert removed == (studies[0].artifacts_prefix, f"{url}/{studies[0].artifacts_prefix}", True)
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [studies[1].artifacts_prefix]
    assert read_record(storage, "tiny-too") == other
    assert other.trials[0].curve == {"epoch": [1]}
    with pytest.raises(StudyNotFoundError):
        read_record(storage, "tiny")


def test_a_study_begun_again_after_its_deletion_is_another(begin, storage, tmp_path):
    first = begin("tiny")
    delete_stored(storage, "tiny", artifacts=str(tmp_path))
    assert begin("tiny").uid != first.uid


def test_delete_refuses_while_a_worker_trains(begin, storage, tmp_path):
    study = begin("tiny")
    with leases_of(storage, study) as leases:
        held = leases.claim()
        with pytest.raises(StorageError, match=r"1 in training: trial 0 on .* --force"):
            delete_stored(storage, "tiny", artifacts=str(tmp_path))
        assert read_record(storage, "tiny").trials[0].state == "running"
        leases.release(held, reason="stopped")
        delete_stored(storage, "tiny", artifacts=str(tmp_path))


def test_a_worker_notices_that_its_study_was_deleted(begin, storage, tmp_path):
    study = begin("tiny")
    with leases_of(storage, study) as leases:
        held = leases.claim()
        delete_stored(storage, "tiny", artifacts=str(tmp_path), force=True)
        with pytest.raises(LeaseLostError):
            leases.report(held, 0.5, step=1)
        with pytest.raises(StudyNotFoundError):
            leases.claim()


def test_a_study_of_another_program_is_not_deleted(storage, tmp_path):
    optuna.create_study(storage=storage.optuna, study_name="theirs")
    with pytest.raises(StudyNotFoundError, match="another program made"):
        delete_stored(storage, "theirs", artifacts=str(tmp_path))
    assert optuna.get_all_study_names(storage.optuna) == ["theirs"]
