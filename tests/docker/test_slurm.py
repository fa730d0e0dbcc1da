"""What docker/slurm.sbatch does in bash: stand-ins for Slurm's commands run what they are given on this machine.

The job as a whole runs on a real Slurm in tests/trials/slurm.py.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY

SBATCH = REPOSITORY / "docker" / "slurm.sbatch"


# Staging the prepared set


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
    "torchrun": """
echo "torchrun ${PYTHONSAFEPATH:+safe }$PET_NPROC_PER_NODE $PET_RDZV_CONF $*" >>"$LOG"
exit "$STATUS"
""",
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
        "torchrun 8 is_host=1,read_timeout=900,join_timeout=900 "
        "--nnodes=2 --rdzv-backend=c10d --rdzv-id=20007 --rdzv-endpoint=10.0.0.1:10007 "
        f"--max-restarts=3 --shutdown-timeout=120 -m fastnet.train paper --run-dir runs/a b --data {copied}"
    )


def test_the_words_of_a_job_stay_whole(job: Callable[..., Any], tmp_path: Path) -> None:
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"$LOG"\n', encoding="utf-8")
    assert "runs/a b" in job()[1]


def test_ranks_without_gpus(job: Callable[..., Any]) -> None:
    assert job(FASTNET_RANKS="4", SLURM_NODEID="1")[1][-1].startswith("torchrun 4 is_host=0,")


def test_a_job_in_apptainer(job: Callable[..., Any], tmp_path: Path) -> None:
    _, commands, _ = job(FASTNET_IMAGE="/images/fastnet.sif")
    assert (
        f"apptainer exec --nv --bind {tmp_path}/scratch,{tmp_path} /images/fastnet.sif torchrun"
        in commands[-2]
    )
    assert commands[-1].startswith("torchrun safe 1 ")


def test_a_job_in_enroot(job: Callable[..., Any], tmp_path: Path) -> None:
    _, (staging, ranks, *_), _ = job(FASTNET_IMAGE="registry#team/fastnet:gpu")
    assert "--container" not in staging
    mounts = f"{tmp_path}/scratch:{tmp_path}/scratch,{tmp_path}:{tmp_path}"
    assert ranks.endswith(
        f" --container-image=registry#team/fastnet:gpu --container-mounts={mounts} --container-workdir={tmp_path}"
        " --container-readonly"
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
