"""The kernel tests can fail: each mutant of the kernels is caught by the check that should catch it.

A mutant is made in the syntax tree, where its place is found by the function and the expression that it changes.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastnet_kernels
from fastnet_kernels import ChannelGroupLSTM, Stage, naive
from fastnet_kernels.plan import padded_batch, plan, sizes
from ptxrun import MemoryFault, PtxError
from tests.support.kernels import (
    KERNEL_MODULES,
    executed,
    failures,
    feature_maps,
    interpreted,
)

SOURCE = Path(fastnet_kernels.__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NaN and overflow on the way to being caught

BOTH = {"forward_kernel", "backward_kernel"}
Change = tuple[str, Callable[[ast.Module], None]]  # a module and what to do to it


def mutant(folder: Path, patch: pytest.MonkeyPatch, change: Change | None) -> ModuleType:
    """launch of a copy of the package with the change made."""
    name = f"mutant_{folder.name}"
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    for module in ("naive", "plan", *KERNEL_MODULES):
        tree = ast.parse((SOURCE / f"{module}.py").read_text())
        if change and change[0] == module:
            before = ast.dump(tree)
            change[1](tree)
            assert ast.dump(tree) != before
        (package / f"{module}.py").write_text(ast.unparse(tree))
    patch.syspath_prepend(str(folder))
    patch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module(f"{name}.launch")


def function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def within(tree: ast.Module, name: str) -> list[ast.expr | ast.stmt]:
    """The statements and expressions of a function, in the order of the text."""
    nodes = [n for n in ast.walk(function(tree, name)) if isinstance(n, ast.expr | ast.stmt)]
    return sorted(nodes, key=lambda node: (node.lineno, node.col_offset))


def calls(tree: ast.Module, name: str, called: str) -> list[ast.Call]:
    return [n for n in within(tree, name) if isinstance(n, ast.Call) and ast.unparse(n.func) == called]


def returned(tree: ast.Module, name: str) -> list[ast.expr]:
    """The elements of the tuple that a function returns."""
    last = function(tree, name).body[-1]
    assert isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)
    return last.value.elts


def assigned(tree: ast.Module, name: str, variable: str) -> ast.Assign | ast.AugAssign:
    """The one assignment to a variable in a function."""
    (found,) = (
        n
        for n in within(tree, name)
        if (isinstance(n, ast.AugAssign) and ast.unparse(n.target) == variable)
        or (isinstance(n, ast.Assign) and [ast.unparse(t) for t in n.targets] == [variable])
    )
    return found


def become(node: ast.expr, text: str) -> None:
    """Replaces an expression in place."""
    new = ast.parse(text, mode="eval").body
    node.__class__, node.__dict__ = new.__class__, new.__dict__


def swap_gates(tree: ast.Module) -> None:
    elements = returned(tree, "activate")
    elements[0], elements[1] = elements[1], elements[0]


def cut_packing(tree: ast.Module) -> None:
    """Weights of inputs from 128 on are not packed."""
    inside = assigned(tree, "pack_tile", "inside").value
    become(inside, ast.unparse(inside).replace("k < P.hidden", "k < 128"))


def lose_a_part(tree: ast.Module) -> None:
    """The first partial sum of the weights' gradients is left out."""
    become(calls(tree, "unpack_tile", "range")[0], "range(1, parts)")


def drop_derivative_of_tanh(tree: ast.Module) -> None:
    become(assigned(tree, "cell_gradient", "dc").value, "dh * o")


def drop_mask(of: str) -> Callable[[ast.Module], None]:
    def change(tree: ast.Module) -> None:
        mask = returned(tree, "output_tile")[1]
        assert isinstance(mask, ast.BinOp)
        become(mask, ast.unparse(mask.right if of == "rows" else mask.left))

    return change


def one_slot(tree: ast.Module) -> None:
    """h and c of inference in one slot instead of two."""
    (slots,) = (n for n in within(tree, "_plan") if ast.unparse(n) == "steps + 1 if save else 2")
    assert isinstance(slots, ast.expr)
    become(slots, "steps + 1 if save else 1")


def reload_in_the_loop_that_stores(tree: ast.Module) -> None:
    (operand,) = (
        call.args[0]
        for call in calls(tree, "forward_streamed", "tl.dot")
        if ast.unparse(call.args[0]) == "h_tiles[i]"
    )
    become(operand, "tl.load(h + write + r * P.padded + k[None, :])")


def remove_barrier(tree: ast.Module) -> None:
    """The one between the gate gradients and their product with W_hh."""
    become(calls(tree, "backward_streamed", "tl.debug_barrier")[1], "None")


def remove_wait(of: str) -> Callable[[ast.Module], None]:
    """Programs that share a group go on without the others."""

    def change(tree: ast.Module) -> None:
        become(calls(tree, of, "wait")[0], "None")

    return change


def relax_arrival(tree: ast.Module) -> None:
    """The addition to the counter does not release what was stored before it."""
    (addition,) = calls(tree, "arrive", "tl.atomic_add")
    become(addition, ast.unparse(addition).replace("release", "relaxed"))


def narrow_arrival(tree: ast.Module) -> None:
    """The addition releases what was stored to the threads of its own program only."""
    (addition,) = calls(tree, "arrive", "tl.atomic_add")
    become(addition, ast.unparse(addition).replace("gpu", "cta"))


def relax_wait(tree: ast.Module) -> None:
    """Reading the counter does not acquire what was released."""
    (read,) = calls(tree, "wait", "tl.inline_asm_elementwise")
    become(read.args[0], ast.unparse(read.args[0]).replace("acquire", "relaxed"))


