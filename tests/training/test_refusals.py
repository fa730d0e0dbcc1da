"""Bad input, full disks and directories in use: one line each, and nothing lost."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

from fastnet import cli, train
from fastnet.cli import run_command
from fastnet.distributed import lock
from fastnet.distributed.ranks import Runtime
from fastnet.training.checkpoint import load
from tests.support.disks import small_disk
from tests.support.tiny import TINY, refused, run_here


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "43"], "--batch-size 43: the train split has 42 images; use at most that"),
        (["--batch-size", "43", "--cache-features", "1"], "--batch-size 43: the train split has 42 images"),
        (["--image-size", "33"], "--image-size 33: must be a multiple of 32"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
        (["--decode", "gpu"], "--decode gpu: "),
        (["--decode", "device"], "--decode device: there is no GPU here; use cpu, raw or auto"),
        (["--precision", "fp16"], "--precision fp16: needs a GPU"),
        (["--backend", "triton"], "--backend triton: "),
        (["--apex"], "--apex: NVIDIA Apex is not installed"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["--lr", "1e30", "--head-lr", "1e30", "--warmup", "0"],
            "lower --head-lr 1e+30, or lengthen --warmup",
        ),
        (["--head-epochs", "0", "--lr", "1e30", "--warmup", "0"], "lower --lr 1e+30, or lengthen --warmup"),
        (
            ["--head-epochs=0", "--lr=1e30", "--weight-decay=1e30", "--checkpoint-every=1", "--warmup", "0"],
            "weights are not finite",
        ),
    ],
    ids=lambda value: value[-2].strip("-") if len(value) > 1 and isinstance(value, list) else "",
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
    set_without_test_split: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [*TINY, "--data", tiny_set, "--run-dir"]
    assert f"{whole}: this run was trained on other data; give the same --data" in refused(
        capsys, monkeypatch, *TINY, "--data", set_without_test_split, "--run-dir", whole
    )
    assert "started with --network lstm and not baseline" in refused(
        capsys, monkeypatch, *given, whole, "--network", "baseline"
    )
    assert "started with --flip 0.5 and not 0.25" in refused(
        capsys, monkeypatch, *given, whole, "--flip", "0.25"
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
    assert "--run-dir: is empty; name a path" in refused(capsys, monkeypatch, *given, "")
    assert f"to train for longer, start from its weights: --weights {whole / 'last.pt'}" in refused(
        capsys, monkeypatch, *given, whole, "--epochs", "3"
    )


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--image-size", "many", "--debug"])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert ended.value.code == 2 and "Traceback" in capsys.readouterr().err


def test_debug_shows_where_an_error_among_ranks_came_from(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--data", str(tiny_set), "--run-dir", str(tmp_path / "run"), "--weights", "nowhere.pth"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--debug"])
    with pytest.raises(SystemExit):
        run_command(train.main)
    assert "in _file_state" in capsys.readouterr().err


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


def test_a_full_disk_keeps_the_last_checkpoint(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that holds three checkpoints (last, best, one being written) and not four."""
    run = tmp_path / "small"
    with small_disk(run, "160m"):
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
