"""The doctor command: what it says of this machine, and of machines that lack something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastnet import doctor
from fastnet.cli import run_command
from fastnet.diagnosis import kernels, pixels, ranks, software, storage
from fastnet.diagnosis.findings import Check, Failed, Finding, Skipped, examine


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_machine_without_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctor.main(["--data", str(tmp_path / "data" / "set"), "--runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert result["ok"], lines
    names = [check["name"] for check in result["checks"]]
    outcomes = {check["name"]: check["outcome"] for check in result["checks"]}
    gpu = ["driver", "CUDA", "DALI, GPU", "LSTM kernels", "shared memory"]
    assert outcomes == {name: "skipped" if name in gpu else "ok" for name in names} and len(lines) == len(
        names
    )
    told = dict(zip(names, lines, strict=True))
    assert "2 over gloo" in told["ranks"] and "compiles for sm_90" in told["Triton"]
    assert f"{tmp_path}: " in told["disk for data"]  # where the set would be made


def test_a_failure_is_told_with_what_to_do_and_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "RUNS_GB", 1e9)
    all_checks = {check.name: check for check in doctor.checks(tmp_path, tmp_path)}
    some = [all_checks["disk for runs"], all_checks["disk for data"]]
    monkeypatch.setattr(doctor, "checks", lambda data, runs: some)
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        run_command(doctor.main)
    first, second, last = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and not json.loads(last)["ok"]
    assert first.startswith("fails   disk for runs") and first.endswith("name another place with --runs")
    assert "runs take 1000000000.0 GB; what to do: free some space" in first
    assert second.startswith("ok      disk for data")


def test_a_set_that_is_there_needs_no_room(
    tiny_set: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "DATA_GB", 1e9)
    assert "a prepared set" in storage.disk_for_data(tiny_set)
    with pytest.raises(Failed, match=r"GB free, data take 1000000000\.0 GB"):
        storage.disk_for_data(tmp_path / "new")


def test_whatever_a_check_raises_is_a_finding() -> None:
    def finding(error: Exception) -> Finding:
        def run() -> str:
            raise error

        return examine(Check("name", run, "mend it"))

    assert finding(Failed("broken", "buy another")) == Finding("name", "fails", "broken", "buy another")
    assert finding(Failed("broken")).remedy == "mend it"
    assert finding(Skipped("no GPU")) == Finding("name", "skipped", "no GPU")
    assert finding(OSError("two\nlines")) == Finding("name", "fails", "OSError: two lines", "mend it")


def test_packages_that_are_missing_old_or_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torch " in software.packages() and software.dali_package().startswith("nvidia-dali-cuda1")
    other = tmp_path / "nvidia_dali_cuda130-2.4.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-dali-cuda130\nVersion: 2.4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Failed, match="both own the folder nvidia/dali") as both:
        software.dali_package()
    assert "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130" in both.value.remedy
    needed = [software.Requirement("numpy<1"), software.Requirement("no-such-package")]
    monkeypatch.setattr(software, "_requirements", lambda: needed)
    with pytest.raises(Failed, match=r"numpy .* is not <1; no-such-package is missing"):
        software.packages()


def test_wrong_pixels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels.dali_on_cpu()
    monkeypatch.setattr(pixels, "MEAN", [m + 4 for m in pixels.MEAN])
    with pytest.raises(Failed, match=r"differ from PIL's by [45]\.\d grey levels"):
        pixels.dali_on_cpu()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "on a GPU it would need gcc" in kernels.compiler()
    monkeypatch.setattr(kernels, "_architecture", lambda: (80, True))
    with pytest.raises(Failed, match="compiles for sm_80, but its launchers need gcc"):
        kernels.compiler()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_ranks_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    with pytest.raises(Failed, match=r"2 ranks over gloo, on the CPU fail: .*nowhere"):
        ranks.ranks()


@pytest.mark.long
@pytest.mark.slow
def test_packages_that_cannot_be_imported(tmp_path: Path) -> None:
    """What is broken is what the doctor is asked about, so each check stands on its own."""
    broken = ("nvidia.dali", "triton", "pyarrow", "simplejpeg", "PIL")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({broken}))\n"
        "from fastnet import cli, doctor; cli.run_command(doctor.main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", "--runs", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])["checks"]}
    for name in ("DALI, CPU", "Triton", "LSTM kernels"):
        assert checks[name]["outcome"] == "fails" and checks[name]["remedy"], checks[name]
    assert checks["disk for runs"]["outcome"] == "ok"
