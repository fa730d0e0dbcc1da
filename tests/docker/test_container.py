"""docker/: what can be said of the images without building them. They are built in tests/trials/container.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastnet import provenance
from fastnet.provenance import git_revision
from tests.support.paths import REPOSITORY

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
ENTRY = REPOSITORY / "docker" / "entrypoint.sh"


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def stages() -> dict[str, str]:
    """The Dockerfile's stages by name, comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = re.split(r"^FROM \S+ AS (\S+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_a_user_that_owns_no_code(target: str) -> None:
    stage = stages()[target]
    last_user = re.findall(r"^USER (.*)", stage, flags=re.MULTILINE)[-1]
    assert last_user == "1000:1000"
    assert re.findall("chown .*", stage) == ["chown 1000:1000 data demo runs"]
    assert f'ENTRYPOINT ["/fastnet/{ENTRY.relative_to(REPOSITORY)}"]' in stage


def test_the_gpu_image_asks_for_the_drivers_decoder() -> None:
    """CUDA's base images ask for compute and utility alone."""
    assert "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video " in stages()["gpu"]


def test_what_an_image_copies_is_in_the_build_context() -> None:
    allowed = {
        line.removeprefix("!").rstrip("/")
        for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert {"pyproject.toml", "constraints.txt", "fastnet", "kernels", "docker/entrypoint.sh"} <= allowed
    assert all((REPOSITORY / path).exists() for path in allowed)


def test_apex_is_pinned_and_compiled_by_the_cuda_release_of_torch() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.search(r"^ARG APEX=[0-9a-f]{40}$", text, re.MULTILINE)
    (release,) = set(re.findall(r"nvidia/cuda:(\d+\.\d+)\.\d+-", text))
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"^cuda-toolkit==(\d+\.\d+)", constraints, re.MULTILINE) == [release]


def test_constraints_pin_every_dependency() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for wanted in map(Requirement, requires("fastnet") or []):
        here = not wanted.marker or any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("dev", "export")
        )
        if wanted.name == "fastnet" or not here:  # an extra that names another, and what other Pythons need
            continue
        (pin,) = [
            pin for pin in pins if pin.name == wanted.name and (not pin.marker or pin.marker.evaluate())
        ]
        (pinned,) = pin.specifier
        assert wanted.specifier.contains(pinned.version)


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        ("1", "python -m fastnet.train paper --run-dir a b"),
        ("2", "torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 --max-restarts=3"),
        (None, "python -m fastnet.train paper --run-dir a b"),
    ],
)
def test_the_entry_point_hands_its_words_to_train(ranks: str | None, line: str, tmp_path: Path) -> None:
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(
            f'#!/usr/bin/env bash\n[[ $1 == -c ]] && echo 1 && exit\necho {name} "$@"; exit 3\n'
        )
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **({"FASTNET_RANKS": ranks} if ranks else {})}
    done = subprocess.run(
        [str(ENTRY), "paper", "--run-dir", "a b"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stdout.startswith(line) and done.stdout.endswith("fastnet.train paper --run-dir a b\n")


def test_an_image_knows_what_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNET_REVISION", "0123abcd")
    monkeypatch.setenv("PATH", str(Path(shutil.__file__).parent))  # a directory without git
    assert git_revision() == "0123abcd"


def test_the_revision_is_not_that_of_another_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment is often a folder of the project that uses fastnet."""
    place = tmp_path / ".venv" / "lib" / "fastnet" / "provenance.py"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    commit = ["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, check=True)
    monkeypatch.delenv("FASTNET_REVISION", raising=False)
    monkeypatch.setattr(provenance, "__file__", str(place))
    assert git_revision() is None
