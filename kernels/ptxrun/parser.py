"""PTX text -> Kernel: parameters, registers, symbols, instructions and basic blocks."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ptxrun.errors import PtxError

# type -> (storage dtype, bits). bfloat16 and tf32 are kept as bits; an x2 type is a row of twice the length.
TYPES: dict[str, tuple[type[np.generic], int]] = {
    "pred": (np.bool_, 1),
    "b8": (np.uint8, 8),
    "u8": (np.uint8, 8),
    "s8": (np.int8, 8),
    "b16": (np.uint16, 16),
    "u16": (np.uint16, 16),
    "s16": (np.int16, 16),
    "f16": (np.float16, 16),
    "bf16": (np.uint16, 16),
    "b32": (np.uint32, 32),
    "u32": (np.uint32, 32),
    "s32": (np.int32, 32),
    "f32": (np.float32, 32),
    "tf32": (np.uint32, 32),
    "f16x2": (np.float16, 32),
    "bf16x2": (np.uint16, 32),
    "b64": (np.uint64, 64),
    "u64": (np.uint64, 64),
    "s64": (np.int64, 64),
    "f64": (np.float64, 64),
}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}
BFLOATS = {"bf16", "bf16x2"}
SPACES = ("param", "shared", "global", "local", "const")
VECTORS = {"v2": 2, "v4": 4}
ENDS_BLOCK = {"bra", "ret", "exit", "trap", "bar", "barrier"}
CLASS = {
    op: name
    for name, ops in {
        "barrier": "bar barrier membar fence",
        "branch": "bra ret exit call trap",
        "predicate": "setp selp",
        "sfu": "ex2 lg2 rcp sqrt rsqrt sin cos tanh",
        "mma": "mma",
        "ldmatrix": "ldmatrix",
        "shfl": "shfl",
        "cvt": "cvt",
        "mov": "mov",
    }.items()
    for op in ops.split()
}


@dataclass
class Instr:
    """One instruction. `ld.global.v4.b32 {..}, [..]` has op `ld` and mods `global v4 b32`."""

    pc: int
    op: str
    mods: list[str]
    args: list[str]
    pred: tuple[str, bool] | None  # (register, negated)
    line: int  # of the PTX text
    loc: str  # source file:line
    text: str

    def __post_init__(self) -> None:
        op, mods = self.op, self.mods
        self.types = [m for m in mods if m in TYPES]
        self.t = self.types[-1] if self.types else ""
        self.kind = "float" if self.t in FLOATS else "int"
        space = "shared" if op == "ldmatrix" else next((m for m in mods if m in SPACES), "global")
        self.space = "global" if space == "const" else space
        self.vec = next((VECTORS[m] for m in mods if m in VECTORS), 1)
        self.ends = op in ENDS_BLOCK and not {"warp", "arrive"} & set(mods)
        self.opcode = ".".join([op, *(m for m in mods if "::" not in m and m not in ("aligned", "sync"))])
        if op in ("ld", "st", "atom", "red"):
            self.klass = f"{op}.{self.space}"
        elif op == "cp":
            self.klass = "cp.async" if "shared" in mods else "cp.async.ctl"
        elif op == "div" and self.kind == "float":
            self.klass = "sfu"
        else:
            self.klass = CLASS.get(op) or ("predicate" if self.t == "pred" else self.kind)

    def __str__(self) -> str:
        return f"PTX line {self.line}: {self.text}" + (f" [{self.loc}]" if self.loc else "")


@dataclass
class Block:
    """A basic block: instructions start..end-1, the terminator included."""

    start: int
    end: int
    rank: int = 0  # scheduling order of diverged lanes: lowest first
    ops: Counter[tuple[str, str]] = field(default_factory=Counter)  # (opcode, class) -> instructions


class Kernel:
    """A parsed .entry. Nothing in it changes after parsing."""

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
        lines = [line.split("//")[0] for line in ptx.split("\n")]
        text = "\n".join(lines)
        name = re.escape(entry) if entry else r"[\w$]+"
        head = re.search(rf"\.entry\s+({name})\s*\(([^)]*)\)([^{{]*)\{{", text)
        if not head:
            raise PtxError("no .entry found in the PTX")
        files = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in files}
        self.params = [parse_param(p.strip()) for p in head[2].split(",") if p.strip()]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
        self.threads = int(threads[1]) if threads else None
        self.regs: dict[str, tuple[int, int]] = {}  # name -> (bits, row)
        self.nregs: Counter[int] = Counter()  # bits -> rows
        self.offsets: dict[str, dict[str, int]] = {"shared": {}, "local": {}}
        self.sizes: Counter[str] = Counter()  # bytes of shared and local variables
        self.tables: dict[str, np.ndarray] = {}  # global and const variables, initial bytes
        self.dynamic_shared: list[str] = []
        self.instrs: list[Instr] = []
        self.labels: dict[str, int] = {}
        declared = re.finditer(
            r"^[ \t]*(?:\.\w+ +)*\.(global|const|shared)\s+(.*?);", text[: head.start()], re.M | re.S
        )
        for v in declared:
            self._variable(v[1], v[2])
        before = text[: head.end()]
        self._body(lines, before.count("\n"), len(before.rsplit("\n", 1)[-1]))
        for symbol in self.dynamic_shared:  # follows the static shared memory
            self.offsets["shared"][symbol] = -(-self.sizes["shared"] // 16) * 16
        self._blocks()

    def _variable(self, space: str, declaration: str) -> None:
        pattern = r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*(.*))?$"
        m = re.match(pattern, declaration.strip(), re.S)
        if not m:
            raise NotImplementedError(f"cannot parse the variable: {declaration}")
        align, (dtype, bits), name = int(m[1] or 1), TYPES[m[2]], m[3]
        if m[4] == "":
            self.dynamic_shared.append(name)
        elif space in ("global", "const"):
            init = np.zeros(int(m[4] or 1), dtype)
            values = [int(x, 0) for x in (m[5] or "").strip("{} \n").split(",") if x.strip()]
            init[: len(values)] = values
            self.tables[name] = init.view(np.uint8)
        else:
            at = -(-self.sizes[space] // align) * align
            self.offsets[space][name], self.sizes[space] = at, at + int(m[4] or 1) * bits // 8

    def _body(self, lines: list[str], row: int, skip: int) -> None:
        """Split the body into statements; braces at the start of a statement open register scopes."""
        scopes: list[dict[str, str]] = [{}]
        serial, vec, buf, loc = 0, 0, "", ""
        for n in range(row, len(lines)):
            line = lines[n][skip:] if n == row else lines[n]
            if m := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
                loc = f"{self.files.get(m[1], m[1])}:{m[2]}"
                continue
            for part in re.split(r"([;{}])", line):
                if part == ";" and not vec:
                    self._statement(buf.strip(), n + 1, loc, scopes)
                    buf = ""
                elif part == "{" and not buf.strip():
                    serial += 1
                    scopes.append({"#": str(serial)})
                elif part == "}" and not vec:
                    scopes.pop()
                    if not scopes:
                        return
                else:
                    vec += (part == "{") - (part == "}")
                    while not buf.strip() and (m := re.match(r"\s*([\w$]+):(?!:)", part)):
                        self.labels[m[1]] = len(self.instrs)
                        part = part[m.end() :]
                    buf += part
            buf += " "
        raise PtxError("the kernel's body does not end")

    def _statement(self, s: str, line: int, loc: str, scopes: list[dict[str, str]]) -> None:
        if not s or s.startswith((".pragma", ".param")):
            return
        if s.startswith(".reg"):
            return self._registers(s, scopes[-1])
        if m := re.match(r"\.(local|shared)\s+(.*)$", s, re.S):
            return self._variable(m[1], m[2])
        text = " ".join(s.split())
        for scope in reversed(scopes[1:]):
            if len(scope) > 1:
                pieces = re.split(r"(%?[A-Za-z_$][\w$]*(?!@)\b)", s)
                s = "".join(scope.get(piece, piece) for piece in pieces)
        m = re.match(r"(?:@(!?)([%\w$@]+)\s+)?([\w.:]+)\s*(.*)$", s, re.S)
        if not m:
            raise NotImplementedError(f"PTX line {line}: cannot parse: {s}")
        op, *mods = m[3].replace("::cta", "").split(".")
        pred = (m[2], m[1] == "!") if m[2] else None
        self.instrs.append(Instr(len(self.instrs), op, mods, split_args(m[4]), pred, line, loc, text))

    def _registers(self, s: str, scope: dict[str, str]) -> None:
        _, kind, names = s.split(None, 2)
        bits = 1 if kind == ".pred" else max(TYPES[kind[1:]][1], 16)
        for m in re.finditer(r"([%\w$]+)(?:<(\d+)>)?", names):
            for reg in [f"{m[1]}{i}" for i in range(int(m[2]))] if m[2] else [m[1]]:
                if "#" in scope:  # nested: a unique name
                    scope[reg] = reg = f"{reg}@{scope['#']}"
                self.regs[reg] = (bits, self.nregs[bits])
                self.nregs[bits] += 1

    def _blocks(self) -> None:
        code = self.instrs
        targets = {self.labels[i.args[0]] for i in code if i.op == "bra"}
        starts = {0, *targets, *(i.pc + 1 for i in code if i.ends)}
        cuts = [*sorted(c for c in starts if c < len(code)), len(code)]
        self.blocks = [Block(a, b) for a, b in pairwise(cuts)]
        self.block_at = {b.start: i for i, b in enumerate(self.blocks)}
        for b in self.blocks:
            b.ops.update((i.opcode, i.klass) for i in code[b.start : b.end])
        # Of diverged lanes those run first whose block has most post-dominators. A reconvergence point
        # post-dominates every block on the way to it, so it never runs ahead of a straggler.
        traps = {i for i, b in enumerate(self.blocks) if code[b.end - 1].op == "trap"}
        depth = self._postdominators(traps)
        order = sorted(range(len(self.blocks)), key=lambda i: (i not in traps, -depth[i], i))
        for rank, i in enumerate(order):
            self.blocks[i].rank = rank

    def _postdominators(self, traps: set[int]) -> list[int]:
        """How many blocks post-dominate each; paths into a trap are not counted."""
        n = len(self.blocks)
        successors = []
        for i, b in enumerate(self.blocks):
            last = self.instrs[b.end - 1]
            out = [self.target(last)] if last.op == "bra" else []
            if i + 1 < n and (last.pred or last.op not in ("bra", "ret", "exit", "trap")):
                out.append(i + 1)
            successors.append([s for s in out if s not in traps] or out)
        sets = [-1 if s else 1 << i for i, s in enumerate(successors)]  # bit masks
        changed = True
        while changed:
            changed = False
            for i in reversed(range(n)):
                new = -1 if successors[i] else 0
                for s in successors[i]:
                    new &= sets[s]
                new |= 1 << i
                changed |= new != sets[i]
                sets[i] = new
        return [(s & (1 << n) - 1).bit_count() for s in sets]

    def target(self, branch: Instr) -> int:
        """Block that a bra jumps to."""
        return self.block_at[self.labels[branch.args[0]]]


@lru_cache(maxsize=64)
def parse(ptx: str, entry: str | None = None) -> Kernel:
    """The kernel `entry`, or the first one, of a PTX text."""
    return Kernel(ptx, entry)


def parse_param(declaration: str) -> tuple[str, str, int]:
    """-> (name, type, bytes)."""
    m = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.S)
    if not m:
        raise NotImplementedError(f"cannot parse the parameter: {declaration}")
    return m[2], m[1], int(m[3] or 1) * TYPES[m[1]][1] // 8


def split_args(s: str) -> list[str]:
    """Split operands at top-level commas."""
    out, depth, current = [], 0, ""
    for ch in s:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and not depth:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    return [*out, current.strip()] if current.strip() else out


def unpack(operand: str) -> list[str]:
    """'{a, b}' -> ['a', 'b'];  'a' -> ['a']."""
    return [x.strip() for x in operand.strip("{} ").split(",")]
