"""The image and the Compose files: what they promise, and every service's own command against a real server."""

import fnmatch
import importlib.metadata
import itertools
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import uuid

import psutil
import psycopg2
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import REPOSITORY
from servers import TcpServer, find_binaries, user_for_server
from typer.main import get_command

from frem_search.cli import app

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
GPU = yaml.safe_load((REPOSITORY / "docker-compose.gpu.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = ("db-init", "worker", "dashboard")


def instructions():
    """The Dockerfile as pairs of keyword and argument, lines with a backslash joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def last_stage():
    lines = instructions()
    return lines[max(i for i, (word, _) in enumerate(lines) if word == "FROM") :]


def filled(value, **settings):
    """A value with its ${NAME:-default} replaced, as Compose does it."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: settings.get(found[1]) or found[2] or "", str(value))


# ---- the files


def validate(*files):
    """Whether files keep to the JSON schema of the Compose specification, and what is said of them."""
    pytest.importorskip("check_jsonschema")
    words = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_compose_files_keep_to_the_specification(tmp_path):
    assert validate(*(REPOSITORY / name for name in ("docker-compose.yml", "docker-compose.gpu.yml")))[0] == 0
    for slip in ("stop_grace_period: 5m", "condition: service_healthy", "retries: 24", "cap_drop: [ALL]"):
        broken = tmp_path / "docker-compose.yml"
        text = (REPOSITORY / broken.name).read_text()
        assert slip in text
        broken.write_text(text.replace(slip, slip.replace(": ", "s: ")))
        status, told = validate(broken)
        assert status == 1
        assert slip.split(":")[0] + "s" in told


def test_values_that_yaml_would_read_as_something_else_are_text():
    # The specification takes numbers and booleans, and writes them as it likes: `on` becomes `true`.
    for service in (*SERVICES.values(), *GPU["services"].values()):
        assert all(isinstance(value, str | None) for value in service.get("environment", {}).values())
        assert all(isinstance(word, str) for word in service.get("command", []))
    assert SERVICES["db-init"]["restart"] == "no"


def test_what_a_service_names_is_there():
    secrets = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert secrets == set(COMPOSE["secrets"])
    assert all(secret == {"file": f"secrets/{name}"} for name, secret in COMPOSE["secrets"].items())
    volumes = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert volumes == set(COMPOSE["volumes"])
    for service in SERVICES.values():
        for word in [*service.get("command", []), *map(str, service["environment"].values())]:
            for secret in re.findall(r"/run/secrets/(\w+)", word):
                assert secret in service["secrets"]


def test_services_start_in_an_order_that_ends():
    order = []
    while len(order) < len(SERVICES):
        ready = [n for n, s in SERVICES.items() if n not in order and set(s.get("depends_on", {})) <= set(order)]
        assert ready
        order += ready
    assert order == ["postgres", "db-init", "worker", "dashboard"]
    conditions = {"postgres": "service_healthy", "db-init": "service_completed_successfully"}
    for service in SERVICES.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": conditions[name]}
    assert SERVICES["postgres"]["healthcheck"]["test"][1] == "pg_isready"


def test_no_password_stands_in_a_compose_file():
    for service in (*SERVICES.values(), *GPU["services"].values()):
        for name, value in service["environment"].items():
            assert not re.search(r"://[^/@]*:[^/@]*@", value or ""), name
            assert not re.search("password|secret|token", name, re.IGNORECASE) or str(value).startswith("/run/secrets/")
    assert "/secrets/" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_each_service_connects_with_the_least_that_it_needs():
    roles = {name: re.search(r"//(\w+)@", SERVICES[name]["environment"]["FREM_SEARCH_STORAGE"])[1] for name in OURS}
    assert roles == {"db-init": "frem", "worker": "frem_worker", "dashboard": "frem_reader"}
    assert {name: SERVICES[name]["secrets"] for name in ("worker", "dashboard")} == {
        "worker": ["worker_password"], "dashboard": ["reader_password", "dashboard_token"],
    }  # fmt: skip


def test_only_the_dashboard_is_reached_from_outside_and_from_this_machine_alone():
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "dashboard": ["127.0.0.1:8080:8080"]
    }


def test_our_containers_have_no_rights_and_write_to_volumes_alone():
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["tmpfs"] == ["/tmp"], name  # the only other place that Python needs
        assert "user" not in service, name  # the image's own, who is not root
        assert not {"privileged", "cap_add", "devices", "network_mode", "pid"} & set(service), name


def test_the_dashboard_cannot_change_a_file():
    assert SERVICES["dashboard"]["volumes"] == ["data:/data:ro"]


def test_a_container_s_first_process_reaps_and_passes_signals_on():
    assert all(SERVICES[name]["init"] is True for name in OURS)


def test_the_database_outlives_its_container():
    # From version 18 on the image keeps it in /var/lib/postgresql/18/docker, and declares a volume of its own above it.
    # A named one anywhere else stays empty.
    assert int(SERVICES["postgres"]["image"].removeprefix("postgres:")) >= 18
    assert SERVICES["postgres"]["volumes"] == ["database:/var/lib/postgresql"]
    assert SERVICES["postgres"]["stop_grace_period"] == "1m"  # Docker's own ten seconds may cut a checkpoint short


def test_a_worker_has_time_to_store_its_trial():
    assert SERVICES["worker"]["stop_grace_period"] == "5m"
    assert "data:/data" in SERVICES["worker"]["volumes"]


def test_a_worker_comes_again_after_an_error_but_not_for_ever():
    assert SERVICES["worker"]["restart"] == "on-failure:1000"


def test_there_may_be_several_workers():
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["worker"])


