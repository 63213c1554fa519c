"""The dashboard on a real search: by its own interface, in a browser, as a process."""

import csv
import io
import json
import signal
import urllib.error
import urllib.request
import uuid
from types import SimpleNamespace

import imagecodecs
import optuna
import psutil
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from frem_search.cli.dashboard import dashboard
from frem_search.dashboard import server
from frem_search.dashboard.artifact_store import StudyArtifacts
from frem_search.dashboard.server import make_app, require_extra
from frem_search.errors import ChromeNotFoundError, StorageError, UsageError
from frem_search.figures.pictures import find_chrome
from frem_search.search.begin import open_worker
from frem_search.segmentation.pictures import GAP, PANEL
from frem_search.storage.artifacts import Artifacts
from frem_search.storage.database import Storage, open_storage
from frem_search.storage.leases.leases import Leases
from frem_search.storage.url import normalise_url
from frem_search.study.file import load_study_file
from frem_search.study.samplers import distributions
from frem_search.study.stored import make_contract, open_study

TOKEN = "the-token-of-these-tests"
BROWSER_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def leases(tiny_study, storage):
    """Leases on the tiny study, of which nothing is trained."""
    study_file = load_study_file(str(tiny_study))
    contract = make_contract(
        study_file, precision="fp32", dataset="tiny", dataset_fingerprint="0" * 64, class_names=["ground", "disc"]
    )
    study = open_study(storage, study_file, contract)
    with Leases(storage, study.optuna, distributions=distributions(study_file.space)) as leases:
        yield leases


@pytest.fixture
def searched(tiny_study, storage, tmp_path):
    """The tiny study, searched; its artifacts are under `artifacts`."""
    study_file = load_study_file(str(tiny_study))
    with open_worker(study_file, storage, artifacts=str(tmp_path / "artifacts"), device="cpu") as (study, worker, _):
        list(worker.work())
    return study


@pytest.fixture
def call(storage, tmp_path):
    """Ask the dashboard behind the gate: `call("/api/studies")` gives status and body."""

    def call(path, method="GET", body=b"", *, opened=storage, is_writable=False):
        app = make_app(
            opened, artifacts=str(tmp_path / "artifacts"), token=TOKEN, is_writable=is_writable, hosts=frozenset()
        )
        answer = {}
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "HTTP_AUTHORIZATION": f"Bearer {TOKEN}",
            "SERVER_NAME": "test", "SERVER_PORT": "1", "HTTP_HOST": "test:1", "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(), "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": "application/json",
        }  # fmt: skip
        parts = app(environ, lambda status, headers, error=None: answer.update(status=int(status[:3]), headers=headers))
        content = b"".join(parts)
        getattr(parts, "close", lambda: None)()
        return SimpleNamespace(status=answer["status"], body=content, headers=dict(answer["headers"]))

    return call


def trials_of(call, study_id, **settings):
    return json.loads(call(f"/api/studies/{study_id}", **settings).body)["trials"]


def file_of(call, study, trial, name):
    (found,) = [each for each in trial["artifacts"] if each["filename"] == name]
    return found, call(f"/artifacts/{study.id}/{trial['trial_id']}/{found['artifact_id']}")


def test_a_completed_trial_shows_its_scores_curve_and_predictions(searched, call):
    trials = trials_of(call, searched.id)
    assert len(trials) == 3
    for trial, stored in zip(trials, searched.optuna.trials, strict=True):
        note = trial["note"]["body"]
        assert note.startswith("**complete**")
        for part in (stored.user_attrs["result"]["val"], stored.user_attrs["result"]["test"]):
            for iou in (part["mean_iou"], *part["per_class"].values()):
                assert ("absent" if iou is None else f"{iou:.4f}") in note
        assert "- device: cpu" in note
        assert [each["filename"] for each in trial["artifacts"]] == ["learning_curve.csv", "predictions.png"]
        meta, curve = file_of(call, searched, trial, "learning_curve.csv")
        assert (curve.status, meta["mimetype"]) == (200, "text/csv")
        rows = list(csv.DictReader(io.StringIO(curve.body.decode())))
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert max(float(row["score"]) for row in rows) == stored.value
        assert set(rows[0]) >= {"train_loss", "score of ground", "score of disc", "score of square"}
        meta, picture = file_of(call, searched, trial, "predictions.png")
        assert (picture.status, picture.headers["Content-Type"]) == (200, "image/png")
        assert imagecodecs.png_decode(picture.body).shape == (2 * PANEL + GAP, 3 * PANEL + 2 * GAP, 3)


