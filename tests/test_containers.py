"""The image and the Compose files: what they promise, and every service's own command against a real server."""

import fnmatch
import itertools
import json
import re
import shlex
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from servers import find_binaries

REPOSITORY = Path(__file__).parent.parent
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
GPU = yaml.safe_load((REPOSITORY / "docker-compose.gpu.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = ("db-init", "worker", "dashboard")

# The part of the Compose specification that we use: any other key is a slip of the pen until it is added here.
TEXT, LIST, TABLE, FLAG = str, list, dict, bool
SERVICE = {
    "image": TEXT, "build": TEXT, "command": LIST, "environment": TABLE, "secrets": LIST, "volumes": LIST,
    "ports": LIST, "healthcheck": TABLE, "depends_on": TABLE, "restart": TEXT, "stop_grace_period": TEXT,
    "shm_size": TEXT, "init": FLAG, "read_only": FLAG, "tmpfs": LIST, "cap_drop": LIST, "security_opt": LIST,
    "deploy": TABLE,
}  # fmt: skip
HEALTHCHECK = {"test", "interval", "timeout", "retries", "start_period"}
DURATION = re.compile(r"(\d+[hms])+")


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


@pytest.mark.parametrize("compose", [COMPOSE, GPU], ids=["docker-compose.yml", "docker-compose.gpu.yml"])
def test_compose_files_have_known_keys_of_the_right_kind(compose):
    assert {key for key in compose if not key.startswith("x-")} <= {"name", "services", "secrets", "volumes"}
    for name, service in compose["services"].items():
        for key, value in service.items():
            assert isinstance(value, SERVICE[key]), (name, key)
        check = service.get("healthcheck", {})
        assert set(check) <= HEALTHCHECK
        durations = [service.get("stop_grace_period"), *(check.get(key) for key in HEALTHCHECK - {"test", "retries"})]
        assert all(DURATION.fullmatch(text) for text in durations if text is not None)
        assert all(isinstance(value, str | None) for value in service.get("environment", {}).values())
        assert all(isinstance(word, str) for word in service.get("command", []))
        assert service.get("restart", "no") in ("no", "always", "unless-stopped", "on-failure")


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
    assert SERVICES["postgres"]["environment"]["POSTGRES_HOST_AUTH_METHOD"] == "scram-sha-256"


def test_only_the_dashboard_is_reached_from_outside_and_from_this_machine_alone():
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "dashboard": ["127.0.0.1:8080:8080"]
    }


def test_a_worker_has_time_to_store_its_trial_and_comes_again_after_an_error():
    worker = SERVICES["worker"]
    assert worker["stop_grace_period"] == "5m"
    assert worker["restart"] == "on-failure"
    assert "container_name" not in worker  # several of them
    assert "data:/data" in worker["volumes"]


def test_the_gpu_file_changes_the_worker_alone():
    assert set(GPU["services"]) == {"worker"}
    (device,) = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["worker"]


def test_images_are_pinned():
    stages = [argument for word, argument in instructions() if word == "FROM"]
    assert stages == ["python:3.12-slim AS build", "python:3.12-slim"]
    assert SERVICES["postgres"]["image"] == "postgres:18"


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


@pytest.fixture
def composed(tcp_server, tmp_path):
    """The server as the service postgres has it, secrets in files, and how a service's command is started."""
    name = "frem"
    if not tcp_server.is_running():
        tcp_server.start()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    passwords = {"owner": "0wn{e}r%@:/", "worker": "w%orker/@", "reader": "r:e{}ader"}
    for who, password in passwords.items():
        (secrets / f"{who}_password").write_text(password + "\n")
    (secrets / "dashboard_token").write_text("a-token-of-more-than-sixteen\n")
    # The image's POSTGRES_USER is a superuser.
    tcp_server.execute(f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD %s", values=[passwords["owner"]])
    tcp_server.execute(f"CREATE DATABASE {name} OWNER {name}")
    yield secrets
    tcp_server.drop(name)
    for role in (name, "frem_worker", "frem_reader"):
        tcp_server.execute(f"DROP ROLE IF EXISTS {role}")


def replaced(text, tcp_server, secrets):
    return text.replace("/run/secrets", str(secrets)).replace("@postgres:5432", f"@127.0.0.1:{tcp_server.port}")


def started_as(service, tcp_server, secrets, **settings):
    """A service's arguments and environment, with this machine's paths, ports and addresses."""
    environment = {
        name: replaced(filled(value, **settings), tcp_server, secrets)
        for name, value in SERVICES[service]["environment"].items()
        if value is not None
    }
    return [replaced(word, tcp_server, secrets) for word in SERVICES[service]["command"]], environment | settings


def test_the_commands_of_all_services_work_together(composed, tcp_server, run_cli, tiny_study):
    arguments, environment = started_as("db-init", tcp_server, composed)
    told = run_cli(*arguments, **environment)
    assert told.returncode == 0, told.stderr
    assert "role frem_worker: made, password set" in told.stdout
    arguments, environment = started_as("worker", tcp_server, composed, FREM_SEARCH_STUDY=str(tiny_study))
    told = run_cli(*arguments, **environment)
    assert told.returncode == 0, told.stderr
    finished = "SELECT count(*) FROM trials WHERE state = 'COMPLETE'"
    assert tcp_server.execute(finished, database="frem") == [(3,)]
    arguments, environment = started_as("db-init", tcp_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0  # `docker compose up` runs it again each time
    assert tcp_server.execute(finished, database="frem") == [(3,)]


def test_a_worker_that_is_stopped_leaves_its_trial_behind(composed, tcp_server, run_cli, start_cli, tiny_study):
    arguments, environment = started_as("db-init", tcp_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    tiny_study.write_text(tiny_study.read_text().replace("n_epochs = 3", "n_epochs = 5000"))
    arguments, environment = started_as("worker", tcp_server, composed, FREM_SEARCH_STUDY=str(tiny_study))
    process = start_cli(*arguments, **environment)
    deadline = time.monotonic() + 60
    while tcp_server.execute("SELECT count(*) FROM frem_lease", database="frem") == [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    lease = tcp_server.execute("SELECT token, reason, attempts FROM frem_lease", database="frem")
    assert lease == [(None, "stopped", 0)]


def test_the_dashboard_answers_who_knows_the_token(composed, tcp_server, run_cli, start_cli):
    pytest.importorskip("optuna_dashboard", reason="The extra `dashboard` is not installed.")
    arguments, environment = started_as("db-init", tcp_server, composed)
    assert run_cli(*arguments, **environment).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments, environment = started_as("dashboard", tcp_server, composed)
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


def test_postgres_takes_its_settings_and_its_health_is_asked_rightly(composed, tcp_server):
    command = SERVICES["postgres"]["command"]
    assert command[0] == "postgres"
    settings = dict(word.split("=") for word in command[1:] if word != "-c")
    known = tcp_server.execute("SELECT name FROM pg_settings")
    assert {name.lower() for name in settings} <= {name.lower() for (name,) in known}
    _, *check = SERVICES["postgres"]["healthcheck"]["test"]
    ask = [find_binaries() / check[0], *check[1:], f"--port={tcp_server.port}"]
    assert subprocess.run(ask, check=False, capture_output=True).returncode == 0
    tcp_server.stop()
    assert subprocess.run(ask, check=False, capture_output=True).returncode == 2
    tcp_server.start()
