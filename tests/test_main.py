"""The console command `fastnet`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastnet
from fastnet.__main__ import COMMANDS, main
from fastnet.errors import InputError
from tests.support.paths import REPOSITORY, SCRIPT


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert re.findall(r"^  (\w+)", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"fastnet {fastnet.__version__}\n"
    with pytest.raises(InputError, match="nonsense: no such command; name one of prepare, train"):
        main(["nonsense"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_describe_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.slow
def test_the_installed_command_reports_errors_in_one_line(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fastnet")
    if not script.exists():
        pytest.skip("fastnet is not installed in this environment")
    done = subprocess.run(
        [script, "evaluate", str(tmp_path / "none")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "fastnet.train"], [str(SCRIPT)]], ids=["-m", "script"])
def test_ctrl_c_while_importing_is_one_line(start: list[str], tmp_path: Path) -> None:
    """As if the signal came in the middle of the long imports: one of them raises what the signal would."""
    (tmp_path / "tqdm").mkdir()
    (tmp_path / "tqdm" / "__init__.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, *start],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stderr == "interrupted\n" and done.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize(("below", "code"), [(".", 0), ("nowhere", 2)])
def test_a_closed_stdout(below: str, code: int, tmp_path: Path) -> None:
    """As a service may start a command; sys.stdout is None then."""
    line = f'exec "{sys.executable}" -m fastnet.runs "{tmp_path}/{below}" >&-'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