def test_the_files_are_artifacts_as_optuna_has_them(searched, storage, tmp_path):
    store = StudyArtifacts(storage, str(tmp_path / "artifacts"))
    trial = searched.optuna.trials[1]
    metas = optuna.artifacts.get_all_artifact_meta(study_or_trial=trial, storage=storage.optuna)
    assert [meta.filename for meta in metas] == ["learning_curve.csv", "predictions.png"]
    path = tmp_path / "copy.csv"
    optuna.artifacts.download_artifact(artifact_store=store, file_path=str(path), artifact_id=metas[0].artifact_id)
    assert path.read_bytes() == (tmp_path / f"artifacts/{searched.artifacts_prefix}/1/learning_curve.csv").read_bytes()


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_a_trial_that_did_not_complete_shows_why(leases, call, state):
    leases.tell(leases.claim(), state=state, attrs={"reason": "RuntimeError: <b>*no*</b>\n# memory"})
    leases.keep_notes()
    (trial,) = trials_of(call, leases._study_id)
    assert trial["note"]["body"] == f"**{state.name.lower()}**\n\n    RuntimeError: <b>*no*</b>\n    # memory"
    assert trial["artifacts"] == []


def test_a_note_comes_with_the_next_claim_or_the_end_of_the_worker(tiny_study, leases, storage, call):
    study_file = load_study_file(str(tiny_study))
    study = optuna.load_study(study_name="tiny", storage=storage.optuna)

    def notes():
        return [trial["note"]["body"][:6] for trial in trials_of(call, leases._study_id)]

    with Leases(storage, study, distributions=distributions(study_file.space)) as others:
        for _ in range(2):
            others.tell(others.claim(), state=TrialState.FAIL, attrs={"reason": "none"})
        assert notes() == ["**fail", ""]
    assert notes() == ["**fail", "**fail"]


def test_a_tell_does_not_wait_for_a_claim(leases, storage_url):
    held = leases.claim()
    with open_storage(storage_url) as other, other.engine.begin() as claiming:
        claiming.execute(sa.text("SELECT 1 FROM studies FOR UPDATE"))
        claiming.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '10s'"))
        leases.tell(held, state=TrialState.COMPLETE, value=0.5, attrs={}, shown={"artifacts:x": "null"})
        claiming.execute(sa.text("SELECT 1"))  # it was not ended meanwhile


def test_a_trial_that_is_given_up_shows_why(leases, storage, call):
    for _ in range(4):
        held = leases.claim()
        if held.number:
            break
        leases.release(held, reason="killed", is_forgiven=False)
    (given_up, _) = trials_of(call, leases._study_id)
    assert "    3 attempts in a row advanced no checkpoint; the last ended: killed" in given_up["note"]["body"]


def test_what_somebody_wrote_during_the_training_stays(leases, call):
    from optuna_dashboard import save_note

    held = leases.claim()
    save_note(held.trial, "mine")
    leases.tell(held, state=TrialState.PRUNED, attrs={"reason": "theirs"})
    leases.keep_notes()
    assert trials_of(call, leases._study_id)[0]["note"] == {"version": 1, "body": "mine"}


def test_a_long_note_comes_back_whole(leases, call):
    reason = " ".join(map(str, range(3000)))
    leases.tell(leases.claim(), state=TrialState.FAIL, attrs={"reason": reason})
    leases.keep_notes()
    assert trials_of(call, leases._study_id)[0]["note"]["body"].endswith(f"    {reason}")


def test_a_database_that_may_only_be_read_is_shown(searched, postgres, storage_url, call):
    role, database = f"reader_{uuid.uuid4().hex[:8]}", normalise_url(storage_url).database
    postgres.execute(f"CREATE ROLE {role} LOGIN", f"GRANT pg_read_all_data TO {role}", database=database)
    url = storage_url.replace("postgres@", f"{role}@")
    try:
        with open_storage(url, is_read_only=True, n_connections=3) as opened:
            assert [trial["state"] for trial in trials_of(call, searched.id, opened=opened)] == ["Complete"] * 3
            assert json.loads(call("/api/studies", opened=opened).body)["study_summaries"][0]["study_name"] == "tiny"
    finally:
        postgres.execute(f"DROP ROLE {role}", database=database)


def test_a_storage_opened_for_reading_writes_nothing(searched, storage_url):
    with open_storage(storage_url, is_read_only=True) as opened:
        with pytest.raises(optuna.exceptions.StorageInternalError) as raised:
            opened.optuna.set_study_user_attr(searched.id, "n_trials", 99)
        assert "read-only transaction" in str(raised.value.__cause__)
        assert opened.optuna.get_study_user_attrs(searched.id)["n_trials"] == 3