def test_what_serves_comes_again_with_the_machine():
    assert {name for name, service in SERVICES.items() if service["restart"] == "unless-stopped"} == {
        "postgres", "dashboard",
    }  # fmt: skip


def test_the_gpu_file_changes_the_worker_alone():
    assert set(GPU) == {"services"}
    assert set(GPU["services"]) == {"worker"}
    assert set(GPU["services"]["worker"]) == {"command", "environment", "deploy"}


def test_the_gpu_file_gives_one_container_all_gpus():
    (device,) = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["worker"]


def test_the_gpu_file_puts_a_worker_on_each_gpu():
    assert GPU["services"]["worker"]["command"] == ["run"]  # `worker` would use the first alone
    assert GPU["services"]["worker"]["environment"] == {"FREM_SEARCH_DEVICE": "auto"}  # the first file says cpu


def test_images_are_pinned_to_a_version_of_debian_too():
    stages = [argument for word, argument in instructions() if word == "FROM"]
    assert stages == ["python:3.12-slim-trixie AS build", "python:3.12-slim-trixie"]
    assert SERVICES["postgres"]["image"] == "postgres:18"


def needed(requirement, *, of=()):
    """The names of the packages that a requirement brings along here, its own included."""
    name = canonicalize_name(requirement.name)
    found = {name}
    try:
        further = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # what builds ours need not be installed
        return found
    for each in map(Requirement, further):
        extras = requirement.extras or {""}
        is_wanted = any(each.marker is None or each.marker.evaluate({"extra": extra}) for extra in extras)
        if is_wanted and canonicalize_name(each.name) not in of:
            found |= needed(each, of={*of, *found})
    return found