def arrive_before_all_have_stored(tree: ast.Module) -> None:
    become(calls(tree, "arrive", "tl.debug_barrier")[0], "None")


def reset_early(tree: ast.Module) -> None:
    """Every program that leaves zeroes the counter, and not the last one."""
    (branch,) = (node for node in within(tree, "leave") if isinstance(node, ast.If))
    assert isinstance(branch.test, ast.Compare)
    become(branch.test, ast.unparse(branch.test).replace("== arrivals + PARTS - 1", ">= 0"))


def never_reset(tree: ast.Module) -> None:
    become(calls(tree, "leave", "tl.atomic_xchg")[0], "None")


@pytest.mark.parametrize(
    ("stages", "change"),
    [
        pytest.param([(1, 2, 4)], None, id="unchanged"),
        pytest.param([(1, 2, 4)], ("gates", swap_gates), id="gates-swapped"),
        pytest.param([(1, 2, 136)], ("packing", cut_packing), id="piece-of-K-not-packed"),
        pytest.param([(1, 2, 4)], ("packing", lose_a_part), id="partial-sum-lost"),
        pytest.param(
            [(1, 2, 4)], ("fused_backward", drop_derivative_of_tanh), id="derivative-of-tanh-dropped"
        ),
    ],
)
def test_wrong_numbers(
    stages: list[tuple[int, int, int]], change: Change | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants that the comparison with nn.LSTM catches, in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = failures(mutant(tmp_path, monkeypatch, change), stages, 2, torch.float16)
    assert bool(found) == bool(change)


@pytest.mark.parametrize("of", ["rows", "units"])
def test_dropped_masks(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants that leave their buffers, in the executed PTX."""
    launch = mutant(tmp_path, monkeypatch, ("tiles", drop_mask(of)))
    with executed(launch), pytest.raises(MemoryFault, match="out"):
        failures(launch, [(1, 2, 4)], 2, torch.float16)


def test_slot_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference with one slot of h: a step's first chunk is stored over what its second still reads."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mutated = mutant(tmp_path, monkeypatch, ("plan", one_slot))
    module = ChannelGroupLSTM([(1, 3, 37)])
    x = [f.float() for f in feature_maps(module.stages, 2)]
    with torch.no_grad():
        expected = naive(x, module.weights(), module.stages)
        outputs = [
            launch.forward(x, module.weights(), module.stages, save=False, recompute=False)[0]
            for launch in (interpreted(), mutated)
        ]
    torch.testing.assert_close(outputs[0], expected)
    assert (outputs[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        pytest.param(None, None, id="unchanged"),
        pytest.param(
            ("fused_forward", reload_in_the_loop_that_stores),
            "forward_kernel",
            id="reload-in-the-loop-that-stores",
        ),
        pytest.param(("fused_backward", remove_barrier), "backward_kernel", id="barrier-removed"),
    ],
)
def test_races(
    change: Change | None, kernel: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants that the executed PTX shows to be races, whatever numbers come out."""
    launch = mutant(tmp_path, monkeypatch, change)
    with executed(launch) as runs:
        failures(launch, [(1, 3, 68)], 2, torch.bfloat16)
    racing = {name for name, kernel_runs in runs.items() for stats in kernel_runs if stats.races}
    assert racing == ({kernel} if kernel else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "caught"),
    [
        pytest.param(None, set(), id="unchanged"),
        pytest.param(("fused_forward", remove_wait("forward_split")), {"forward_kernel"}, id="no-meeting"),
        pytest.param(
            ("fused_backward", remove_wait("backward_split")), {"backward_kernel"}, id="no-meeting-backward"
        ),
        pytest.param(("meeting", relax_arrival), BOTH, id="arrival-not-released", marks=pytest.mark.long),
        pytest.param(
            ("meeting", narrow_arrival), BOTH, id="arrival-released-to-its-program", marks=pytest.mark.long
        ),
        pytest.param(("meeting", relax_wait), BOTH, id="wait-does-not-acquire", marks=pytest.mark.long),
        pytest.param(
            ("meeting", arrive_before_all_have_stored),
            BOTH,
            id="no-barrier-before-arrival",
            marks=pytest.mark.long,
        ),
        pytest.param(("meeting", reset_early), {"hang"}, id="reset-early"),
        pytest.param(("meeting", never_reset), BOTH, id="never-reset"),
    ],
)
def test_meetings(
    change: Change | None, caught: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants of what split programs do to wait for each other: races between programs, or a wait without end."""
    launch = mutant(tmp_path, monkeypatch, change)
    batch, plans = 2, plan([Stage(1, 3, 68)], torch.bfloat16, 80, save=True, split=True)
    size = sizes(plans, padded_batch(batch))
    gates, dgates, h = (torch.randn(n).bfloat16() for n in (size.gates, size.gates, size.states))
    packed, out = torch.zeros(size.weights).bfloat16(), torch.zeros(batch, 68).bfloat16()
    c, carry = torch.zeros(size.states), torch.zeros(size.carry)
    found = set()
    with executed(launch, schedule="random", seed=1, max_steps=5_000) as runs:
        try:
            for _ in range(2):  # the second finds the counters as the first has left them
                launch.recurrent_forward(
                    plans, gates=gates, h=h, c=c, packed=packed, out=out, states=True, keep_gates=True
                )
                launch.recurrent_backward(
                    plans, gates=gates, c=c, packed=packed, dout=out, dgates=dgates, carry=carry
                )
        except PtxError as error:
            assert "without ending" in str(error)
            found.add("hang")
    found |= {name for name, kernel_runs in runs.items() for stats in kernel_runs if stats.cta_races}
    assert found == caught
