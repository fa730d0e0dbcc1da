"""Operands of instructions as arrays over lanes, and the table of instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ptxrun.parser import BFLOATS, FLOATS, TYPES, Instr
from ptxrun.rounding import DIRECTED, directed, flush, to_bf16, widen

if TYPE_CHECKING:
    from ptxrun.group import Group

Step = Callable[[], object]  # runs one instruction
Pred = tuple[np.ndarray, bool]  # predicate register, negated
Decode = Callable[["Operands", Instr], "Step | None"]  # None: nothing to do

D = TypeVar("D", bound=Decode)

CACHE_HINT = re.compile(r"L[12]::[\w:]+")


class Entry(NamedTuple):
    decode: Decode
    mods: frozenset[str]  # that are modelled, or change no result; types are left to `decode`
    own_mask: bool  # the step looks after inactive lanes itself


INSTRUCTIONS: dict[tuple[str, str], Entry] = {}  # (opcode, kind) -> how to decode it


def instruction(
    ops: str, mods: str = "", kind: str = "int float", own_mask: bool = False
) -> Callable[[D], D]:
    """Register the decoder of some opcodes; modifiers that are not listed are refused."""

    def register(decode: D) -> D:
        for op in ops.split():
            for k in kind.split():
                INSTRUCTIONS[op, k] = Entry(decode, frozenset(mods.split()), own_mask)
        return decode

    return register


def check_modifiers(ins: Instr, known: frozenset[str]) -> None:
    for m in ins.mods:
        if m not in TYPES and m not in known and not ("hints" in known and CACHE_HINT.fullmatch(m)):
            raise NotImplementedError(f"modifier not covered: {ins}")


class Operands:
    """Access to the registers, constants and addresses of one group.

    The arrays are views of the register banks: valid for the whole launch, read anew at every step.
    """

    def __init__(self, g: Group) -> None:
        self.g, self.n, self.run, self.kernel = g, g.n, g.run, g.kernel
        self.consts: dict[tuple[str, str], np.ndarray] = {}
        self.written: list[np.ndarray] = []  # rows that the instruction being decoded writes
        self.carry = np.zeros(g.n, np.uint64)
        self.every = np.arange(g.n)

    def pred(self, ins: Instr) -> Pred | None:
        return (self.src(ins.pred[0], "pred"), ins.pred[1]) if ins.pred else None

    def is_constant(self, operand: str) -> bool:
        return operand not in self.kernel.regs and operand not in self.g.special

    def src(self, operand: str, t: str) -> np.ndarray:
        """The operand as an array of storage type t (bf16 as bits)."""
        dtype, bits = TYPES[t]
        if operand in self.kernel.regs:
            have, row = self.kernel.regs[operand]
            if have < bits or (have == 1) != (bits == 1):
                raise ValueError(f"{operand} cannot be read as {t}")
            view = self.g.bank[have][row]
            return view if have == 1 else view.view(dtype)[:: have // bits if have > bits else 1]
        if operand in self.g.special:
            return self.g.special[operand]
        if (operand, t) not in self.consts:
            v = self.number(operand, bits)
            if bits == 1:
                self.consts[operand, t] = np.full(self.n, bool(v))
            else:
                self.consts[operand, t] = np.full(self.n, v & (1 << bits) - 1, f"u{bits // 8}").view(dtype)
        return self.consts[operand, t]

    def number(self, operand: str, bits: int) -> int:
        """An immediate or the address of a symbol (plus an offset), as an integer or float bits."""
        m = re.match(r"([\w$%]+)\s*\+\s*(-?\w+)$", operand)
        name, off = (m[1], int(m[2], 0)) if m else (operand, 0)
        for table in (*self.kernel.offsets.values(), self.run.symbols):
            if name in table:
                return table[name] + off
        if m := re.match(r"0([fFdD])([0-9a-fA-F]+)$", operand):
            if bits != (32 if m[1] in "fF" else 64):
                raise ValueError(f"{operand} is not a number of {bits} bits")
            return int(m[2], 16)
        return int(operand.rstrip("uU"), 0)

    def dst(self, operand: str, t: str) -> np.ndarray:
        """Where a result of type t goes; a wider register is written whole, extended."""
        dtype, bits = TYPES[t]
        if operand == "_":
            return np.empty(self.n, dtype)
        have, row = self.kernel.regs[operand]
        if have < bits or (have > bits and (bits == 1 or t in ("f16", "f32"))):
            raise ValueError(f"{operand} cannot be written as {t}")
        view = self.g.bank[have][row]
        self.written.append(view)
        return view.view(dtype if have == bits else f"{'i' if t[0] == 's' else 'u'}{have // 8}")

    def reader(self, operand: str, t: str, ftz: bool = False) -> Callable[[], np.ndarray]:
        """A function giving the operand as numbers (bf16 as float32)."""
        a = self.src(operand, t)
        get = (lambda: widen(a)) if t in BFLOATS else (lambda: a)
        return (lambda: flush(get(), t)) if ftz and t in FLOATS else get

    def writer(self, operand: str, t: str, mods: set[str]) -> Callable[[np.ndarray], None]:
        """A function storing numbers into the operand, with the rounding and modifiers given."""
        d = self.dst(operand, t)
        mode = next((m for m in DIRECTED if m in mods), "rn")
        if mode in ("rm", "rp") and t in BFLOATS:
            raise ValueError(f"{t} has no rounding .{mode}")

        def put(x: np.ndarray) -> None:
            if "sat" in mods:
                x = np.clip(np.where(np.isnan(x), 0, x), 0, 1)
            if mode != "rn" and t not in BFLOATS:
                x = directed(x.astype(np.float64), TYPES[t][0], mode)
            if "ftz" in mods:
                x = flush(x, t)
            d[...] = to_bf16(x, mode) if t in BFLOATS else x

        return put

    def address(self, operand: str) -> Callable[[], np.ndarray]:
        """'[%rd1+16]' -> a function giving the addresses of all lanes."""
        m = re.match(r"\[\s*([%\w$@]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$", operand)
        if not m:
            raise ValueError(f"not an address: {operand}")
        name, off = m[1], int(m[3] or "0", 0) * (-1 if m[2] == "-" else 1)
        bits = self.kernel.regs.get(name, (32 if name in self.kernel.offsets["shared"] else 64,))[0]
        a = self.src(name, f"u{bits}")
        c = a.dtype.type(off & (1 << bits) - 1)
        return (lambda: a + c) if off else (lambda: a)
