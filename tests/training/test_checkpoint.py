"""Files of a run that someone else may have made or damaged: one line says so, and nothing elsewhere is touched."""

from __future__ import annotations

import copy
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnet import train
from fastnet.config import Config
from fastnet.errors import InputError
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from fastnet.training.checkpoint import MAY_CHANGE, Updates, load, restore
from tests.support.paths import REPOSITORY
from tests.support.tiny import TINY


@pytest.fixture(scope="module")
def stopped(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the middle of an epoch of its head phase."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"
    continue_run(tiny_set, run_dir, "--max-steps", "3")
    return run_dir


def continue_run(data: Path, run_dir: Path, *flags: str) -> dict[str, Any]:
    return train.main(
        [*TINY, "--network", "baseline", "--data", str(data), "--run-dir", str(run_dir), *flags]
    )


def altered(stopped: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the run with another checkpoint."""
    content = copy.deepcopy(torch.load(stopped / "last.pt", weights_only=True))
    change(content)
    to.mkdir()
    (to / "metrics.jsonl").write_bytes((stopped / "metrics.jsonl").read_bytes())
    torch.save(content, to / "last.pt")
    return to


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def test_what_may_change_is_what_the_documentation_says() -> None:
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text()
    (listed,) = re.findall(
        r"These settings may change when a run continues(.*?)\.\s+Any\s+other", text, re.DOTALL
    )
    assert {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", listed)} == MAY_CHANGE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("config", value=3), "damaged: Expected `object`, got `int`"),
        (put("words", value=["one"]), "damaged: it has 1 words for 3 classes"),
        (put("config", "lr", value="fast"), "damaged: Expected `float`, got `str`"),
        (put("config", "stages", value=["conv9"]), "damaged: --stages conv9"),
        (put("position", value=[]), "damaged: Expected `object`"),
        (put("position", "step", value=-3), "damaged: Expected `int` >= 0"),
        (put("position", "phase", value=7), "damaged: it is in phase 7 of 2"),
        (put("position", "step_in_epoch", value=10**9), "damaged: it is in step 1000000000 of 5"),
        (put("position", "totals", value=["many"] * 5), "damaged: Expected `int`"),
        (put("position", "totals", value=[0] * 99), "damaged: Expected `array` of length <= 5"),
        (put("classes", value="abc"), "damaged: Expected `array`, got `str`"),
        (put("model", value=None), "damaged: Expected `object`, got `null`"),
        (put("model", "classifier.bias", value=1), "a checkpoint of another network: classifier.bias does not fit"),
        (put("model", "classifier.bias", value=torch.zeros(3).to_sparse()), "classifier.bias does not fit"),
        (put("model", "classifier.bias", value=torch.zeros(3, device="meta")), "classifier.bias does not fit"),
        (put("model", "classifier.bias", value=torch.zeros(3, dtype=torch.complex64)), "classifier.bias does not fit"),
        (put("optimizer", value={"state": 1}), "damaged: the optimiser does not fit"),
        (put("optimizer", "state", value={0: {"exp_avg": torch.zeros(7)}}), "damaged: the optimiser does not fit"),
        (put("format", value=[1]), "a checkpoint of format"),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)  # fmt: skip
def test_damaged_checkpoints_are_one_line(
    change: Callable[[dict[str, Any]], None], message: str, stopped: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run_dir = altered(stopped, tmp_path / "run", change)
    with pytest.raises(InputError) as refused:
        continue_run(tiny_set, run_dir)
    assert message in str(refused.value) and f"{run_dir}/last.pt" in str(refused.value)


def test_without_its_last_checkpoint_a_run_continues_from_the_best(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the line about a damaged one says. An epoch has five steps."""
    last = tmp_path / "last.pt"
    continue_run(tiny_set, tmp_path, "--max-steps", "7")
    whole = load(last)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.pt: damaged, .*, or remove it to continue from best\.pt"):
        continue_run(tiny_set, tmp_path, "--max-steps", "7")
    last.unlink()
    capsys.readouterr()
    continue_run(tiny_set, tmp_path, "--max-steps", "7")
    said = capsys.readouterr().err
    assert "there is no last.pt; best.pt is taken" in said and "continues after step 5" in said
    again = load(last)
    assert again.position == whole.position
    assert all(torch.equal(again.model[name], tensor) for name, tensor in whole.model.items())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl, line 1: not a record of training"),
        ("manifest.json", b"", "manifest.json: missing or damaged"),
        ("manifest.json", b'{"config": {}}', "manifest.json: missing or damaged"),
        ("manifest.json", b"[" * 100_000, "manifest.json: missing or damaged"),
    ],
    ids=["garbage of the right length", "empty", "partial", "deep"],
)
def test_damaged_records_are_told_before_training(
    file: str, content: bytes | None, message: str, stopped: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run_dir = altered(stopped, tmp_path / "run", lambda content: None)
    length = (stopped / file).stat().st_size
    (run_dir / file).write_bytes(b"x" * length if content is None else content)
    with pytest.raises(InputError, match=message):
        continue_run(tiny_set, run_dir)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
@pytest.mark.parametrize("there", [True, False], ids=["a link", "a dangling link"])
def test_links_in_a_run_directory_are_not_followed(
    name: str, there: bool, tiny_set: Path, tmp_path: Path
) -> None:
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    run_dir.mkdir()
    if there:
        victim.write_text("precious")
    (run_dir / name).symlink_to(victim)
    with pytest.raises(InputError, match=str(run_dir)):
        continue_run(tiny_set, run_dir, "--max-steps", "1")
    assert victim.read_text() == "precious" if there else not victim.exists()


def test_no_regular_files_and_bombs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_text("no weights")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    for name, reason in [
        ("fifo.pt", "not a regular file"),
        ("folder.pt", "not a regular file"),
        ("text.pt", "not a readable"),
        ("bomb.pt", "it would unpack to 1,048,576 bytes"),
    ]:
        with pytest.raises(InputError, match=reason):
            load(tmp_path / name)
        with pytest.raises(InputError, match=reason):
            load_backbone(Network(Config(image_size=32), 3), 18, str(tmp_path / name))


def test_weights_of_odd_kinds_are_named(tmp_path: Path) -> None:
    network = Network(Config(image_size=32), 3)
    state = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    quantised = torch.quantize_per_tensor(state["conv1.weight"], 0.1, 0, torch.qint8)
    for odd in (3, quantised, state["conv1.weight"].to_sparse(), state["conv1.weight"].to("meta")):
        torch.save({**state, 0: 1, "conv1.weight": odd}, tmp_path / "odd.pth")
        with pytest.raises(InputError, match=r"conv1\.weight is"):
            load_backbone(network, 18, str(tmp_path / "odd.pth"))


def test_adamw_begun_on_a_cpu_counts_its_steps_on_the_gpu_that_it_continues_on() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    begun, continued = (
        torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}], fused=True, capturable=on_gpu)
        for on_gpu in (False, True)
    )
    weight.grad = torch.ones(2)
    begun.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    restore(continued, scaler, Path("last.pt"), Updates(begun.state_dict(), {}))
    assert continued.param_groups[0]["capturable"] and continued.state[weight]["step"] == 1
