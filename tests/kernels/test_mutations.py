"""The kernel tests can fail: each mutant of the kernels' source is caught by the check that should catch it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastnet_kernels
from fastnet_kernels import ChannelGroupLSTM, naive
from ptxrun import MemoryFault
from tests.support.kernels import executed, failures, feature_maps, interpreted

SOURCE = Path(fastnet_kernels.__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NaN and overflow on the way to being caught


def mutant(folder: Path, patch: pytest.MonkeyPatch, changes: dict[str, tuple[str, str]]) -> ModuleType:
    """launch of a copy of the package in which each file's text has been replaced once."""
    name = f"mutant_{folder.name}"
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    for module in ("naive", "plan", "gates", "gemm", "fused", "launch"):
        text = (SOURCE / f"{module}.py").read_text()
        if module in changes:
            old, new = changes.pop(module)
            assert text.count(old) == 1, f"{module}.py has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        (package / f"{module}.py").write_text(text)
    assert not changes
    patch.syspath_prepend(str(folder))
    patch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module(f"{name}.launch")


PACKED = "hh[:, :, : p.hidden].copy_(pack_columns(weights.hh, p).transpose(1, 2))"


@pytest.mark.parametrize(
    ("stages", "change"),
    [
        pytest.param([(1, 2, 4)], {}, id="unchanged"),
        pytest.param(
            [(1, 2, 4)],
            {"gates": ("return sigmoid(i), sigmoid(f)", "return sigmoid(f), sigmoid(i)")},
            id="gates-swapped",
        ),
        pytest.param(
            [(1, 2, 136)],
            {"plan": (PACKED, PACKED.replace(": p.hidden", ":128").replace("(1, 2)", "(1, 2)[:, :, :128]"))},
            id="piece-of-K-not-packed",
        ),
        pytest.param(
            [(1, 2, 4)], {"fused": ("dc += dh * o * (1 - y * y)", "dc += dh * o")}, id="derivative-of-tanh-dropped"
        ),
    ],
)  # fmt: skip
def test_wrong_numbers(
    stages: list[tuple[int, int, int]],
    change: dict[str, tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mutants that the comparison with nn.LSTM catches, in the interpreter."""
    expected = bool(change)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = failures(mutant(tmp_path, monkeypatch, change), stages, 2, torch.float16)
    assert bool(found) == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("mask=(r < rows) & (unit < P.hidden))", "mask=r < rows)"), id="columns-of-the-output"),
        pytest.param(("mask=(r < rows) & (unit < P.hidden))", "mask=unit < P.hidden)"), id="rows-of-the-output"),
    ],
)  # fmt: skip
def test_dropped_masks(change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants that leave their buffers, in the executed PTX."""
    launch = mutant(tmp_path, monkeypatch, {"fused": change})
    with executed(launch), pytest.raises(MemoryFault, match="out"):
        failures(launch, [(1, 2, 4)], 2, torch.float16)


def test_slot_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference with one slot of h: a step's first chunk is stored over what its second still reads."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    one_slot = mutant(
        tmp_path, monkeypatch, {"plan": ("steps + 1 if save else 2", "steps + 1 if save else 1")}
    )
    module = ChannelGroupLSTM([(1, 3, 37)])
    x = [f.float() for f in feature_maps(module.stages, 2)]
    with torch.no_grad():
        expected = naive(x, module.weights(), module.stages)
        outputs = [
            launch.forward(x, module.weights(), module.stages, save=False, recompute=False)[0]
            for launch in (interpreted(), one_slot)
        ]
    torch.testing.assert_close(outputs[0], expected)
    assert (outputs[1] - expected).abs().max() > 1e-3


BARRIER = "        tl.debug_barrier()  # the gate gradients were stored by other threads; dh has been read\n"
RELOAD = (
    "                    w_tile = tl.load(w + (j * HP + k[:, None]) * N + n)\n"
    "                    a = tl.dot(h_tiles[i], w_tile"
)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        pytest.param({}, None, id="unchanged"),
        pytest.param(
            {"fused": (RELOAD, RELOAD.replace("h_tiles[i]", "tl.load(h + write + r * HP + k[None, :])"))},
            "forward_kernel",
            id="reload-in-the-loop-that-stores",
        ),
        pytest.param(
            {"fused": (BARRIER, "")},
            "backward_kernel",
            id="barrier-removed",
        ),
    ],
)  # fmt: skip
def test_races(
    change: dict[str, tuple[str, str]], kernel: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants that the executed PTX shows to be races, whatever numbers come out."""
    launch = mutant(tmp_path, monkeypatch, change)
    with executed(launch) as runs:
        failures(launch, [(1, 3, 68)], 2, torch.bfloat16)
    racing = {name for name, kernel_runs in runs.items() for stats in kernel_runs if stats.races}
    assert racing == ({kernel} if kernel else set())