def test_a_database_without_tables_is_told_and_left_as_it_is(postgres, empty_database_url):
    with pytest.raises(StorageError, match=r"expected the tables of a search.*`frem-search run`"):
        Storage(normalise_url(empty_database_url), is_read_only=True)
    database = normalise_url(empty_database_url).database
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    assert postgres.execute(tables, database=database) == [(0,)]


def test_with_write_a_study_can_be_deleted_and_without_it_not(searched, call, storage):
    assert call(f"/api/studies/{searched.id}", "DELETE").status == 405
    assert len(searched.optuna.trials) == 3
    assert call(f"/api/studies/{searched.id}", "DELETE", is_writable=True).status == 204
    assert optuna.get_all_study_names(storage.optuna) == []


def test_a_file_that_is_added_can_be_read_and_removed(leases, call, tmp_path, storage):
    held = leases.claim()
    path = f"/api/artifacts/{leases._study_id}/{held.id}"
    body = json.dumps({"file": "data:text/plain;base64,aGVsbG8=", "filename": "hello.txt"}).encode()
    assert call(path, "POST", body).status == 405
    added = call(path, "POST", body, is_writable=True)
    assert added.status == 201
    artifact_id = json.loads(added.body)["artifact_id"]
    shown = call(f"/artifacts/{leases._study_id}/{held.id}/{artifact_id}")
    assert shown.body == b"hello"
    assert shown.headers["Content-Security-Policy"].startswith("sandbox")
    store = StudyArtifacts(storage, str(tmp_path / "artifacts"))
    store.remove(artifact_id)
    with pytest.raises(optuna.artifacts.exceptions.ArtifactNotFound, match="no such file"):
        store.open_reader(artifact_id)
    assert [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == []


def test_a_file_that_is_gone_is_told_with_the_remedy(searched, call, tmp_path):
    trial = trials_of(call, searched.id)[0]
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
    _, picture = file_of(call, searched, trial, "predictions.png")
    assert picture.status == 404
    assert picture.body.endswith(b"no such file. Give --artifacts as the search was started with.\n")


@pytest.mark.parametrize("artifact_id", ["../secret", "a/b", "", "0" * 32 + "-0-0"])
def test_an_id_leads_to_no_other_file(storage, tmp_path, artifact_id):
    (tmp_path / "secret").write_text("secret")
    store = StudyArtifacts(storage, str(tmp_path / "artifacts"))
    with pytest.raises(optuna.artifacts.exceptions.ArtifactNotFound):
        store.open_reader(artifact_id)


def test_a_fork_shows_what_the_trials_left_behind(searched, call, tiny_study, run_cli, storage, storage_url, tmp_path):
    other = tiny_study.with_name("other.toml")
    other.write_text(tiny_study.read_text().replace("n_trials = 3", "n_trials = 4"))
    settings = {"FREM_SEARCH_STORAGE": storage_url, "FREM_SEARCH_ARTIFACTS": tmp_path / "artifacts"}
    forked = run_cli("study", "fork", other, "--from", "tiny", **settings)
    assert forked.returncode == 0, forked.stderr
    before = trials_of(call, searched.id)
    Artifacts(str(tmp_path / "artifacts"), searched.artifacts_prefix).remove_all()
    study = optuna.load_study(study_name="other", storage=storage.optuna)
    copies = trials_of(call, study._study_id)
    assert [copy["note"]["body"] for copy in copies] == [trial["note"]["body"] for trial in before]
    for copy in copies:
        _, curve = file_of(call, SimpleNamespace(id=study._study_id), copy, "learning_curve.csv")
        assert curve.body.startswith(b"epoch,")


def test_an_exported_study_has_each_note_at_its_trial(leases, call, run_cli, storage, storage_url, tmp_path):
    optuna.create_study(storage=storage.optuna, study_name="before").ask()
    for reason in ("first", "second"):
        leases.tell(leases.claim(), state=TrialState.FAIL, attrs={"reason": reason})
    leases.keep_notes()
    exported = run_cli("export", "--study", "tiny", "--sqlite", "tiny.db", FREM_SEARCH_STORAGE=storage_url)
    assert exported.returncode == 0, exported.stderr
    copy = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'tiny.db'}")
    try:
        trials = trials_of(call, 1, opened=SimpleNamespace(optuna=copy))
        assert [trial["note"]["body"].split()[-1] for trial in trials] == ["first", "second"]
        assert [trial["trial_id"] for trial in trials] == [1, 2]
        assert {trial._trial_id for trial in storage.optuna.get_all_trials(leases._study_id)} != {1, 2}
    finally:
        copy.remove_session()
        copy.engine.dispose()


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(server, "EXTRA", ("optuna_dashboard", "no_such_package"))
    with pytest.raises(UsageError, match=r'no_such_package cannot be .* `pip install "frem-search\[dashboard\]"`'):
        require_extra()