def test_every_package_of_the_image_and_what_builds_it_is_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    ours = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dashboard"]]
    wanted = set().union(*(needed(Requirement(each)) for each in [*ours, *project["build-system"]["requires"], "pip"]))
    pins = [Requirement(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines()[1:]]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    assert wanted - {canonicalize_name(pin.name) for pin in pins} == set()


def test_the_image_runs_as_nobody_in_particular_and_holds_no_build_tools():
    lines = last_stage()
    users = [argument for word, argument in lines if word == "USER"]
    assert users == ["10001:10001"]
    assert not any(re.search(r"\bpip\b|apt|gcc|build-essential", argument) for _, argument in lines)
    installs = re.findall(
        r"pip install .*?(?=&&|$)", "\n".join(a for w, a in instructions() if w == "RUN"), re.MULTILINE
    )
    assert installs
    assert all("-c constraints.txt" in each for each in installs)
    # pip builds in an environment of its own, for which -c does not count.
    assert all("--build-constraint constraints.txt" in each for each in installs if re.search(r"[\"' ]\.", each))


def test_the_image_is_built_from_files_that_are_there_and_not_kept_out():
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        name
        for word, argument in instructions()
        if word == "COPY" and "--from" not in argument
        for name in argument.split()[:-1]
    }
    assert copied == let_in
    assert all((REPOSITORY / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch("secrets/owner_password", name) for name in let_in)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = {*project["project"]["license-files"], project["project"]["readme"]}
    assert needed | set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]) <= copied
    extras = set(re.findall(r"\.\[(\w+)\]", DOCKERFILE))
    assert extras <= set(project["project"]["optional-dependencies"])


def test_the_image_starts_the_command():
    entry = [argument for word, argument in last_stage() if word == "ENTRYPOINT"]
    assert [json.loads(each) for each in entry] == [["frem-search"]]
    assert "frem-search" in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(
    "line", [line for line in (REPOSITORY / "docker-compose.yml").read_text().splitlines() if "docker compose" in line]
)
def test_the_usage_names_files_and_services_that_are_there(line):
    words = shlex.split(line.strip("# "), comments=True)
    assert all((REPOSITORY / word).exists() for word in words if word.endswith(".yml"))
    assert all(word.split("=")[0] in SERVICES for before, word in itertools.pairwise(words) if before == "--scale")


# ---- every service's command, as Compose would start it


class ComposedServer(TcpServer):
    """A server as the image `postgres` sets it up with the environment and the command of the service.

    As the image does it: the superuser's name and password and POSTGRES_INITDB_ARGS to initdb, a line with
    POSTGRES_HOST_AUTH_METHOD at the end of pg_hba.conf, and the database POSTGRES_DB.
    """

    def __init__(self, folder, binaries, user):
        super().__init__(folder, binaries, user)
        self.passwords["frem"] = "0wn{e}r%@:/"

    def initialise(self):
        given = SERVICES["postgres"]["environment"]
        secret = self.folder / "superuser"
        secret.write_text(self.passwords["frem"] + "\n")
        for path in (self.folder, secret):
            shutil.chown(path, self.user)
        arguments = shlex.split(given.get("POSTGRES_INITDB_ARGS", ""))
        self._run("initdb", "-D", self.data, f"--username={given['POSTGRES_USER']}", f"--pwfile={secret}", *arguments)
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write(f"\nhost all all all {given['POSTGRES_HOST_AUTH_METHOD']}\n")
        self.start()
        self.execute(f"CREATE DATABASE {given['POSTGRES_DB']}")

    def start(self):
        here = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}", "-c", "fsync=off"]
        here += ["-c", f"unix_socket_directories={self.folder}"]
        options = shlex.join([*SERVICES["postgres"]["command"][1:], *here])
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.log, "-o", options)

    def execute(self, *statements, role="frem", database="postgres", values=None):
        return super().execute(*statements, role=role, database=database, values=values)


@pytest.fixture(scope="module")
def composed_server(run_folder):
    binaries, user = find_binaries(), user_for_server()
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and this machine has no other user to run it.")
    folder = run_folder / f"composed-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    server = ComposedServer(folder, binaries, user)
    try:
        server.initialise()
    except PermissionError:
        pytest.skip(f"User {user} may not run the programs in {binaries}.")
    yield server
    if server.is_running():
        server.stop("immediate")


