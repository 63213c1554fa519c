"""Recipes for schedulers are true: their commands parse and run, and the scheduler takes them."""

import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from frem_search.cli import app
from frem_search.database_url import PASSWORD_FILE
from frem_search.errors import StudyNotFoundError
from frem_search.record import read_record

REPOSITORY = Path(__file__).parent.parent
SBATCH, JOB, SERVICE = (
    REPOSITORY / "recipes" / path
    for path in ("slurm/frem-search.sbatch", "kubernetes/job.yaml", "systemd/frem-search-worker@.service")
)
WORKER = get_command(app).commands["worker"]


def job():
    return pytest.importorskip("yaml").safe_load(JOB.read_text())


def arguments_of(recipe):
    """What a recipe gives to `frem-search worker`."""
    if recipe == JOB:
        words = job()["spec"]["template"]["spec"]["containers"][0]["args"]
    elif recipe == SERVICE:
        words = shlex.split(re.search(r"^ExecStart=\S+/frem-search (.+)$", SERVICE.read_text(), re.MULTILINE)[1])
    else:
        assert 'srun frem-search worker "$@"' in SBATCH.read_text()
        words = [
            "worker",
            *shlex.split(re.search(rf"^# +sbatch .*{SBATCH.name} (.+)$", SBATCH.read_text(), re.MULTILINE)[1]),
        ]
    assert words[0] == "worker"
    return words[1:]


@pytest.mark.parametrize("recipe", [SBATCH, JOB, SERVICE], ids=lambda path: path.name)
def test_a_recipe_uses_options_and_variables_that_exist(recipe):
    environment = {} if "--study" in arguments_of(recipe) else {"FREM_SEARCH_STUDY": "mouse_frem"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        WORKER.make_context("worker", arguments_of(recipe))
    known = {option.envvar for option in WORKER.params} | {"FREM_SEARCH_HOME", PASSWORD_FILE}
    named = set(re.findall(r"FREM_SEARCH_\w+", recipe.read_text()))
    assert named >= {"FREM_SEARCH_STORAGE", PASSWORD_FILE}
    assert named <= known


@pytest.mark.parametrize("recipe", [SBATCH, JOB, SERVICE], ids=lambda path: path.name)
def test_the_command_of_a_recipe_searches(recipe, run_cli, tiny_study, storage_url, storage):
    words = " ".join(arguments_of(recipe)).replace("cuda:%i", "cpu").replace("cuda", "cpu").split()
    words = [str(tiny_study) if word == "mouse_frem" else word for word in words]
    done = run_cli("worker", *words, FREM_SEARCH_STORAGE=storage_url, FREM_SEARCH_STUDY=tiny_study)
    assert done.returncode == 0, done.stderr
    assert [trial.state for trial in read_record(storage, "tiny", has_curves=False).trials] == ["complete"] * 3


def test_kubernetes_takes_the_job():
    validator = pytest.importorskip("kubernetes_validate")
    version = validator.latest_version()
    validator.validate(job(), version, strict=True)
    broken = job()
    broken["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(validator.ValidationError, match="resource"):
        validator.validate(broken, version, strict=True)


def test_the_pod_is_the_user_of_the_image_and_sees_its_password():
    pod = job()["spec"]["template"]["spec"]
    worker = pod["containers"][0]
    user = pod["securityContext"]
    assert f"\nUSER {user['runAsUser']}:{user['runAsGroup']}\n" in (REPOSITORY / "Dockerfile").read_text()
    variables = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert "PASSWORD" not in variables["FREM_SEARCH_STORAGE"].upper()
    folder = next(mount["mountPath"] for mount in worker["volumeMounts"] if mount["name"] == "password")
    key = Path(variables[PASSWORD_FILE])
    assert str(key.parent) == folder
    assert f"--from-file={key.name}=" in JOB.read_text()
    mounted = {mount["name"] for mount in worker["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_systemd_takes_the_service(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed.")
    unit = tmp_path / SERVICE.name
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", SERVICE.read_text(), flags=re.MULTILINE))
    instance = str(unit).replace("@", "@0")
    analyze = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", instance]
    done = subprocess.run(analyze, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(unit.read_text().replace("KillSignal=SIGTERM", "KillSignal=SIGTREM"))
    assert "SIGTREM" in subprocess.run(analyze, capture_output=True, text=True, check=False).stderr


@pytest.fixture
def slurm(tmp_path, tmp_path_factory):
    """A cluster of one node on this machine; what runs a command of it, with variables for its jobs."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)}.")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    control, node = (port.getsockname()[1] for port in ports)
    for port in ports:
        port.close()
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    conf = folder / "slurm.conf"
    conf.write_text(f"""
ClusterName=frem
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A job that asks for another turn waits until its credential is over; usually two minutes.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=100
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "frem-search"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m frem_search "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen([name, "-D", "-f", conf], env=environment, stdout=log, stderr=log)
            for name in ("slurmctld", "slurmd")
        ]

    def run(*words, **settings):
        done = subprocess.run(
            words, env=environment | settings, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (done.stderr, (folder / "log").read_text())
        return done.stdout

    wait_until(lambda: "idle" in run("sinfo", "--noheader", "--format=%T"))
    yield run
    run("scancel", "--user", user)
    wait_until(lambda: not run("squeue", "--noheader"))
    for daemon in daemons:
        daemon.terminate()
        daemon.wait(20)


def wait_until(condition, *, timeout_s=90.0):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def trial_of(storage):
    try:
        return next(iter(read_record(storage, "tiny", has_curves=False).trials), None)
    except StudyNotFoundError:
        return None


def test_a_slurm_job_that_is_asked_to_stop_stores_its_trial_and_goes_on_with_it(
    slurm, storage_url, storage, tiny_study, tmp_path
):
    here = ("--parsable", "--array=1", "--gres=none", "--mem=0", "--cpus-per-task=1", "--output=job.log")
    study = ("--study", tiny_study, "--n-trials", "1", "--n-epochs", "400", "--device", "cpu")
    job = slurm("sbatch", *here, SBATCH, *study, FREM_SEARCH_STORAGE=storage_url).strip()
    wait_until(lambda: (trial := trial_of(storage)) is not None and trial.state == "running")
    first = trial_of(storage)
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: trial_of(storage).state == "waiting")
    stored = trial_of(storage)
    assert stored.reason == "stopped"
    wait_until(lambda: not slurm("squeue", "--noheader"))
    record = read_record(storage, "tiny", has_curves=False)
    assert [(trial.number, trial.state) for trial in record.trials] == [(0, "complete")]
    assert record.trials[0].worker != first.worker
    assert record.trials[0].params == first.params
    log = (tmp_path / "job.log").read_text()
    assert "trial 0: goes on from its last checkpoint" in log


def test_a_slurm_job_without_a_database_is_refused(slurm, tmp_path, tiny_study):
    slurm("sbatch", "--array=1", "--gres=none", "--mem=0", "--cpus-per-task=1", "--output=job.log", SBATCH)
    wait_until(lambda: not slurm("squeue", "--noheader"))
    assert "FREM_SEARCH_STORAGE: Set it to a PostgreSQL that all nodes reach" in (tmp_path / "job.log").read_text()
