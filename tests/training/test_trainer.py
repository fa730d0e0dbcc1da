"""Whole runs at a tiny size: records, exact continuation, ranks, and bad input."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnet import cli, train
from fastnet.distributed import lock
from fastnet.distributed.ranks import Runtime
from fastnet.training.checkpoint import load
from tests.support.paths import SCRIPT
from tests.support.runs import TIMES, assert_same_end, events, wait_for_step

# Two phases of two epochs, five steps each: 42 images in batches of 8.
FLAGS = "--network lstm --image-size 32 --batch-size 8 --head-epochs 2 --epochs 2 --log-every 2 --threads 1"
TINY = ["sample", *FLAGS.split()]
STEPS = 20


def run_here(data: Path, run: Path, *flags: str) -> dict[str, Any]:
    return train.main([*TINY, "--data", str(data), "--run-dir", str(run), *flags])


def command(ranks: int, data: Path, run: Path, *flags: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    script = [str(SCRIPT), *TINY, "--data", str(data), "--run-dir", str(run), *flags]
    return [sys.executable, *(torchrun if ranks > 1 else []), *script]


def run_ranks(ranks: int, data: Path, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(ranks, data, run, *flags), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def whole(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end in one process."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert run_here(tiny_set, run)["done"]
    return run


@pytest.fixture(scope="module")
def whole_on_two(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end on two ranks."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_ranks(2, tiny_set, run)
    assert done.returncode == 0, done.stderr
    return run


def test_records(whole: Path) -> None:
    assert [(e["phase"], e["step"]) for e in events(whole, "phase")] == [("head", 0), ("full", 10)]
    epochs = events(whole, "epoch")
    assert [(e["phase"], e["epoch"], e["step"]) for e in epochs] == [
        ("head", 0, 5),
        ("head", 1, 10),
        ("full", 2, 15),
        ("full", 3, 20),
    ]
    assert all(e["val_count"] == 10 for e in epochs)
    assert {"train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr"} <= epochs[0].keys()
    assert [e["step"] for e in events(whole, "step")] == list(range(2, 21, 2))
    timed = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(timed[key] >= 0 for key in TIMES) and 0 <= timed["data_wait"] <= 1

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["config"]["network"] == "lstm" and len(manifest["data"]["hash"]) == 64
    (session,) = manifest["sessions"]
    assert session["lstm_backend"] == "torch" and session["decode"] == "cpu" and session["ranks"] == 1
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] and session["from_step"] == 0
    assert list((whole / "tensorboard").iterdir())


def test_frozen_phase_leaves_the_convolutions_to_the_bit(whole: Path, tiny_set: Path, tmp_path: Path) -> None:
    run_here(tiny_set, tmp_path / "one", "--max-steps", "1")
    run_here(tiny_set, tmp_path / "head", "--max-steps", "10")
    start, frozen, end = (load(run / "last.pt").model for run in (tmp_path / "one", tmp_path / "head", whole))
    backbone = [name for name in start if name.startswith("backbone.")]
    assert all(torch.equal(start[name], frozen[name]) for name in backbone)
    assert not any(torch.equal(start[n], frozen[n]) for n in start if n not in backbone)
    assert not any(torch.equal(frozen[n], end[n]) for n in backbone if n.endswith("weight"))


@pytest.mark.parametrize("stops", [[3, 13], [5, 10, 15], [9, 12]], ids=["mid-epoch", "between", "both"])
def test_stopped_runs_continue_to_the_bit(
    stops: list[int], whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    for stop in stops:
        assert not run_here(tiny_set, tmp_path / "run", "--max-steps", str(stop))["done"]
    assert run_here(tiny_set, tmp_path / "run")["done"]
    assert_same_end(tmp_path / "run", whole)
    sessions = json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, *stops]


def test_a_finished_run_is_left_alone(whole: Path, tiny_set: Path) -> None:
    before = (whole / "last.pt").stat().st_mtime_ns
    assert run_here(tiny_set, whole)["done"]
    assert (whole / "last.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_same_command_continues(
    number: signal.Signals, whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(1, tiny_set, run), stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, run, 4 if number == signal.SIGTERM else 12)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "all saved; the same command continues" in said
    assert not load(run / "last.pt").position.done
    run_here(tiny_set, run)
    assert_same_end(run, whole)


def kill_again_and_again(ranks: int, data: Path, run: Path, targets: list[int]) -> None:
    """Kills the run without warning as soon as it has recorded each of the given steps, then lets it end."""
    for target in targets:
        with subprocess.Popen(
            command(ranks, data, run, "--checkpoint-every", "3"),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            wait_for_step(process, run, target)
            os.killpg(process.pid, signal.SIGKILL)
    done = run_ranks(ranks, data, run, "--checkpoint-every", "3")
    assert done.returncode == 0, done.stderr


def test_killed_runs_continue_to_the_bit(whole: Path, tiny_set: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    in_each_phase = [draw.randrange(2, 10), draw.randrange(11, STEPS)]
    kill_again_and_again(1, tiny_set, tmp_path / "run", in_each_phase)
    assert_same_end(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*.*"))


def test_killed_runs_of_two_ranks_continue_to_the_bit(
    whole_on_two: Path, tiny_set: Path, tmp_path: Path
) -> None:
    kill_again_and_again(2, tiny_set, tmp_path / "run", [random.Random(1).randrange(11, STEPS)])
    assert_same_end(tmp_path / "run", whole_on_two)


def test_a_signal_stops_two_ranks_after_the_same_step(
    whole_on_two: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(2, tiny_set, run), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for_step(process, run, 6)
        process.terminate()
        _, said = process.communicate()
    assert "all saved; the same command continues" in said, said
    assert not load(run / "last.pt").position.done
    # Another number of ranks finishes it: the same steps on the same samples, the sums in another order.
    assert run_ranks(1, tiny_set, run).returncode == 0
    assert [e["step"] for e in events(run, "step")] == [e["step"] for e in events(whole_on_two, "step")]
    assert [e["val_count"] for e in events(run, "epoch")] == [10] * 4


def test_ranks_and_accumulation_compute_the_same_step(tiny_set: Path, tmp_path: Path) -> None:
    """With frozen batch norms images do not see each other: a global batch gives one gradient, however it is cut.

    7 images over 2 ranks and 3 parts divide nowhere. Bound: float32 sums of 7 terms in another order, a relative
    error of a few 1e-7 a step over 6 steps, with AdamW's division kept out by plain SGD.
    """
    flags = [
        "--network",
        "baseline",
        "--batch-size",
        "7",
        "--head-epochs",
        "1",
        "--epochs",
        "0",
        "--head-optimizer",
        "sgd",
        "--head-lr",
        "0.1",
    ]
    run_here(tiny_set, tmp_path / "one", *flags)
    run_here(tiny_set, tmp_path / "parts", *flags, "--accumulate", "3")
    done = run_ranks(2, tiny_set, tmp_path / "ranks", *flags, "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    one, *others = (load(tmp_path / run / "last.pt").model for run in ("one", "parts", "ranks"))
    for other in others:
        for name in ("classifier.weight", "classifier.bias"):
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)
    assert events(tmp_path / "ranks", "epoch")[0]["val_count"] == 10


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: object) -> str:
    """Runs train.py with bad input in this process: one line on stderr, exit code 2; the line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert ended.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith(("data: ", "uses: "))
    ]
    assert lines[-1].startswith("error: ") and sum("error" in line for line in lines) == 1, lines
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "43"], "43"),
        (["--image-size", "33"], "--image-size 33: must be a multiple of 32"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
        (["--decode", "gpu"], "--decode gpu: "),
        (["--precision", "bf16"], "--precision bf16: needs a GPU"),
        (["--backend", "triton"], "--backend triton: "),
        (["--apex"], "--apex: NVIDIA Apex is not installed"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--lr", "1e30", "--head-lr", "1e30", "--warmup", "0"], "not finite"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    flags: list[str],
    message: str,
    tiny_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [*TINY, "--data", tiny_set, "--run-dir", tmp_path / "run", *flags]
    assert message in refused(capsys, monkeypatch, *given)


def test_bad_run_directories_are_named(
    whole: Path,
    tiny_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [*TINY, "--data", tiny_set, "--run-dir"]
    assert "started with network lstm and not baseline" in refused(
        capsys, monkeypatch, *given, whole, "--network", "baseline"
    )
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:100_000])
    assert f"{bad / 'last.pt'}: damaged" in refused(capsys, monkeypatch, *given, bad)
    torch.save({"weight": torch.zeros(1)}, bad / "last.pt")
    assert "not a fastnet checkpoint" in refused(capsys, monkeypatch, *given, bad)
    (tmp_path / "file").write_text("")
    assert f"--run-dir {tmp_path / 'file'}" in refused(capsys, monkeypatch, *given, tmp_path / "file")
    assert "no such set" in refused(
        capsys, monkeypatch, *TINY, "--data", tmp_path / "none", "--run-dir", tmp_path / "x"
    )
    assert "--run-dir: invalid directory value: ''" in refused(capsys, monkeypatch, *given, "")
    assert f"to train for longer, start from its weights: --weights {whole / 'last.pt'}" in refused(
        capsys, monkeypatch, *given, whole, "--epochs", "3"
    )


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--image-size", "many", "--debug"])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert ended.value.code == 2 and "Traceback" in capsys.readouterr().err


def test_debug_shows_where_an_error_among_ranks_came_from(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--data", str(tiny_set), "--run-dir", str(tmp_path / "run"), "--weights", "nowhere.pth"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--debug"])
    with pytest.raises(SystemExit):
        train.cli()
    assert "in _file_state" in capsys.readouterr().err