@pytest.fixture
def composed(composed_server, tmp_path):
    """The service postgres with an empty database, and the folder of all secrets."""
    if not composed_server.is_running():
        composed_server.start()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    passwords = {"owner": composed_server.passwords["frem"], "worker": "w%orker/@", "reader": "r:e{}ader"}
    for who, password in passwords.items():
        (secrets / f"{who}_password").write_text(password + "\n")
    (secrets / "dashboard_token").write_text("a-token-of-more-than-sixteen\n")
    yield secrets
    composed_server.drop("frem")
    for role in ("frem_worker", "frem_reader"):
        composed_server.execute(f"DROP ROLE IF EXISTS {role}")
    composed_server.execute("CREATE DATABASE frem")


def replaced(text, composed_server, secrets):
    return text.replace("/run/secrets", str(secrets)).replace("@postgres:5432", f"@127.0.0.1:{composed_server.port}")


def started_as(service, composed_server, secrets, *, over=None, **settings):
    """A service's arguments and environment, with this machine's paths, ports and addresses.

    `over` is a second file laid over the first.
    """
    above = over["services"][service] if over else {}
    environment = {
        name: replaced(filled(value, **settings), composed_server, secrets)
        for name, value in (SERVICES[service]["environment"] | above.get("environment", {})).items()
        if value is not None
    }
    command = above.get("command", SERVICES[service]["command"])
    return [replaced(word, composed_server, secrets) for word in command], environment | settings