@pytest.fixture
def served(searched, start_cli, storage_url, tmp_path):
    """The command as a process, and where it listens."""

    def serve(*args, **settings):
        settings = {"FREM_SEARCH_STORAGE": storage_url, "FREM_SEARCH_ARTIFACTS": tmp_path / "artifacts"} | settings
        process = start_cli("dashboard", "--port", "0", *args, **settings)
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        (url,) = [word for line in lines for word in line.split() if word.startswith("http")]
        return SimpleNamespace(process=process, url=url, told="".join(lines))

    return serve


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(served, number):
    running = served()
    assert get(running.url.partition("?")[0])[0] == 401
    assert "token=" in running.url
    argv = " ".join(psutil.Process(running.process.pid).cmdline())
    assert running.url.partition("token=")[2] not in argv
    running.process.send_signal(number)
    out, err = running.process.communicate(timeout=20)
    assert (running.process.returncode, out, err) == (0, "", "")


def test_a_token_of_the_environment_opens_and_is_not_repeated(served, storage_url):
    running = served(FREM_SEARCH_DASHBOARD_TOKEN=TOKEN)
    status, text = get(f"{running.url}api/studies", Authorization=f"Bearer {TOKEN}")
    assert (status, [each["study_name"] for each in json.loads(text)["study_summaries"]]) == (200, ["tiny"])
    assert get(f"{running.url}api/studies", Authorization=f"Bearer {TOKEN}", Host="evil.example")[0] == 403
    running.process.terminate()
    out, err = running.process.communicate(timeout=20)
    assert TOKEN not in running.told + out + err


@pytest.mark.parametrize("write", [False, True])
def test_the_database_itself_refuses_what_the_command_may_not_do(storage, storage_url, tmp_path, monkeypatch, write):
    opened = []
    monkeypatch.setattr(server, "make_app", lambda opened_storage, **_: opened.append(setting_of(opened_storage)))
    monkeypatch.setattr(server, "serve", lambda *_, **__: None)
    dashboard(storage=storage_url, artifacts=str(tmp_path), port=0, write=write)
    assert opened == ["off" if write else "on"]


def setting_of(opened):
    with opened.engine.connect() as connection:
        return connection.execute(sa.text("SHOW default_transaction_read_only")).scalar()


def test_an_address_that_others_reach_is_warned_of(served):
    told = served("--host", "0.0.0.0", "--write").told
    assert "warning: this is plain HTTP" in told
    assert "warning: --write" in told


def test_a_browser_shows_trials_note_and_files_and_changes_nothing(served, searched):
    try:
        chrome = find_chrome()
    except ChromeNotFoundError as error:
        pytest.skip(str(error))
    from playwright.sync_api import expect, sync_playwright

    running = served()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chrome, args=BROWSER_ARGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(running.url)
        expect(page.get_by_text("tiny").first).to_be_visible(timeout=20_000)
        assert "token" not in page.url
        root = page.url.partition("/dashboard")[0]
        page.goto(f"{root}/dashboard/studies/{searched.id}/trials?numbers=1")
        for text in ("Trial 0", "Trial 2", "With the weights of epoch", "square", "learning_curve.csv"):
            expect(page.get_by_text(text).first).to_be_visible(timeout=20_000)
        picture = page.locator("img[src*='/artifacts/']")
        expect(picture).to_be_visible(timeout=20_000)
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 3 * PANEL + 2 * GAP
        refused = page.evaluate(
            "id => fetch(`/api/studies/${id}`, {method: 'DELETE'}).then(async r => [r.status, await r.text()])",
            searched.id,
        )
        assert refused[0] == 405
        assert "--write" in refused[1]
        assert page.evaluate("document.cookie") == ""
        other = browser.new_page()
        assert other.goto(f"{root}/dashboard").status == 401
        other.locator("input[name=token]").fill(running.url.partition("token=")[2])
        other.get_by_role("button").click()
        expect(other.get_by_text("tiny").first).to_be_visible(timeout=20_000)
        assert "token" not in other.url
        browser.close()
    assert problems == []
    assert len(searched.optuna.trials) == 3
