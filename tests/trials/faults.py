"""Counts what runs survive: python -m tests.trials.faults [--kills 100]

Prepares and trains on the CPU and kills both (SIGKILL to the whole process group) at random moments, many of them
while a checkpoint is written, at start-up or between two phases. The same command is given again until the run is
done, and the run must end with the same bits as one that was never disturbed. Then a disk fills up, the data
disappears, and a rank freezes. Writes faults.json. Takes about 15 minutes on two cores, and root, to mount a small
file system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import write_result
from fastnet.data.prepared import open_set
from fastnet.distributed.launch import launch_command
from fastnet.training.checkpoint import load
from tests.support.paths import SCRIPT
from tests.support.runs import assert_same_end, children, wait_for_step

INTERVAL, HEAD_EPOCHS, EPOCHS, STEPS_PER_EPOCH = 5, 2, 3, 37
FLAGS = (
    f"sample --network lstm --image-size 32 --batch-size 64 --head-epochs {HEAD_EPOCHS} --epochs {EPOCHS} "
    f"--threads 1 --log-every 1 --checkpoint-every {INTERVAL} --timeout 10"
).split()
STEPS = STEPS_PER_EPOCH * (HEAD_EPOCHS + EPOCHS)
PHASE_ENDS = STEPS_PER_EPOCH * HEAD_EPOCHS
PREPARE_SHARE, TWO_RANKS_SHARE = 0.1, 0.2
PARTIAL = ".*.pt.*"  # checkpoints being written, or left half-written by a kill


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trials.faults", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100, help="in all")
    kills = parser.parse_args().kills
    draw = random.Random(0)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = place / "sample"
        killed_preparing = round(kills * PREPARE_SHARE)
        prepared = kill_preparing(killed_preparing, data, draw)
        whole = {ranks: place / f"whole-{ranks}" for ranks in (1, 2)}
        for ranks, run in whole.items():
            subprocess.run(command(ranks, data, run), check=True, stderr=subprocess.DEVNULL)
        on_two = round(kills * TWO_RANKS_SHARE)
        facts = {
            "command": f"python -m tests.trials.faults --kills {kills}",
            "flags": " ".join(FLAGS),
            "checkpoint_every_steps": INTERVAL,
            "kills": kills,
            "preparing": prepared,
            "disk_full": disk_full(data, place / "small", whole[1]),
            "data_removed": data_removed(data, place / "without-data", whole[1]),
            "rank_frozen": rank_frozen(data, place / "frozen", whole[2]),
            "one_rank": kill_training(1, kills - killed_preparing - on_two, data, place, whole[1], draw),
            "two_ranks": kill_training(2, on_two, data, place, whole[2], draw),
        }
    print(write_result("faults", facts).read_text())


def command(ranks: int, data: Path, run: Path) -> list[str]:
    options = ["--standalone", "--max-restarts=1"] if ranks > 1 else []
    return launch_command(SCRIPT, [*FLAGS, "--data", data, "--run-dir", run], ranks=ranks, options=options)


@contextlib.contextmanager
def started(line: list[str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own; it and all that it started is killed on leaving."""
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as p:
        try:
            yield p
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGSTOP)
            # torchrun gives each rank a process group of its own
            for group in [*children(p.pid), p.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)


def kill_preparing(kills: int, data: Path, draw: random.Random) -> dict[str, Any]:
    """Kills `fastnet.prepare` at moments spread over its duration, then lets it through."""
    line = [sys.executable, "-m", "fastnet.prepare", "sample", "--out", str(data)]
    began = time.monotonic()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - began
    content = open_set(data).hash
    shutil.rmtree(data)
    while_writing = 0
    for _ in range(kills):
        with started(line):
            time.sleep(draw.uniform(0, duration))
        while_writing += (data.parent / f".{data.name}.partial").exists()
        if data.exists():  # killed after the set was in place
            assert open_set(data).hash == content
            shutil.rmtree(data)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    left = sorted(path.name for path in data.parent.iterdir() if path.name.endswith(".partial"))
    assert open_set(data).hash == content and not left
    return {"kills": kills, "left_a_part_behind": while_writing, "same_content": True}


def kill_training(
    ranks: int, kills: int, data: Path, place: Path, whole: Path, draw: random.Random
) -> dict[str, Any]:
    """Kills and continues runs, one after the other, until all `kills` are spent; each is then run to its end."""
    where: Counter[str] = Counter()
    lost: list[int] = []
    ends = 0
    while kills:
        run = place / f"killed-{ranks}-{ends}"
        while kills and not is_done(run):
            before = state(run)
            with started(command(ranks, data, run)) as process:
                await_moment(process, run, draw)
                alive = process.poll() is None
            if alive:
                kills -= 1
                where[moment(run, before)] += 1
                lost.append(last_step(run) - saved_step(run))
                print(f"{ranks} ranks, {kills} kills left, lost {lost[-1]} steps, {dict(where)}", flush=True)
        subprocess.run(command(ranks, data, run), check=True, stderr=subprocess.DEVNULL)
        assert_same_end(run, whole)
        assert not list(run.glob(".*.*"))
        ends += 1
        shutil.rmtree(run)
    return {
        "kills": sum(where.values()),
        "where": dict(where),
        "runs_ended": ends,
        "same_bits_at_the_end": True,
        "steps_lost": {"median": statistics.median(lost), "most": max(lost)},
    }


