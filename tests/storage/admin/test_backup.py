"""`frem-search db`: tables made and brought up to date, a database as a file and back."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from frem_search.errors import StorageError, UsageError
from frem_search.storage import schema
from frem_search.storage.admin import programs
from frem_search.storage.admin.backup import back_up, read_archive, restore
from frem_search.storage.database import open_storage
from frem_search.storage.leases.leases import Leases
from frem_search.study.samplers import make_sampler

SPACE = {"B": optuna.distributions.IntDistribution(1, 9), "X": optuna.distributions.FloatDistribution(1.0, 10.0)}
TABLES = (
    "studies", "study_directions", "study_user_attributes", "trials", "trial_params", "trial_values",
    "trial_intermediate_values", "trial_user_attributes", "frem_lease", "frem_curve", "frem_schema", "alembic_version",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_leases(storage, name="study", *, n_trials=100):
    sampler = make_sampler("random", space=SPACE, seed=0, n_startup_trials=4)
    study = optuna.create_study(storage=storage.optuna, study_name=name, direction="maximize", sampler=sampler)
    study.set_user_attr("n_trials", n_trials)
    return Leases(storage, study, distributions=SPACE)


def make_trials(storage, *, n_told=3, name="study"):
    """Some trials that are told, and one in training with reports, a curve and a lease."""
    leases = make_leases(storage, name)
    for i in range(n_told):
        held = leases.claim()
        leases.report(held, 0.1 * i, step=1)
        curve = {"epoch": [1, 2], "score": [0.1, None]}
        leases.tell(held, state=optuna.trial.TrialState.COMPLETE, value=0.5 + i, attrs={"note": [i, None]}, curve=curve)
    held = leases.claim()
    leases.report(held, 0.25, step=1)
    leases.checkpointed(held, epoch=1, curve={"epoch": [1], "score": [0.25]})
    return leases


def stop(leases):
    """What a worker does that is asked to stop."""
    for held in list(leases._held.values()):
        leases.release(held, reason="stopped")


def everything(storage):
    """All rows of all tables."""
    with storage.engine.connect() as connection:
        return {
            table: sorted(map(repr, connection.execute(sa.text(f"SELECT * FROM {table}")).all())) for table in TABLES
        }


def scalar(storage, query):
    with storage.engine.connect() as connection:
        return connection.execute(sa.text(query)).scalar()


# ---- init and upgrade


def test_init_makes_the_tables_and_may_be_repeated(run_cli, empty_database_url):
    for _ in range(2):
        told = run_cli("db", "init", FREM_SEARCH_STORAGE=empty_database_url)
        assert told.returncode == 0, told.stderr
        assert "the tables are there" in told.stdout
    with open_storage(empty_database_url) as storage:
        assert scalar(storage, "SELECT version FROM frem_schema") == len(schema.STEPS)


def test_the_embedded_database_has_no_roles(run_cli, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    told = run_cli("db", "init", "--worker-password-file", tmp_path / "password")
    assert told.returncode == 2
    assert "--storage: expected the URL of a server" in told.stderr


def test_a_database_made_before_versions_were_stored_gets_one(storage_url, postgres):
    name = storage_url.split("/")[3].split("?")[0]
    postgres.execute("DROP TABLE frem_schema", database=name)
    with open_storage(storage_url) as storage:
        make_trials(storage)
        assert scalar(storage, "SELECT version FROM frem_schema") == len(schema.STEPS)


def test_tables_of_a_newer_version_are_refused(storage_url, postgres, run_cli):
    name = storage_url.split("/")[3].split("?")[0]
    postgres.execute("UPDATE frem_schema SET version = 99", database=name)
    expected = r"expected version \d+, but got tables of version 99\. Install a newer frem-search"
    for upgrades in (False, True):
        with pytest.raises(StorageError, match=expected), open_storage(storage_url, upgrades=upgrades):
            pass
    assert run_cli("db", "upgrade", FREM_SEARCH_STORAGE=storage_url).returncode == 1
    assert postgres.execute("SELECT version FROM frem_schema", database=name) == [(99,)]


def test_older_tables_of_ours_are_refused_until_they_are_upgraded(storage_url, monkeypatch):
    with open_storage(storage_url) as storage:
        make_trials(storage)
        before = everything(storage)
    step = "ALTER TABLE frem_lease ADD COLUMN gpu text NOT NULL DEFAULT 'none'"
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    with (
        pytest.raises(StorageError, match=r"got tables of version 1\. Make a backup and run `frem-search db upgrade`"),
        open_storage(storage_url),
    ):
        pass
    for _ in range(2):
        with open_storage(storage_url, upgrades=True) as storage:
            assert scalar(storage, "SELECT version FROM frem_schema") == len(schema.STEPS)
            assert scalar(storage, "SELECT string_agg(DISTINCT gpu, ',') FROM frem_lease") == "none"
            assert everything(storage)["trials"] == before["trials"]


def test_a_step_that_fails_changes_nothing(storage_url, monkeypatch, postgres):
    name = storage_url.split("/")[3].split("?")[0]
    steps = ("ALTER TABLE frem_lease ADD COLUMN gpu text", "ALTER TABLE no_such_table ADD COLUMN gpu text")
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, *steps))
    with pytest.raises(StorageError, match="no_such_table"), open_storage(storage_url, upgrades=True):
        pass
    assert postgres.execute("SELECT version FROM frem_schema", database=name) == [(1,)]
    columns = "SELECT 1 FROM information_schema.columns WHERE table_name = 'frem_lease' AND column_name = 'gpu'"
    assert postgres.execute(columns, database=name) == []
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert postgres.execute(held, database=name) == [(0,)]


def test_older_tables_of_optuna_are_refused_until_they_are_upgraded(storage_url, run_cli, postgres):
    with open_storage(storage_url) as storage:
        make_trials(storage)
        before = everything(storage)
    # What Optuna 3.2 added; its own downgrade looks for another name of the index.
    name = storage_url.split("/")[3].split("?")[0]
    postgres.execute(
        "DROP INDEX ix_trials_study_id", "UPDATE alembic_version SET version_num = 'v3.0.0.d'", database=name
    )
    told = run_cli("study", "list", "--stored", FREM_SEARCH_STORAGE=storage_url)
    assert told.returncode == 1
    assert "but got Optuna's tables v3.0.0.d. Make a backup and run `frem-search db upgrade`" in told.stderr
    told = run_cli("db", "upgrade", FREM_SEARCH_STORAGE=storage_url)
    assert (told.returncode, told.stderr) == (0, "")  # whatever Alembic has to say
    with open_storage(storage_url) as storage:
        assert everything(storage) == before
    indexed = "SELECT count(*) FROM pg_indexes WHERE tablename = 'trials' AND indexdef LIKE '%(study_id)'"
    assert postgres.execute(indexed, database=name) == [(1,)]


def test_newer_tables_of_optuna_are_refused(storage_url, postgres):
    name = storage_url.split("/")[3].split("?")[0]
    postgres.execute("UPDATE alembic_version SET version_num = 'v99'", database=name)
    for upgrades in (False, True):
        with (
            pytest.raises(StorageError, match=r"but got Optuna's tables v99\. Install a newer frem-search"),
            open_storage(storage_url, upgrades=upgrades),
        ):
            pass


# ---- backup and restore


def test_a_restored_database_equals_the_one_that_was_backed_up(storage, empty_database_url, tmp_path):
    leases = make_trials(storage)
    before = everything(storage)
    assert len(before["frem_lease"]) == len(before["frem_curve"]) == 4
    assert back_up(storage, tmp_path / "a.dump") == (1, 4)
    leases.tell(leases.claim(), state=optuna.trial.TrialState.COMPLETE, value=1.0, attrs={})
    assert everything(storage) != before
    with open_storage(empty_database_url) as other:
        assert restore(other, tmp_path / "a.dump") == (1, 4)
        after = everything(other)
        assert len(after.pop("frem_lease")) == len(before.pop("frem_lease"))
        assert after == before
        copied = optuna.load_study(study_name="study", storage=other.optuna).trials
        assert [trial.params for trial in copied] == [trial.params for trial in leases._study.trials[:4]]
        assert [trial.value for trial in copied] == [0.5, 1.5, 2.5, None]


def test_a_search_goes_on_in_a_restored_database(storage, empty_database_url, tmp_path):
    make_trials(storage)
    with storage.engine.begin() as connection:  # the last attempt that a trial has
        connection.execute(sa.text("UPDATE frem_lease SET attempts = 3 WHERE token IS NOT NULL"))
    back_up(storage, tmp_path / "a.dump")
    with open_storage(empty_database_url) as other:
        restore(other, tmp_path / "a.dump")
        study = optuna.load_study(study_name="study", storage=other.optuna, sampler=optuna.samplers.RandomSampler())
        # Nobody holds a trial here, whoever does in the database that was backed up.
        reasons = scalar(other, "SELECT json_agg(reason ORDER BY trial_id) FROM frem_lease WHERE token IS NULL")
        assert reasons == [None, None, None, "restored from a backup"]
        leases = Leases(other, study, distributions=SPACE)
        adopted, asked = leases.claim(), leases.claim()
        assert (adopted.number, adopted.is_adopted, adopted.reported) == (3, True, 1)
        assert adopted.attempt == 3  # that it was cut off there does not count
        assert (asked.number, asked.is_adopted) == (4, False)


CLAIM = """
import sys
sys.path[:0] = sys.argv[2:]
import optuna
from frem_search.storage.database import open_storage
from test_backup import make_leases
optuna.logging.set_verbosity(optuna.logging.WARNING)
with open_storage(sys.argv[1]) as storage:
    leases = make_leases(storage, n_trials=10_000)
    while True:
        held = leases.claim()
        leases.report(held, 0.5, step=1)
        leases.tell(held, state=optuna.trial.TrialState.COMPLETE, value=1.0, attrs={}, curve={"epoch": [1]})
        print(held.number, flush=True)