def test_the_commands_of_all_services_work_together(composed, composed_server, run_cli, tiny_study):
    arguments, environment = started_as("db-init", composed_server, composed)
    told = run_cli(*arguments, **environment)
    assert told.returncode == 0, told.stderr
    assert "role frem_worker: made, password set" in told.stdout
    arguments, environment = started_as("worker", composed_server, composed, FREM_SEARCH_STUDY=str(tiny_study))
    told = run_cli(*arguments, **environment)
    assert told.returncode == 0, told.stderr
    finished = "SELECT count(*) FROM trials WHERE state = 'COMPLETE'"
    assert composed_server.execute(finished, database="frem") == [(3,)]
    arguments, environment = started_as("db-init", composed_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0  # `docker compose up` runs it again each time
    assert composed_server.execute(finished, database="frem") == [(3,)]


def test_a_worker_that_is_stopped_leaves_its_trial_behind(composed, composed_server, run_cli, start_cli, tiny_study):
    arguments, environment = started_as("db-init", composed_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    tiny_study.write_text(tiny_study.read_text().replace("n_epochs = 3", "n_epochs = 5000"))
    arguments, environment = started_as("worker", composed_server, composed, FREM_SEARCH_STUDY=str(tiny_study))
    process = start_cli(*arguments, **environment)
    deadline = time.monotonic() + 60
    while composed_server.execute("SELECT count(*) FROM frem_lease", database="frem") == [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    lease = composed_server.execute("SELECT token, reason, attempts FROM frem_lease", database="frem")
    assert lease == [(None, "stopped", 0)]


def test_the_dashboard_answers_who_knows_the_token(composed, composed_server, run_cli, start_cli):
    pytest.importorskip("optuna_dashboard", reason="The extra `dashboard` is not installed.")
    arguments, environment = started_as("db-init", composed_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments, environment = started_as("dashboard", composed_server, composed)
    # Every address of the container is one address of this machine here.
    words = ["127.0.0.1" if word == "0.0.0.0" else str(port) if word == "8080" else word for word in arguments]
    process = start_cli(*words, **environment)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                status = answer.status
            break
        except urllib.error.HTTPError as error:
            status = error.code
            error.close()
            break
        except OSError:
            time.sleep(0.3)
    assert process.poll() is None, process.communicate()
    assert status == 401  # without the token
    known = {"Authorization": "Bearer a-token-of-more-than-sixteen"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/studies", headers=known)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.loads(answer.read())["study_summaries"] == []
    (healthy,) = [word for word in SERVICES["dashboard"]["healthcheck"]["test"] if "socket" in word]
    exec(healthy.replace("8080", str(port)))  # as Docker would
    cmdline = " ".join(psutil.Process(process.pid).cmdline())
    assert "a-token-of-more" not in cmdline


def test_whoever_connects_is_asked_for_a_password_by_scram(composed, composed_server):
    rules = composed_server.execute("SELECT type, auth_method, error FROM pg_hba_file_rules")
    assert {method for _, method, _ in rules} == {"scram-sha-256"}  # initdb's own is `trust`, even for the network
    assert {kind for kind, _, _ in rules} == {"local", "host"}
    assert {error for _, _, error in rules} == {None}
    for host in (composed_server.folder, "127.0.0.1"):
        with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
            psycopg2.connect(host=host, port=composed_server.port, user="frem", dbname="frem", passfile="/dev/null")


def test_passwords_are_kept_as_scram_verifiers(composed, composed_server):
    composed_server.execute("CREATE ROLE somebody LOGIN PASSWORD 'by hand'")
    kept = composed_server.execute("SELECT left(rolpassword, 14) FROM pg_authid WHERE rolpassword IS NOT NULL")
    composed_server.execute("DROP ROLE somebody")
    assert kept == [("SCRAM-SHA-256$",)] * 2


def test_the_server_s_times_are_utc(composed, composed_server):
    shown = composed_server.execute("SELECT current_setting('timezone'), current_setting('log_timezone')")
    assert shown == [("UTC", "UTC")]


def test_the_server_is_healthy_when_it_answers_by_tcp(composed, composed_server):
    _, *check = SERVICES["postgres"]["healthcheck"]["test"]
    assert "--host=127.0.0.1" in check
    ask = [find_binaries() / check[0], *check[1:], f"--port={composed_server.port}"]
    assert subprocess.run(ask, check=False, capture_output=True).returncode == 0
    composed_server.stop()
    assert subprocess.run(ask, check=False, capture_output=True).returncode == 2
    composed_server.start()


def test_the_gpu_file_s_command_searches(composed, composed_server, run_cli, tiny_study):
    arguments, environment = started_as("db-init", composed_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    arguments, environment = started_as(
        "worker", composed_server, composed, over=GPU, FREM_SEARCH_STUDY=str(tiny_study)
    )
    told = run_cli(*arguments, **environment)
    assert told.returncode == 0, told.stderr
    assert composed_server.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'", database="frem") == [(3,)]


PAGE = (REPOSITORY / "docs/containers.md").read_text()
CODE = re.findall(r"^    .+$|`[^`]+`", PAGE.partition("\n## Containers\n")[2], re.MULTILINE)
DOCUMENTED = [
    found.groups()
    for code in CODE
    if (found := re.match(r"docker compose run --rm (?:--volume \S+ )?(\S+) (.+)", " ".join(code.strip("` ").split())))
]


@pytest.mark.parametrize(("service", "words"), DOCUMENTED)
def test_a_documented_command_of_a_service_is_one_of_ours(service, words, monkeypatch):
    monkeypatch.setenv("FREM_SEARCH_STUDY", "mouse_frem")
    assert service in OURS
    command, words = get_command(app), shlex.split(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("", words)


def test_older_tables_are_refused_until_the_owner_s_service_upgrades_them(composed, composed_server, run_cli):
    assert ("db-init", "db upgrade") in DOCUMENTED
    arguments, environment = started_as("db-init", composed_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    # What Optuna 3.2 added.
    older = ("DROP INDEX ix_trials_study_id", "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    composed_server.execute(*older, database="frem")
    assert run_cli(*arguments, **environment).returncode == 1  # and no worker is started after it
    told = run_cli("db", "upgrade", **environment)
    assert told.returncode == 0, told.stderr
    assert run_cli(*arguments, **environment).returncode == 0
