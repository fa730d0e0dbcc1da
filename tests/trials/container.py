"""Builds the cpu target of docker/Dockerfile without a Docker engine, and runs it: python -m tests.trials.container

buildah builds it in chroot isolation, on a minimal Debian made by debootstrap. Then the two commands of `make demo`
and the entry point run in the image as its own user, and the results are compared with demo.json, which was made
outside. Takes about ten minutes on two cores and writes container.json. Arguments go to `buildah build`, such as
--build-arg TORCH_INDEX= for the CUDA build of torch, or --volume /etc/apt:/etc/apt:ro for this machine's sources.

As root: apt-get install --no-install-recommends buildah debootstrap
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import results_dir, write_result
from fastnet.provenance import git_revision
from tests.support.paths import REPOSITORY

SUITE, BASE, IMAGE = "bookworm", "localhost/fastnet-base", "localhost/fastnet:cpu"
CERTIFICATES = Path("usr/local/share/ca-certificates")
BUILD = ["buildah", "build", "--isolation", "chroot", "--format", "docker"]


def main() -> None:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        lacks = ", ".join(missing) or "nothing else"
        print(f"needs root and {lacks}: {(__doc__ or '').splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    given = sys.argv[1:]
    make_base()
    began = time.monotonic()
    arguments = ["--build-arg", f"CPU_BASE={BASE}", "--build-arg", f"REVISION={git_revision() or ''}", *given]
    dockerfile = REPOSITORY / "docker" / "Dockerfile"
    subprocess.run(
        [*BUILD, "--target", "cpu", "--tag", IMAGE, "--file", str(dockerfile), *arguments, str(REPOSITORY)],
        check=True,
    )
    built = time.monotonic() - began
    about = json.loads(output("buildah", "inspect", "--type", "image", IMAGE))
    entry = about["Docker"]["config"]["Entrypoint"]
    with container() as name:
        run = ["buildah", "run", "--isolation", "chroot", name, "--"]
        facts: dict[str, Any] = {
            "command": "python -m tests.trials.container",
            "build_arguments": [word for word in given if "=" in word and not word.startswith("-")],
            "base": f"debootstrap --variant=minbase {SUITE}",
            "buildah": output("buildah", "--version").split()[2],
            "build_s": round(built),
            "size_mb": {
                "base": megabytes(BASE),
                "image": megabytes(IMAGE),
                "virtual_environment": int(
                    output(*run, "du", "-s", "--block-size=1000000", "/opt/venv").split()[0]
                ),
            },
            "user": output(*run, "id", "--user"),
            "may_write_code": succeeds(*run, "touch", "/fastnet/fastnet/new"),
            "caches_left": output(*run, "find", "/var/lib/apt/lists", "/tmp", "-mindepth", "1").split(),
            "demo": demo(run),
            "entry_point": entry_point([*run, *entry], run),
        }
    print(write_result("container", facts).read_text())
    wrong = facts["may_write_code"] or facts["caches_left"] or facts["user"] == "0"
    if wrong or not facts["demo"]["same_as_outside"]:
        sys.exit("not as it should be")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def make_base() -> None:
    """A minimal Debian as an image, with this machine's own certificates."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, folder], check=True)
        if (Path("/") / CERTIFICATES).is_dir():
            shutil.copytree(Path("/") / CERTIFICATES, Path(folder) / CERTIFICATES, dirs_exist_ok=True)
        working = output("buildah", "from", "scratch")
        output("buildah", "add", working, folder, "/")
        output("buildah", "commit", "--rm", working, BASE)


@contextmanager
def container() -> Iterator[str]:
    name = output("buildah", "from", IMAGE)
    try:
        yield name
    finally:
        output("buildah", "rm", name)


def megabytes(image: str) -> int:
    """Millions of bytes of an image's layers."""
    listed = json.loads(output("buildah", "images", "--json", image))
    number, unit = listed[0]["size"].split()
    return round(float(number) * {"KB": 1e-3, "MB": 1, "GB": 1000}[unit])


def demo(run: list[str]) -> dict[str, Any]:
    """The two commands of `make demo`, and whether they give here what they give outside, on this machine."""
    began = time.monotonic()
    subprocess.run([*run, "python", "-m", "fastnet.prepare", "sample", "--out", "data/sample"], check=True)
    subprocess.run(
        [*run, "python", "-m", "fastnet.paper", "--data", "data/sample", "--out", "demo"], check=True
    )
    took = time.monotonic() - began
    results = json.loads(output(*run, "cat", "demo/results.json"))
    outside = json.loads((results_dir() / "demo.json").read_text(encoding="utf-8"))["results"]
    return {"seconds": round(took), "results": results, "same_as_outside": results == outside}


def entry_point(entry: list[str], run: list[str]) -> dict[str, Any]:
    """One rank, two ranks, and a flag that train.py refuses."""
    flags = [
        "sample",
        "--network",
        "baseline",
        "--image-size",
        "32",
        "--max-steps",
        "4",
        "--data",
        "data/sample",
    ]
    codes, ranks = {}, {}
    for count in ("1", "2"):
        here = [*entry[:-1], "env", f"FASTNET_RANKS={count}", entry[-1]]
        words = [*flags, "--run-dir", f"runs/ranks-{count}"]
        codes[f"{count}_ranks"] = subprocess.run([*here, *words]).returncode
        manifest = json.loads(output(*run, "cat", f"runs/ranks-{count}/manifest.json"))
        ranks[count] = manifest["sessions"][0]["ranks"]
    codes["bad_flag"] = subprocess.run([*entry, "--batch-size", "x"]).returncode
    assert ranks == {"1": 1, "2": 2} and codes == {"1_ranks": 0, "2_ranks": 0, "bad_flag": 2}, (
        ranks,
        codes,
    )
    return {"exit_codes": codes, "git": manifest["sessions"][0]["git"]}


if __name__ == "__main__":
    main()