def test_what_may_change_when_a_run_continues(tiny_set: Path, tmp_path: Path, whole: Path) -> None:
    """How often it records changes no result, and naming the stages in another order is no other network."""
    run_here(tiny_set, tmp_path / "run", "--max-steps", "3", "--stages", "conv5,conv4")
    assert run_here(tiny_set, tmp_path / "run", "--log-every", "7", "--stages", "conv4,conv5")["done"]
    continued, straight = (load(run / "last.pt").model for run in (tmp_path / "run", whole))
    assert all(torch.equal(continued[name], straight[name]) for name in straight)


def test_a_port_in_use_is_named(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        line = refused(capsys, monkeypatch, *TINY, "--data", tiny_set, "--run-dir", tmp_path / "run")
    assert f"127.0.0.1:{port}: the ranks cannot meet there: the port is in use" in line


def test_bad_input_ends_every_rank(tiny_set: Path, tmp_path: Path) -> None:
    """The loss of two ranks becomes infinite: both end with code 2, one line speaks, no checkpoint is left."""
    done = run_ranks(2, tiny_set, tmp_path / "run", "--lr", "1e30", "--head-lr", "1e30", "--warmup", "0")
    assert done.returncode != 0
    assert len(re.findall(r"^error: .*not finite", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert re.findall(r"exitcode\s*: (\d+)", done.stderr) and set(
        re.findall(r"exitcode\s*: (\d+)", done.stderr)
    ) <= {"2"}
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that holds three checkpoints (last, best, one being written) and not four."""
    run = tmp_path / "small"
    run.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(run)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    try:
        run_here(tiny_set, run, "--network", "baseline", "--max-steps", "3")
        line = refused(
            capsys,
            monkeypatch,
            *TINY,
            "--data",
            tiny_set,
            "--run-dir",
            run,
            "--network",
            "baseline",
            "--log-every",
            "2",
        )
        assert f"{run}/" in line and ": no space left on the disk; the previous checkpoint is intact" in line
        assert load(run / "last.pt").position.step == 3
        assert not list(run.glob(".*.*"))
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_exit_code_of_a_full_disk_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills(argv: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command(fills)
    assert ended.value.code == 2 and "no space left" in capsys.readouterr().err


def test_label_smoothing_trains_and_is_not_in_the_recorded_loss(tiny_set: Path, tmp_path: Path) -> None:
    """The first step's loss is of the same weights; the update is not the same."""
    for smoothing in ("0", "0.5"):
        run_here(
            tiny_set,
            tmp_path / smoothing,
            "--label-smoothing",
            smoothing,
            "--max-steps",
            "1",
            "--log-every",
            "1",
        )
    plain, smooth = (tmp_path / "0", tmp_path / "0.5")
    assert events(plain, "step") == events(smooth, "step")
    name = "classifier.weight"
    assert not torch.equal(load(plain / "last.pt").model[name], load(smooth / "last.pt").model[name])


def test_imagenet_weights_without_a_network(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    line = refused(
        capsys, monkeypatch, *TINY, "--data", tiny_set, "--run-dir", tmp_path / "run", "--weights", "imagenet"
    )
    assert "--weights imagenet: cannot download" in line and "--weights FILE, or --weights none" in line


def test_two_processes_do_not_share_a_run(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with lock.run_lock(run, Runtime(torch.device("cpu"))):
        line = refused(capsys, monkeypatch, *TINY, "--data", tiny_set, "--run-dir", run)
    assert f"{run}: another process is training there" in line


def test_records_shorter_than_the_checkpoint_are_named(
    whole: Path,
    tiny_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    run_here(tiny_set, run, "--max-steps", "3")
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl: shorter than at the last checkpoint" in refused(
        capsys, monkeypatch, *TINY, "--data", tiny_set, "--run-dir", run
    )


def test_lstms_beyond_the_kernels_limit_train_with_torch(tiny_set: Path, tmp_path: Path) -> None:
    """conv2 at 160 px: 1600 hidden units."""
    flags = [
        "--image-size",
        "160",
        "--stages",
        "conv2",
        "--head-epochs",
        "1",
        "--epochs",
        "0",
        "--batch-size",
        "2",
        "--max-steps",
        "1",
    ]
    assert run_here(tiny_set, tmp_path / "run", *flags)["step"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_both_phases_train_on_a_gpu(backend: str, precision: str, tiny_set: Path, tmp_path: Path) -> None:
    flags = ["--precision", precision, "--backend", backend, "--head-epochs", "1", "--epochs", "1"]
    assert run_here(tiny_set, tmp_path / "run", *flags)["done"]
    assert run_here(tiny_set, tmp_path / "stopped", *flags, "--max-steps", "3")["step"] == 3
    assert run_here(tiny_set, tmp_path / "stopped", *flags)["done"]
