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
from places import REPOSITORY
from typer.main import get_command

from frem_search.cli import app
from frem_search.errors import StudyNotFoundError, UsageError
from frem_search.storage.url import PASSWORD_FILE
from frem_search.study.record import read_record

SBATCH, JOB, SERVICE = (
    REPOSITORY / "recipes" / path
    for path in ("slurm/frem-search.sbatch", "kubernetes/job.yaml", "systemd/frem-search-worker@.service")
)
WORKER = get_command(app).commands["worker"]
STOPPED = 130


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


# ---- Kubernetes: each promise of the Job, since no cluster is at hand to try it.


def pod_and_worker():
    pod = job()["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    return pod, worker


def test_the_pod_is_the_user_of_the_image_and_sees_its_password():
    pod, worker = pod_and_worker()
    user = pod["securityContext"]
    assert f"\nUSER {user['runAsUser']}:{user['runAsGroup']}\n" in (REPOSITORY / "Dockerfile").read_text()
    variables = {variable["name"]: variable["value"] for variable in worker["env"]}
    assert "PASSWORD" not in variables["FREM_SEARCH_STORAGE"].upper()
    mounts = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
    key = Path(variables[PASSWORD_FILE])
    assert str(key.parent) == mounts["password"]
    assert f"--from-file={key.name}=" in JOB.read_text()
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_the_pod_may_write_its_group_s_volumes_and_read_its_password_as_nobody_else():
    pod, _ = pod_and_worker()
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    secret = next(volume["secret"] for volume in pod["volumes"] if volume["name"] == "password")
    assert secret["defaultMode"] == 0o440


def test_the_pod_has_no_rights_beyond_its_user_s():
    pod, worker = pod_and_worker()
    assert pod["securityContext"]["runAsNonRoot"] is True  # an image of another user is refused
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False  # it never calls the API
    assert worker["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_the_pod_can_write_where_the_program_does_although_its_root_is_read_only():
    _, worker = pod_and_worker()
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in worker["volumeMounts"]}
    assert not mounts["/tmp"]
    assert not mounts["/data"]
    assert "FREM_SEARCH_HOME=/data" in (REPOSITORY / "Dockerfile").read_text()


def test_each_pod_has_a_gpu_of_its_own_and_as_many_threads_as_cores():
    _, worker = pod_and_worker()
    assert (
        worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    )  # without it, none; and `--device cuda` ends in an error
    assert "cuda" in worker["args"]
    threads = next(variable["value"] for variable in worker["env"] if variable["name"] == "OMP_NUM_THREADS")
    assert threads == worker["resources"]["requests"]["cpu"]


def test_a_pod_that_is_deleted_has_time_to_store_its_trial():
    pod, _ = pod_and_worker()
    assert pod["terminationGracePeriodSeconds"] >= 600  # Kubernetes' own 30 are shorter than an epoch


def test_the_job_is_done_when_the_first_worker_finds_the_budget_spent():
    spec = job()["spec"]
    assert spec["parallelism"] > 1
    assert "completions" not in spec  # else as many workers would have to end by themselves


def test_the_job_outlasts_an_outage_of_a_day():
    spec = job()["spec"]
    minutes_between_failures = 6  # what Kubernetes comes to wait before it makes a failed pod anew
    assert spec["backoffLimit"] / spec["parallelism"] * minutes_between_failures > 24 * 60
    assert "activeDeadlineSeconds" not in spec


def test_the_job_knows_what_a_worker_s_end_means():
    spec = job()["spec"]
    pod, worker = pod_and_worker()
    by_condition, *by_status = spec["podFailurePolicy"]["rules"]
    assert by_condition == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert {rule["onExitCodes"]["containerName"] for rule in by_status} == {worker["name"]}
    assert {rule["onExitCodes"]["operator"] for rule in by_status} == {"In"}
    meaning = {status: rule["action"] for rule in by_status for status in rule["onExitCodes"]["values"]}
    # Asked to stop, it stored its trial, which the next pod takes; used wrongly, the next would be told the same.
    assert meaning == {STOPPED: "Ignore", UsageError.exit_status: "FailJob"}
    assert pod["restartPolicy"] == "Never"  # the only one with which Kubernetes takes a podFailurePolicy


# ---- systemd


def service():
    """The unit's settings: by section and name a list, as a name may occur more than once."""
    settings, section = {}, ""
    for line in SERVICE.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, value = line.split("=", 1)
            settings.setdefault((section, name), []).append(value)
    return settings


def only(section, name):
    (value,) = service()[section, name]
    return value


@pytest.fixture
def analyze(tmp_path):
    """What has systemd-analyze look at the unit, changed or not, as an instance."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed.")

    def analyze(*words, instead=("", "")):
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", SERVICE.read_text(), flags=re.MULTILINE)
        assert instead[0] in text
        (tmp_path / SERVICE.name).write_text(text.replace(*instead))
        instance = str(tmp_path / SERVICE.name.replace("@", "@0"))
        if words[0] == "security":  # it wants the file itself
            instance = shutil.copy(tmp_path / SERVICE.name, instance)
        done = subprocess.run(["systemd-analyze", *words, instance], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return analyze


def test_systemd_takes_the_service(analyze):
    verify = ("verify", "--man=no", "--recursive-errors=no")
    assert analyze(*verify) == (0, "", "")
    assert "SIGTREM" in analyze(*verify, instead=("KillSignal=SIGTERM", "KillSignal=SIGTREM"))[2]
    assert "RestartSecs" in analyze(*verify, instead=("RestartSec=", "RestartSecs="))[2]


KEEPS_IN = (
    "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes",
    "RestrictNamespaces=yes", "SystemCallFilter=@system-service",
)  # fmt: skip


def test_systemd_calls_the_service_well_kept_in(analyze):
    def exposure(**changed):
        """What systemd thinks a unit could do to the machine: 0 nothing, 10 everything; without all of it 9.6."""
        _, told, error = analyze("security", "--offline=yes", "--no-pager", **changed)
        if "unrecognized option" in error:
            pytest.skip("systemd-analyze is older than 250.")
        return float(re.search(r"exposure level for \S+ ([\d.]+)", told)[1])

    assert exposure() < 2.5
    for line in KEEPS_IN:
        assert exposure(instead=(f"\n{line}\n", "\n")) > exposure(), line


def test_a_service_that_fails_comes_again_however_long_the_database_is_away():
    assert only("Service", "Restart") == "on-failure"
    assert only("Service", "RestartSec") == "1min"
    assert only("Unit", "StartLimitIntervalSec") == "0"  # without a limit, whatever StartLimitBurst is


def test_a_service_that_was_used_wrongly_does_not_come_again():
    assert only("Service", "RestartPreventExitStatus") == str(UsageError.exit_status)


def test_a_service_that_was_asked_to_stop_has_not_failed():
    assert only("Service", "SuccessExitStatus") == str(STOPPED)


def test_a_service_has_time_to_store_its_trial_and_is_asked_alone():
    assert only("Service", "TimeoutStopSec") == "30min"  # systemd's own 90 seconds are shorter than many an epoch
    assert only("Service", "KillSignal") == "SIGTERM"
    assert only("Service", "KillMode") == "mixed"  # processes that it began are its own to end


def test_a_service_leaves_cores_to_the_other_gpus_unless_its_settings_say_otherwise():
    given = service()["Service", "Environment"]
    assert "OMP_NUM_THREADS=4" in given
    assert only("Service", "EnvironmentFile") == "/etc/frem-search/worker.env"  # what it says comes before Environment=


def test_a_service_is_not_killed_for_a_call_that_it_may_not_make():
    assert only("Service", "SystemCallErrorNumber") == "EPERM"  # systemd's own answer is SIGSYS


def test_a_service_is_no_root_and_its_password_is_in_no_variable():
    assert only("Service", "User") == "frem-search"
    credential, _ = only("Service", "LoadCredential").split(":")
    assert f"{PASSWORD_FILE}=%d/{credential}" in " ".join(service()["Service", "Environment"])


# ---- Slurm


def sbatch_options():
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SBATCH.read_text(), re.MULTILINE))


def test_a_slurm_job_s_worker_is_asked_to_stop_before_the_time_is_over():
    # Without `B:` before it, the signal goes to what srun started, and not to the script.
    assert sbatch_options()["signal"] == "TERM@600"
    hours, minutes, seconds = map(int, sbatch_options()["time"].split(":"))
    assert (hours * 60 + minutes) * 60 + seconds > 600


def test_a_slurm_job_s_log_goes_on_in_its_next_turn():
    assert sbatch_options()["open-mode"] == "append"


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
# What a job says for itself must count.
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=100
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
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


# For this machine; what the recipe says for a node with GPUs cannot be had here.
HERE = ("--parsable", "--array=1", "--gres=none", "--mem=0", "--cpus-per-task=1", "--output=job.log")


def searching(slurm, storage_url, storage, study):
    """A job with a trial in training, and that trial."""
    asked = ("--study", study, "--n-trials", "1", "--n-epochs", "200", "--device", "cpu")
    job = slurm("sbatch", *HERE, SBATCH, *asked, FREM_SEARCH_STORAGE=storage_url).strip()
    wait_until(lambda: (trial := trial_of(storage)) is not None and trial.state == "running")
    return job, trial_of(storage)


def is_over(slurm):
    return not slurm("squeue", "--noheader")


def assert_went_on(storage, first, log):
    record = read_record(storage, "tiny", has_curves=False)
    assert [(trial.number, trial.state) for trial in record.trials] == [(0, "complete")]
    assert record.trials[0].worker != first.worker
    assert record.trials[0].params == first.params
    assert "trial 0: goes on at epoch " in log.read_text()  # and not from the beginning


def test_a_slurm_job_that_is_asked_to_stop_stores_its_trial_and_goes_on_with_it(
    slurm, storage_url, storage, tiny_study, tmp_path
):
    job, first = searching(slurm, storage_url, storage, tiny_study)
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: trial_of(storage).state == "waiting")
    assert trial_of(storage).reason == "stopped"
    wait_until(lambda: is_over(slurm))
    assert_went_on(storage, first, tmp_path / "job.log")


def test_a_slurm_job_that_gives_way_to_an_urgent_one_stores_its_trial_and_goes_on_with_it(
    slurm, storage_url, storage, tiny_study, tmp_path
):
    _, first = searching(slurm, storage_url, storage, tiny_study)
    all_cores = f"--cpus-per-task={os.cpu_count()}"
    slurm("sbatch", "--partition=urgent", all_cores, "--output=urgent.log", "--wrap=echo had its turn")
    wait_until(lambda: trial_of(storage).state == "waiting")
    assert trial_of(storage).reason == "stopped"
    wait_until(lambda: is_over(slurm))
    assert "had its turn" in (tmp_path / "urgent.log").read_text()
    assert_went_on(storage, first, tmp_path / "job.log")


def test_a_slurm_job_that_is_cancelled_stores_its_trial_and_does_not_come_again(
    slurm, storage_url, storage, tiny_study
):
    job, _ = searching(slurm, storage_url, storage, tiny_study)
    slurm("scancel", job)
    wait_until(lambda: is_over(slurm))
    ended = slurm("scontrol", "show", "job", job)
    assert "JobState=CANCELLED" in ended
    assert "Restarts=0" in ended
    trial = trial_of(storage)
    assert (trial.state, trial.reason) == ("waiting", "stopped")


@pytest.fixture
def stand_in(tmp_path):
    """What puts a shell script in the place of `frem-search`, and returns the variables that let a job find it."""

    def put(script):
        program = tmp_path / "stand-in" / "frem-search"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "FREM_SEARCH_STORAGE": "postgresql:///nowhere"}

    return put


def test_a_slurm_job_that_is_asked_to_stop_before_its_worker_listens_goes_on(slurm, stand_in, tmp_path):
    # In its first moments a process dies of SIGTERM: 143, which says that nothing was begun.
    settings = stand_in("echo a turn\n[ -e once ] && exit 0\ntouch once\nexec sleep 60")
    job = slurm("sbatch", *HERE, SBATCH, **settings).strip()
    wait_until((tmp_path / "once").exists)
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: is_over(slurm))
    assert (tmp_path / "job.log").read_text().count("a turn") == 2


@pytest.mark.parametrize(("given", "expected"), [("", "2"), ("7", "7")])
def test_a_slurm_job_computes_with_the_cores_that_it_has(given, expected, slurm, stand_in, tmp_path):
    settings = stand_in("echo threads: $OMP_NUM_THREADS cores: $SLURM_CPUS_PER_TASK")
    slurm("sbatch", *HERE, "--cpus-per-task=2", SBATCH, **settings, OMP_NUM_THREADS=given)
    wait_until(lambda: is_over(slurm))
    assert f"threads: {expected} cores: 2" in (tmp_path / "job.log").read_text()


def test_a_slurm_job_without_time_to_train_is_refused(slurm, stand_in, tmp_path):
    settings = stand_in("echo began")
    slurm("sbatch", *HERE, "--time=10", SBATCH, **settings)
    wait_until(lambda: is_over(slurm))
    log = (tmp_path / "job.log").read_text()
    assert "--time: expected 12 minutes or more" in log
    assert "began" not in log
    slurm("sbatch", *HERE, "--time=12", SBATCH, **settings)
    wait_until(lambda: is_over(slurm))
    assert (tmp_path / "job.log").read_text() == log + "began\n"


def test_a_slurm_job_without_a_database_is_refused(slurm, tmp_path, tiny_study):
    slurm("sbatch", *HERE, SBATCH)
    wait_until(lambda: is_over(slurm))
    assert "FREM_SEARCH_STORAGE: Set it to a PostgreSQL that all nodes reach" in (tmp_path / "job.log").read_text()