def await_moment(process: subprocess.Popen, run: Path, draw: random.Random) -> None:
    """Returns at the moment to kill, or when the process has ended."""
    saved = saved_step(run)
    near_phase_end = PHASE_ENDS - 25 < saved < PHASE_ENDS
    kind = "phase" if near_phase_end else draw.choices(("start", "write", "any"), (1, 3, 6))[0]
    if kind == "start":
        time.sleep(draw.uniform(0, 8))
        return
    while process.poll() is None and last_step(run) > saved:
        time.sleep(0.01)  # it has yet to cut off the records after the checkpoint
    wait_for_step(process, run, PHASE_ENDS if kind == "phase" else saved + draw.randrange(1, 3 * INTERVAL))
    if kind == "write":
        while process.poll() is None and not list(run.glob(PARTIAL)):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
    else:
        time.sleep(draw.uniform(0, 3 if kind == "any" else 1))


def state(run: Path) -> tuple[str, int, set[Path]]:
    """The records, the step of the checkpoint, and half-written checkpoints."""
    path = run / "metrics.jsonl"
    return path.read_text() if path.exists() else "", saved_step(run), set(run.glob(PARTIAL))


def moment(run: Path, before: tuple[str, int, set[Path]]) -> str:
    """Where the run was when it was killed, by what it has changed of `before`."""
    records, _, partial = state(run)
    if partial - before[2]:
        return "writing_a_checkpoint"
    if records == before[0] or last_step(run) <= before[1]:
        return "starting"
    if last_step(run) == PHASE_ENDS:
        return "between_the_phases"
    return "training"


def last_step(run: Path) -> int:
    """The last step that the records speak of. A killed run's last line may be incomplete."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return steps[-1] if steps else 0


def saved_step(run: Path) -> int:
    path = run / "last.pt"
    return load(path).position.step if path.exists() else 0


def is_done(run: Path) -> bool:
    return saved_step(run) == STEPS and load(run / "last.pt").position.done


def disk_full(data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """The file system is too small for last.pt, best.pt and the checkpoint being written; then it is made larger."""
    run.mkdir()
    size = (whole / "last.pt").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(run)]
    subprocess.run(mount, check=True)
    try:
        ended = subprocess.run(command(1, data, run), stderr=subprocess.PIPE, text=True)
        line = [said for said in ended.stderr.splitlines() if said.startswith("error:")]
        assert ended.returncode == 2 and len(line) == 1, ended.stderr
        kept = saved_step(run)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(run)], check=True)
        subprocess.run(command(1, data, run), check=True, stderr=subprocess.DEVNULL)
        assert_same_end(run, whole)
    finally:
        subprocess.run(["umount", str(run)], check=True)
    said = line[0].replace(str(run), "RUN")
    return {"said": said, "exit_code": 2, "continued_after_step": kept, "same_bits_at_the_end": True}


def data_removed(data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """The set vanishes while a run reads it, and the next start says so. With the set back, the run goes to its end."""
    away = data.with_name("away")
    with started(command(1, data, run)) as process:
        wait_for_step(process, run, 10)
        data.rename(away)
        wait_for_step(process, run, 20)
        went_on = process.poll() is None
    refused = subprocess.run(command(1, data, run), stderr=subprocess.PIPE, text=True)
    line = [said for said in refused.stderr.splitlines() if said.startswith("error:")]
    assert refused.returncode == 2 and len(line) == 1, refused.stderr
    away.rename(data)
    subprocess.run(command(1, data, run), check=True, stderr=subprocess.DEVNULL)
    assert_same_end(run, whole)
    said = line[0].replace(str(data), "SET")
    return {"running_processes_go_on": went_on, "said": said, "exit_code": 2, "same_bits_at_the_end": True}


def rank_frozen(data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """SIGSTOP to one of two ranks: the other ends, and torchrun starts both again."""
    with started(command(2, data, run)) as process:
        wait_for_step(process, run, 20)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        began = time.monotonic()
        code = process.wait()
        took = round(time.monotonic() - began, 1)
    assert code == 0
    assert_same_end(run, whole)
    return {"exit_code_of_torchrun": code, "ended_after_s": took, "same_bits_at_the_end": True}


if __name__ == "__main__":
    main()
