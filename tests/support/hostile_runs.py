"""Small valid files of a run, and how they are spoiled: what the fuzzer feeds to the readers of runs and weights."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from fastnet.config import Config, sample
from fastnet.network.network import Network
from fastnet.settings import as_toml
from fastnet.training.state import TrainState
from tests.support.hostile import mutated, mutated_json

CLASSES = ["n1", "n2", "n3"]


def config() -> Config:
    """A network that ends after conv2: under a megabyte of weights."""
    return replace(sample("lstm"), image_size=32, stages=("conv2",), seq_len=64)


@cache
def _content() -> dict[str, Any]:
    torch.manual_seed(0)
    network = Network(config(), len(CLASSES))
    return {
        "format": 1,
        "config": config().to_json(),
        "model": dict(network.state_dict()),
        "optimizer": None,
        "scaler": {},
        "position": asdict(TrainState(step=3)),
        "data_hash": "0" * 64,
        "classes": CLASSES,
        "words": CLASSES,
    }


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@cache
def _weights() -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("backbone."): value.contiguous()
        for name, value in _content()["model"].items()
        if name.startswith("backbone.")
    }


@cache
def _plain_bytes(kind: str) -> bytes:
    return _saved(_content()) if kind == "checkpoint" else _saved(_weights())


def checkpoint(rng: random.Random, folder: Path) -> Path:
    """A run directory whose checkpoint has other bytes, or other values in it."""
    if rng.random() < 0.5:
        content = mutated(rng, _plain_bytes("checkpoint"))
    else:
        content = _saved(mutated_json(rng, _content()))
    (folder / "best.pt").write_bytes(content)
    return folder


def weights(rng: random.Random, folder: Path) -> Path:
    """A PyTorch file of ResNet weights with other bytes, or other values in it."""
    content = (
        mutated(rng, _plain_bytes("weights")) if rng.random() < 0.5 else _saved(mutated_json(rng, _weights()))
    )
    (folder / "weights.pth").write_bytes(content)
    return folder / "weights.pth"


def safetensors(rng: random.Random, folder: Path) -> Path:
    content = mutated(rng, safetensors_bytes(_weights(), metadata={"format": "pt"}))
    (folder / "weights.safetensors").write_bytes(content)
    return folder / "weights.safetensors"


def records(rng: random.Random, folder: Path) -> Path:
    """A run directory with manifest.json and metrics.jsonl, one of which is spoiled."""
    session = {"started": "2026-01-01T00:00:00+00:00", "from_step": 0, "done": True}
    data = {"name": "tiny", "hash": "0", "path": "data/tiny", "source": {"kind": "zip"}}
    manifest: Any = {"config": config().to_json(), "data": data, "sessions": [session]}
    epoch = {"train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0, "val_top1": 0.5, "val_top5": 1.0}
    events: list[Any] = [
        {"event": "phase", "phase": "full", "step": 0},
        {"event": "step", "step": 2, "train_loss": 1.0, "train_top1": 0.5},
        {"event": "epoch", "phase": "full", "epoch": 0, "step": 5, **epoch, "val_count": 10},
    ]
    spoil = rng.randrange(4)
    if spoil == 0:
        manifest = mutated_json(rng, manifest)
    if spoil == 1:
        events = [mutated_json(rng, event) for event in events]
    texts = {
        "manifest.json": json.dumps(manifest).encode(),
        "metrics.jsonl": "".join(json.dumps(event) + "\n" for event in events).encode(),
    }
    for name, text in texts.items():
        whole = spoil < 2 or (spoil == 2) != (name == "manifest.json")
        (folder / name).write_bytes(text if whole else mutated(rng, text))
    return folder


def settings(rng: random.Random, folder: Path) -> Path:
    """A file for --config, as TOML or as a run's manifest."""
    if rng.random() < 0.5:
        (folder / "run.toml").write_bytes(mutated(rng, as_toml(config()).encode()))
        return folder / "run.toml"
    changed = json.dumps({"config": mutated_json(rng, config().to_json())}).encode()
    (folder / "manifest.json").write_bytes(changed if rng.random() < 0.7 else mutated(rng, changed))
    return folder / "manifest.json"