"""


def test_a_backup_during_a_search_has_whole_trials_only(storage_url, empty_database_url, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, storage_url, str(Path(__file__).parent), *filter(None, sys.path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(3):
            process.stdout.readline()
        with open_storage(storage_url) as storage:
            _, n_trials = back_up(storage, tmp_path / "a.dump")
            n_later = scalar(storage, "SELECT count(*) FROM trials")
        before = int(process.stdout.readline())
        assert int(process.stdout.readline()) > before  # it was not held up for good
    finally:
        process.kill()
        process.communicate()
    assert 3 <= n_trials <= n_later
    with open_storage(empty_database_url) as other:
        assert restore(other, tmp_path / "a.dump") == (1, n_trials)
        for table, n_each in (("trial_params", 2), ("frem_lease", 1)):
            assert scalar(other, f"SELECT count(*) FROM {table}") == n_each * n_trials
        complete = "SELECT count(*) FROM trials JOIN trial_values USING (trial_id) WHERE state = 'COMPLETE'"
        assert scalar(other, complete) >= n_trials - 1


def test_a_database_with_studies_is_replaced_only_by_force(storage, storage_url, run_cli, tmp_path):
    stop(make_trials(storage, name="kept"))
    before = everything(storage)
    told = run_cli("db", "backup", "--out", tmp_path / "a.dump", FREM_SEARCH_STORAGE=storage_url)
    assert told.stdout == f"{tmp_path / 'a.dump'}: 1 study, 4 trials\n", told.stderr
    working = make_trials(storage, name="later", n_told=1)
    told = run_cli("db", "restore", tmp_path / "a.dump", FREM_SEARCH_STORAGE=storage_url)
    assert told.returncode == 2
    assert "expected a database without studies, but got 2" in told.stderr
    assert scalar(storage, "SELECT count(*) FROM studies") == 2
    both = everything(storage)
    told = run_cli("db", "restore", tmp_path / "a.dump", "--force", FREM_SEARCH_STORAGE=storage_url)
    assert told.returncode == 1
    assert "expected a database that nobody works on, but got 1 at work. Stop these workers first" in told.stderr
    assert f":{os.getpid()}.\n" in told.stderr
    assert everything(storage) == both
    stop(working)
    told = run_cli("db", "restore", tmp_path / "a.dump", "--force", FREM_SEARCH_STORAGE=storage_url)
    assert told.returncode == 0, told.stderr
    assert everything(storage) == before


def test_a_worker_that_died_does_not_keep_a_database_from_being_replaced(storage, tmp_path):
    make_trials(storage)
    back_up(storage, tmp_path / "a.dump")
    with storage.engine.begin() as connection:  # this process's number was another one's
        connection.execute(sa.text("UPDATE frem_lease SET pid_started = pid_started - 1000"))
    assert restore(storage, tmp_path / "a.dump", force=True) == (1, 4)


def test_the_embedded_database_is_backed_up_and_restored(run_cli, tmp_path, tiny_study):
    assert run_cli("run", "--study", tiny_study, "--n-trials", 1).returncode == 0
    told = run_cli("db", "backup", "--out", tmp_path / "a.dump")
    assert told.returncode == 0, told.stderr
    trials = run_cli("trials", "--study", tiny_study, "--format", "json").stdout
    assert run_cli("study", "delete", "tiny", "--yes").returncode == 0
    told = run_cli("db", "restore", tmp_path / "a.dump")
    assert told.returncode == 0, told.stderr
    restored = run_cli("trials", "--study", tiny_study, "--format", "json").stdout
    assert json.loads(restored) == json.loads(trials)
    assert len(json.loads(trials)) == 1


def test_a_restore_that_fails_changes_nothing(storage, empty_database_url, postgres, tmp_path):
    make_trials(storage)
    back_up(storage, tmp_path / "a.dump")
    name = empty_database_url.split("/")[3].split("?")[0]
    with open_storage(empty_database_url) as other:
        stop(make_trials(other, n_told=1))
        # A table of somebody else that hangs on one of ours cannot be dropped by the way.
        postgres.execute("CREATE TABLE mine (trial_id integer REFERENCES trials)", database=name)
        before = everything(other)
        with pytest.raises(StorageError, match=r"a\.dump was not restored, and nothing was changed: .*constraint"):
            restore(other, tmp_path / "a.dump", force=True)
        assert everything(other) == before


def test_what_is_no_backup_is_refused(storage, tmp_path, postgres):
    (tmp_path / "text").write_text("SELECT 1;")
    postgres.execute("CREATE TABLE mine (number integer)", database=(foreign := postgres.create()))
    dump = programs.find_program("pg_dump")
    for_foreign = ["--format=custom", f"--file={tmp_path / 'foreign'}", f"--dbname={postgres.url(foreign)}"]
    subprocess.run([dump, *for_foreign], check=True)
    reasons = {
        "text": "Give the path of one",
        "foreign": "another program's",
        "missing": "No such file or directory. Give",
    }
    for name, reason in reasons.items():
        with pytest.raises(UsageError, match=f"expected a backup by `frem-search db backup`, .*{reason}"):
            restore(storage, tmp_path / name)


def test_a_truncated_backup_is_refused(storage, tmp_path):
    stop(make_trials(storage))
    back_up(storage, tmp_path / "a.dump")
    content = (tmp_path / "a.dump").read_bytes()
    for n_bytes in (3, len(content) // 2, len(content) - 100):
        (tmp_path / "cut.dump").write_bytes(content[:n_bytes])
        before = everything(storage)
        with pytest.raises((UsageError, StorageError)):
            restore(storage, tmp_path / "cut.dump", force=True)
        assert everything(storage) == before


def test_a_backup_of_newer_tables_is_refused(storage, storage_url, postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, "ALTER TABLE frem_lease ADD COLUMN gpu text"))
    with open_storage(storage_url, upgrades=True) as newer:
        back_up(newer, tmp_path / "a.dump")
    assert read_archive(tmp_path / "a.dump").tables == 2
    monkeypatch.undo()
    with (
        open_storage(postgres.url(postgres.create())) as other,
        pytest.raises(StorageError, match="Install the frem-search"),
    ):
        restore(other, tmp_path / "a.dump")


def test_a_backup_of_a_newer_optuna_is_refused_and_destroys_nothing(storage, postgres, tmp_path):
    stop(make_trials(storage, name="precious"))
    before = everything(storage)
    newer = postgres.create()
    with open_storage(postgres.url(newer)) as other:
        stop(make_trials(other, name="newer"))
    postgres.execute("UPDATE alembic_version SET version_num = 'v99'", database=newer)
    dump = programs.find_program("pg_dump")
    subprocess.run([dump, "--format=custom", f"--file={tmp_path / 'a'}", f"--dbname={postgres.url(newer)}"], check=True)
    assert read_archive(tmp_path / "a").optuna == "v99"
    with pytest.raises(StorageError, match=r"expected Optuna's tables v\S+ or older, but got v99\. Install the frem"):
        restore(storage, tmp_path / "a", force=True)
    assert everything(storage) == before


def test_a_backup_of_an_older_optuna_is_brought_up_to_date(storage, postgres, empty_database_url, tmp_path):
    make_trials(storage)
    back_up(storage, tmp_path / "a.dump")
    current = read_archive(tmp_path / "a.dump").optuna
    name = empty_database_url.split("/")[3].split("?")[0]
    with open_storage(empty_database_url) as other:
        restore(other, tmp_path / "a.dump")
        postgres.execute(
            "DROP INDEX ix_trials_study_id", "UPDATE alembic_version SET version_num = 'v3.0.0.d'", database=name
        )
        back_up(other, tmp_path / "older.dump")
        assert read_archive(tmp_path / "older.dump").optuna == "v3.0.0.d"
        restore(other, tmp_path / "older.dump", force=True)
        assert scalar(other, "SELECT version_num FROM alembic_version") == current


def test_only_the_user_reads_a_backup(storage, tmp_path):
    before = os.umask(0o022)
    try:
        back_up(storage, tmp_path / "a.dump")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.dump").stat().st_mode) == 0o600


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(storage, tmp_path, monkeypatch, has_links):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    if not has_links:  # as on FAT
        monkeypatch.setattr("os.link", refuse)
    back_up(storage, tmp_path / "a.dump")
    assert read_archive(tmp_path / "a.dump").tables == len(schema.STEPS)
    monkeypatch.setattr(
        "frem_search.storage.admin.backup.read_archive", lambda file: (tmp_path / "b.dump").write_text("somebody's")
    )
    with pytest.raises(UsageError, match="it is there already"):
        back_up(storage, tmp_path / "b.dump")
    assert (tmp_path / "b.dump").read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dump", "b.dump"]


def test_a_backup_never_replaces_a_file(storage, tmp_path):
    (tmp_path / "a.dump").write_text("kept")
    for file, reason in (("a.dump", "it is there already"), ("nowhere/a.dump", "is none. Make it first")):
        with pytest.raises(UsageError, match=reason):
            back_up(storage, tmp_path / file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_without_the_programs_the_remedy_is_told(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_candidates", lambda name: [])
    with pytest.raises(
        StorageError, match=r"pg_dump: expected the program .* but got none\. Install PostgreSQL's client"
    ):
        back_up(storage, tmp_path / "a.dump")
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_program_that_is_new_enough_is_taken(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # those of the wheel alone
    assert programs._major(programs.find_program("pg_dump", at_least=15)) == 16
    assert programs._major(programs.find_program("pg_dump", at_least=17)) == 18
    assert programs._major(programs.find_program("pg_restore")) == 18


def test_a_backup_of_a_newer_server_is_refused(tmp_path, storage, monkeypatch):
    back_up(storage, tmp_path / "a.dump")
    monkeypatch.setattr("frem_search.storage.admin.backup._server", lambda storage: 12)
    with pytest.raises(StorageError, match=r"made from PostgreSQL 18, but the server is PostgreSQL 12"):
        restore(storage, tmp_path / "a.dump")
