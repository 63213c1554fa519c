import optuna
import pytest

from frem_search.errors import StorageError, StudyNotFoundError, UsageError
from frem_search.study import export
from frem_search.study.export import export_sqlite


@pytest.fixture
def study(storage):
    """A study of frem-search's form with trials in every state."""
    study = optuna.create_study(storage=storage.optuna, study_name="tiny", direction="maximize")
    contract = {"dataset": "tiny", "score": "mean_iou", "class_names": ["ground", "disc"], "space": {}}
    for key, value in {"contract": contract, "title": "Tiny", "uid": "0" * 32, "n_trials": 9}.items():
        study.set_user_attr(key, value)
    space = {"B": optuna.distributions.IntDistribution(0, 16), "X": optuna.distributions.FloatDistribution(1, 9)}
    for value in (0.25, None, float("inf")):
        trial = study.ask(fixed_distributions=space)
        trial.report(0.125, 1)
        trial.set_user_attr("reason", "none")
        study.tell(trial, value, state=None if value is not None else optuna.trial.TrialState.PRUNED)
    study.ask(fixed_distributions=space)
    study.enqueue_trial({"B": 3, "X": 2.0})
    return study


def read(file):
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    try:
        return optuna.load_study(study_name=None, storage=storage).trials
    finally:
        storage.remove_session()
        storage.engine.dispose()


def without_keys(trials):
    """Trials as they are but for their keys in the tables, which differ between databases."""
    return [{name: value for name, value in vars(trial).items() if name != "_trial_id"} for trial in trials]


def test_every_trial_is_in_the_file_as_it_is_stored(storage, study, tmp_path):
    assert export_sqlite(storage, "tiny", tmp_path / "tiny.db") == 5
    trials = read(tmp_path / "tiny.db")
    assert without_keys(trials) == without_keys(study.trials)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "RUNNING", "WAITING"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.db"]


def test_a_file_that_is_there_stays(storage, study, tmp_path):
    (tmp_path / "mine.db").write_text("mine")
    with pytest.raises(UsageError, match="expected a new file"):
        export_sqlite(storage, "tiny", tmp_path / "mine.db")
    assert (tmp_path / "mine.db").read_text() == "mine"


def test_a_missing_folder_is_told(storage, study, tmp_path):
    with pytest.raises(UsageError, match="in a folder that exists"):
        export_sqlite(storage, "tiny", tmp_path / "none" / "tiny.db")


def test_a_failed_copy_leaves_nothing(storage, study, tmp_path, monkeypatch):
    def full(*, to_storage, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.optuna, "copy_study", full)
    with pytest.raises(StorageError, match=r"tiny\.db: the copy failed: No space left on device"):
        export_sqlite(storage, "tiny", tmp_path / "tiny.db")
    assert list(tmp_path.iterdir()) == []


def test_any_file_name_will_do(storage, study, tmp_path):
    file = tmp_path / "a b#?%20{x}é.db"
    export_sqlite(storage, "tiny", file)
    file.rename(tmp_path / "plain.db")
    assert len(read(tmp_path / "plain.db")) == 5


def test_an_unknown_study_is_told_with_the_known_ones(run_cli, storage, study, storage_url, tmp_path):
    with pytest.raises(StudyNotFoundError, match="Did you mean 'tiny'"):
        export_sqlite(storage, "tinny", tmp_path / "tiny.db")
    exported = run_cli("export", "--study", "tinny", "--sqlite", "tiny.db", FREM_SEARCH_STORAGE=storage_url)
    assert exported.returncode == 1
    assert "Traceback" not in exported.stderr
    assert not (tmp_path / "tiny.db").exists()


def test_the_command_writes_the_file(run_cli, study, storage_url, tmp_path):
    exported = run_cli("export", "--study", "tiny", "--sqlite", "tiny.db", FREM_SEARCH_STORAGE=storage_url)
    assert (exported.returncode, exported.stdout) == (0, "tiny.db: tiny, 5 trials\n"), exported.stderr
    assert len(read(tmp_path / "tiny.db")) == 5
