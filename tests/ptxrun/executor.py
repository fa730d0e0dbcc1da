"""ptxrun: execute the PTX that Triton emits for sm_80 on the CPU, with NumPy.

Layout of this file:
  1. parser        PTX text -> Kernel (registers, basic blocks, Instr)
  2. memory        fake global address space, shared memory, race shadow
  3. statistics    what launch() returns
  4. machine       Group (warps that run in lockstep), CTA (barriers, schedule)
  5. semantics     Decoder: Instr -> Python closure bound to one Group's registers
  6. launcher      launch(), compile_triton(), run_triton()

Every instruction is decoded once per group into a closure over preallocated register
rows; a row holds one register for all lanes of the group. In the `lockstep` schedule the
whole CTA is one group; in `random` each warp is its own group.
"""

from __future__ import annotations

import ctypes
import random
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import numpy as np

U8, U16, U32, U64, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
ALL = slice(None)


class PtxError(RuntimeError):
    """The program did something that is an error on the device too."""


class MemoryFault(PtxError):
    """Out-of-bounds, misaligned or read-only access."""


class BarrierError(PtxError):
    """Deadlock, or a diverged warp at an instruction that needs the whole warp."""


# ---------------------------------------------------------------- 1. parser

# type -> (storage dtype, bits). The x2 types are handled as rows of twice the length.
TYPES = {
    "pred": (np.bool_, 1),
    "b8": (U8, 8),
    "u8": (U8, 8),
    "s8": (np.int8, 8),
    "b16": (U16, 16),
    "u16": (U16, 16),
    "s16": (np.int16, 16),
    "f16": (F16, 16),
    "bf16": (U16, 16),
    "b32": (U32, 32),
    "u32": (U32, 32),
    "s32": (np.int32, 32),
    "f32": (F32, 32),
    "tf32": (U32, 32),
    "f16x2": (F16, 32),
    "bf16x2": (U16, 32),
    "b64": (U64, 64),
    "u64": (U64, 64),
    "s64": (I64, 64),
    "f64": (F64, 64),
}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}
SPACES = ("param", "shared", "global", "local", "const")
ENDS_BLOCK = {"bra", "ret", "exit", "trap", "bar", "barrier"}
CLASS = {
    op: name
    for name, ops in {
        "barrier": "bar barrier membar fence",
        "branch": "bra ret exit call trap",
        "predicate": "setp selp",
        "mma": "mma",
        "sfu": "ex2 lg2 rcp sqrt rsqrt sin cos tanh",
        "ldmatrix": "ldmatrix",
        "shfl": "shfl",
        "cvt": "cvt",
        "mov": "mov",
    }.items()
    for op in ops.split()
}


@dataclass
class Instr:
    pc: int
    op: str  # root opcode, e.g. 'ld'
    mods: list  # the rest, e.g. ['global', 'v4', 'b32']
    args: list
    pred: tuple | None  # (register, negated)
    line: int
    loc: str
    text: str

    def __post_init__(self):
        op, mods = self.op, self.mods
        self.types = [m for m in mods if m in TYPES]
        self.t = self.types[-1] if self.types else None
        space = "shared" if op == "ldmatrix" else next((m for m in mods if m in SPACES), "global")
        self.space = "global" if space == "const" else space
        self.vec = next((int(m[1]) for m in mods if m in ("v2", "v4", "v8")), 1)
        self.ends = op in ENDS_BLOCK and not {"warp", "arrive"} & set(mods)
        self.opcode = ".".join([op] + [m for m in mods if "::" not in m and m not in ("aligned", "sync")])
        if op in ("ld", "st", "atom", "red"):
            self.klass = f"{op}.{self.space}"
        elif op == "cp":
            self.klass = "cp.async" if "shared" in mods else "cp.async.ctl"
        else:
            kind = "predicate" if self.t == "pred" else "float" if self.t in FLOATS else "int"
            self.klass = CLASS.get(op) or ("sfu" if op == "div" and kind == "float" else kind)

    def __str__(self):
        return f"PTX line {self.line}: {self.text}" + (f" [{self.loc}]" if self.loc else "")


@dataclass
class Block:
    start: int
    end: int  # one past the last instruction, the terminator included
    ops: Counter = field(default_factory=Counter)
    rank: int = 0  # scheduling order of diverged lanes: lowest first


class Kernel:
    """A parsed .entry: parameters, registers, symbols, instructions and basic blocks."""

    def __init__(self, ptx, entry=None):
        ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
        lines = [ln.split("//")[0] for ln in ptx.split("\n")]
        text = "\n".join(lines)
        m = re.search(
            r"\.entry\s+(%s)\s*\(([^)]*)\)([^{]*)\{" % (re.escape(entry) if entry else r"[\w$]+"), text
        )
        if not m:
            raise PtxError("no .entry found in the PTX")
        self.files = {k: v.rsplit("/", 1)[-1] for k, v in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
        self.params = []  # (name, type, bytes)
        for p in filter(None, map(str.strip, m[2].split(","))):
            pm = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?$", p, re.S)
            self.params.append((pm[2], pm[1], int(pm[3] or 1) * TYPES[pm[1]][1] // 8))
        nt = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", m[3])
        self.threads = int(nt[1]) if nt else None
        self.regs, self.nregs = {}, Counter()  # name -> (bits, row)
        self.symbols = {"shared": {}, "local": {}, "global": {}}  # offsets; initial bytes of globals
        self.sizes, self.extern_shared = Counter(), []
        self.instrs, self.labels = [], {}
        for v in re.finditer(
            r"^[ \t]*((?:\.\w+ +)*)\.(global|const|shared)\s+(.*?);", text[: m.start()], re.M | re.S
        ):
            self._variable(v[2], v[3])
        self._body(lines, text[: m.end()].count("\n"), len(text[: m.end()].rsplit("\n", 1)[-1]))
        for name in self.extern_shared:  # dynamic shared memory follows the static
            self.symbols["shared"][name] = -(-self.sizes["shared"] // 16) * 16
        self._blocks()

    def _variable(self, space, decl):
        m = re.match(
            r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*(.*))?$", decl.strip(), re.S
        )
        align, (dtype, bits), name = int(m[1] or 1), TYPES[m[2]], m[3]
        if m[4] == "":
            self.extern_shared.append(name)
        elif space in ("global", "const"):
            init = np.zeros(int(m[4] or 1), dtype)
            values = [int(x, 0) for x in (m[5] or "").strip("{} \n").split(",") if x.strip()]
            init[: len(values)] = values
            self.symbols["global"][name] = init.view(U8)
        else:
            at = -(-self.sizes[space] // align) * align
            self.symbols[space][name], self.sizes[space] = at, at + int(m[4] or 1) * bits // 8

    def _body(self, lines, row, skip):
        """Split the body into statements; braces at statement start open register scopes."""
        scopes, serial, vec, buf, loc = [{}], 0, 0, "", ""
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
                    scopes.append({"#": serial})
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

    def _statement(self, s, line, loc, scopes):
        if not s or s.startswith((".pragma", ".param")):
            return
        if s.startswith(".reg"):
            _, ty, names = s.split(None, 2)
            bits = max(TYPES[ty[1:]][1], 16) if ty != ".pred" else 1
            for m in re.finditer(r"([%\w$]+)(?:<(\d+)>)?", names):
                for reg in [m[1]] if not m[2] else [f"{m[1]}{i}" for i in range(int(m[2]))]:
                    if "#" in scopes[-1]:  # nested scope: a unique name
                        scopes[-1][reg] = reg = f"{reg}@{scopes[-1]['#']}"
                    self.regs[reg] = (bits, self.nregs[bits])
                    self.nregs[bits] += 1
            return
        if m := re.match(r"\.(local|shared)\s+(.*)$", s, re.S):
            return self._variable(m[1], m[2])
        text = " ".join(s.split())
        for scope in reversed(scopes[1:]):
            if len(scope) > 1:
                s = re.sub(r"%?[A-Za-z_$][\w$]*(?!@)\b", lambda m: scope.get(m[0], m[0]), s)
        m = re.match(r"(?:@(!?)([%\w$@]+)\s+)?([\w.:]+)\s*(.*)$", s, re.S)
        if not m:
            raise NotImplementedError(f"PTX line {line}: cannot parse: {s}")
        op, *mods = m[3].replace("::cta", "").split(".")
        pred = (m[2], m[1] == "!") if m[2] else None
        self.instrs.append(Instr(len(self.instrs), op, mods, split_args(m[4]), pred, line, loc, text))

    def _blocks(self):
        code = self.instrs
        cuts = {0, *self.labels.values(), *(i.pc + 1 for i in code if i.ends)}
        cuts = sorted(c for c in cuts if c < len(code)) + [len(code)]
        self.blocks = [Block(a, b) for a, b in zip(cuts, cuts[1:])]
        self.block_at = {b.start: i for i, b in enumerate(self.blocks)}
        n, last = len(self.blocks), [code[b.end - 1] for b in self.blocks]
        dead = {i for i in range(n) if last[i].op == "trap"}
        succ = []
        for i, ins in enumerate(last):
            self.blocks[i].ops.update(
                (x.opcode, x.klass) for x in code[self.blocks[i].start : self.blocks[i].end]
            )
            out = [self.target(ins)] if ins.op == "bra" else []
            if i + 1 < n and (ins.pred or ins.op not in ("bra", "ret", "exit", "trap")):
                out.append(i + 1)
            succ.append([s for s in out if s not in dead] or out)
        # Diverged lanes: run the block with most post-dominators first. A reconvergence point
        # post-dominates every block on the way to it, so it never runs ahead of a straggler.
        pdom, changed = [-1 if s else 1 << i for i, s in enumerate(succ)], True
        while changed:
            changed = False
            for i in reversed(range(n)):
                if succ[i]:
                    new = -1
                    for s in succ[i]:
                        new &= pdom[s]
                    changed |= (new | 1 << i) != pdom[i]
                    pdom[i] = new | 1 << i
        depth = [bin(p & (1 << n) - 1).count("1") for p in pdom]
        for rank, i in enumerate(sorted(range(n), key=lambda i: (i not in dead, -depth[i], i))):
            self.blocks[i].rank = rank

    def target(self, ins):
        return self.block_at[self.labels[ins.args[0]]]


def split_args(s):
    """Split operands at top-level commas."""
    out, depth, cur = [], 0, ""
    for ch in s:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and not depth:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    return out + [cur.strip()] if cur.strip() else out


def unpack(operand):
    """'{a, b}' -> ['a', 'b'];  'a' -> ['a']."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


# ---------------------------------------------------------------- 2. memory

SLOT = 36  # each argument sits in the middle of its own 64 GiB slot
WARP_BITS, PC_BITS, CLK_BITS = 5, 18, 19
CLK, SEQ = WARP_BITS + PC_BITS, WARP_BITS + PC_BITS + CLK_BITS
WARP_MASK, CLK_MASK = (1 << WARP_BITS) - 1, (1 << CLK_BITS) - 1


class Shadow:
    """Who touched each granule last, for race detection.

    A stamp packs (CTA sequence number, clock, pc, warp) in an int64; 0 means never. The clock
    of a CTA ticks at barriers and releases. Two accesses of one CTA clash if they come from
    different warps and the first is not older than the last CTA-wide barrier; two accesses of
    different CTAs clash unless release/acquire atomics order them (see Order).
    """

    def __init__(self, granules, warps=0):
        self.n, self.shared = granules, bool(warps)
        self.w = np.zeros(granules, I64)  # last plain write
        self.a = None  # last atomic or other strong write
        if self.shared:  # last read, per warp
            self.readers = [np.zeros((warps, granules), I64)]
            self.busy = np.zeros(granules, np.int8)  # bytes that a cp.async is still to write
        else:  # the last two distinct readers, and the last
            self.readers = [np.zeros(granules, I64) for _ in range(3)]  # one from another CTA

    def clash(self, run, cta, kind, ins, mem, idx, st, old, same=None):
        """Report accesses `old` that are not ordered before this one."""
        if self.shared:
            if old.max() < cta.bar:
                return
            bad = (old >= cta.bar) & (((old ^ st) & WARP_MASK) != 0)
        else:
            if not old.any():
                return
            bad = np.where(
                (old >> SEQ) == cta.seq,
                (old >= cta.bar) & (((old ^ st) & WARP_MASK) != 0),
                (old != 0) & ~run.order.before(old, cta),
            )
        if same is not None and bad.any():  # a second write of the same value is harmless
            bad &= ~same().all(1, keepdims=True)
        if bad.any():
            run.race(cta, kind, ins, mem, idx, st, old, bad)

    def in_flight(self, run, cta, kind, ins, mem, idx, st):
        if self.shared and cta.inflight:
            busy = self.busy.take(idx) != 0
            if busy.any():
                run.race(cta, kind, ins, mem, idx, st, None, busy)

    def read(self, run, cta, ins, mem, idx, st, strong=False):
        w = self.w.take(idx)
        if self.shared and run.check_uninit and w.min() < cta.base:
            cold = w < cta.base
            if self.a is not None:
                cold &= self.a.take(idx) < cta.base
            run.stats.uninit[str(ins)] += int(cold.any(1).sum())
        self.clash(run, cta, "write-read", ins, mem, idx, st, w)
        self.in_flight(run, cta, "cp.async-read", ins, mem, idx, st)
        if strong:
            return
        if self.a is not None:
            self.clash(run, cta, "atomic-read", ins, mem, idx, st, self.a.take(idx))
        if self.shared:
            self.readers[0].reshape(-1)[(st & WARP_MASK) * self.n + idx] = st
            return
        last, other, foreign = self.readers
        old = last.take(idx)
        last[idx] = st
        diff = old ^ st
        moved = (old != 0) & (((diff & WARP_MASK) != 0) | ((diff >> SEQ) != 0))
        if moved.any():
            other[idx[moved]] = old[moved]
            moved &= (diff >> SEQ) != 0
            foreign[idx[moved]] = old[moved]
        lost = last.take(idx) != st  # another warp reads it in this very instruction
        if lost.any():
            other[idx[lost]] = np.broadcast_to(st, idx.shape)[lost]

    def check_write(self, run, cta, ins, mem, idx, st, same=None, strong=False):
        self.clash(run, cta, "write-write", ins, mem, idx, st, self.w.take(idx), same)
        for r in self.readers:
            self.clash(run, cta, "read-write", ins, mem, idx, st, r.take(idx, axis=-1))
        self.in_flight(run, cta, "cp.async-write", ins, mem, idx, st)
        if self.a is not None and not strong:
            self.clash(run, cta, "atomic-write", ins, mem, idx, st, self.a.take(idx))

    def write(self, run, cta, ins, mem, idx, st, same=None, strong=False):
        self.check_write(run, cta, ins, mem, idx, st, same, strong)
        if strong and self.a is None:
            self.a = np.zeros(self.n, I64)
        (self.a if strong else self.w)[idx] = st


class Order:
    """Which accesses of other CTAs happened before, through release/acquire operations."""

    def __init__(self, ctas, warps):
        self.shape, self.seen, self.released = (ctas + 1, warps), {}, {}

    def sync(self, cta, addrs, warps, acquire, release):
        if cta.seq not in self.seen:
            self.seen[cta.seq] = np.zeros(self.shape, I64)
        seen = self.seen[cta.seq]
        for a in set(addrs):
            if acquire and a in self.released:
                np.maximum(seen, self.released[a], out=seen)
        if release:  # publishes what precedes the last barrier, and the releasing warp's own accesses
            seen[cta.seq] = np.maximum(seen[cta.seq], (cta.bar >> CLK & CLK_MASK) - 1)
            seen[cta.seq, list(warps)] = cta.clk
            for a in set(addrs):
                self.released[a] = np.maximum(self.released.get(a, 0), seen)
            cta.tick()

    def before(self, old, cta):
        seen = self.seen.get(cta.seq)
        if seen is None:
            return np.zeros(old.shape, bool)
        return seen[old >> SEQ, old & WARP_MASK] >= (old >> CLK & CLK_MASK)


class Memory:
    """One global argument (or overlapping arguments), or one CTA's shared memory."""

    def __init__(self, name, base, raw, lead, nbytes, granule, warps=0, writable=True):
        self.name, self.base, self.lead, self.nbytes, self.granule = name, base, lead, nbytes, granule
        self.views = {w: raw.view(f"u{w}") for w in (1, 2, 4, 8)}
        self.writable, self.warps, self._shadow = writable, warps, None

    @property
    def shadow(self):
        if self._shadow is None:
            self._shadow = Shadow(len(self.views[1]) // self.granule + 1, self.warps)
        return self._shadow


def host_memory(x):
    """(address, bytes, writable) of a NumPy array or a torch CPU tensor, as strided."""
    if isinstance(x, np.ndarray):
        ptr, item, strides, ok = x.ctypes.data, x.itemsize, x.strides, x.flags.writeable
    elif x.device.type != "cpu":
        raise PtxError("tensors must live on the CPU")
    else:
        ptr, item, ok = x.data_ptr(), x.element_size(), True
        strides = [s * item for s in x.stride()]
    if any(s < 0 for s in strides):
        raise PtxError("negative strides are not supported")
    return ptr, 0 if 0 in x.shape else sum((n - 1) * s for n, s in zip(x.shape, strides)) + item, ok


def map_arguments(arrays, granule):
    """Give every (name, array) a fake address range; overlapping arrays share one.
    -> {slot: Memory}, [address of each array]"""
    spans = sorted((host_memory(x) + (name, i) for i, (name, x) in enumerate(arrays)), key=lambda s: s[0])
    merged = []  # [low, high, writable, names, [(index, pointer)]]
    for ptr, n, ok, name, i in spans:
        if merged and n and ptr < merged[-1][1]:
            m = merged[-1]
            m[1:] = max(m[1], ptr + n), m[2] and ok, m[3] + [name], m[4] + [(i, ptr)]
        else:
            merged.append([ptr, ptr + n, ok, [name], [(i, ptr)]])
    regions, address = {}, [0] * len(arrays)
    for slot, (lo, hi, ok, names, members) in enumerate(merged, 1):
        lead = lo % 16  # views start at a multiple of 16 bytes
        size = max(16, -(-(hi - lo + lead) // 16) * 16)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(lo - lead))
        base = (slot << SLOT) + (1 << SLOT - 1) + lead
        regions[slot] = Memory("|".join(names), base, raw, lead, hi - lo, granule, writable=ok)
        for i, ptr in members:
            address[i] = base + ptr - lo
    return regions, address


# ---------------------------------------------------------------- 3. statistics


@dataclass
class Race:
    kind: str  # e.g. 'write-read': an unordered earlier and later access
    array: str  # argument name, or 'shared'
    offset: int  # byte offset of one affected granule
    first: str  # the two instructions
    second: str
    ctas: tuple
    warps: tuple
    count: int = 1  # granules affected, over all occurrences

    def __str__(self):
        return (
            f"{self.kind} race on {self.array}+{self.offset} (CTAs {self.ctas}, warps {self.warps}, "
            f"{self.count}x):\n    {self.first}\n    {self.second}"
        )


@dataclass
class Stats:
    """Dynamic counts. `total` and each entry of `per_cta` map a counter name to a number."""

    total: Counter = field(default_factory=Counter)
    per_cta: list = field(default_factory=list)  # indexed by linear CTA id (x fastest)
    ops: Counter = field(default_factory=Counter)  # full opcode -> warp-instructions
    classes: Counter = field(default_factory=Counter)  # opcode class -> warp-instructions
    unique: dict = field(default_factory=dict)  # argument -> (bytes read, bytes written), distinct
    access: dict = field(default_factory=dict)  # (PTX line, space) -> traffic of one instruction
    races: list = field(default_factory=list)  # within a CTA
    cta_races: list = field(default_factory=list)  # between CTAs
    uninit: Counter = field(default_factory=Counter)  # instruction -> lanes that read unwritten shared memory

    instructions = property(lambda s: s.total["instructions"])
    mma = property(lambda s: s.classes["mma"])
    mma_flops = property(lambda s: s.total["mma flops"])
    barriers = property(lambda s: s.total["barriers"])
    global_load_bytes = property(lambda s: s.total["ld.global bytes"])
    global_store_bytes = property(lambda s: s.total["st.global bytes"])
    cp_async_bytes = property(lambda s: s.total["cp.async bytes"])
    uninit_reads = property(lambda s: sum(s.uninit.values()))

    @property
    def sectors_per_ideal(self):
        """32-byte sectors touched over the fewest possible; 1.0 is perfectly coalesced."""
        return self.total["global sectors"] / max(1, self.total["global sectors ideal"])

    @property
    def shared_conflicts(self):
        """Extra shared-memory wavefronts caused by bank conflicts."""
        return self.total["shared wavefronts"] - self.total["shared wavefronts ideal"]

    def __str__(self):
        out = [f"{self.instructions} warp-instructions in {len(self.per_cta)} CTAs"]
        out += [f"  {k:26s} {v}" for k, v in sorted(self.total.items()) if k != "instructions"]
        out += [f"unique bytes of {k}: read {r}, written {w}" for k, (r, w) in self.unique.items()]
        out += [
            f"sectors / ideal {self.sectors_per_ideal:.2f}, bank-conflict wavefronts {self.shared_conflicts}"
        ]
        for title, items in (("races", self.races), ("races between CTAs", self.cta_races)):
            out += [f"{title}: {len(items)}"] + [f"  {r}" for r in items[:10]]
        out += [f"unwritten shared memory read by {n} lanes: {k}" for k, n in self.uninit.items()]
        return "\n".join(out)


# ---------------------------------------------------------------- 4. machine


class Run:
    """State of one launch that outlives a CTA."""

    def __init__(self, kernel, nctas, warps, check_uninit, shared_bytes):
        self.kernel, self.check_uninit, self.shared_bytes = kernel, check_uninit, shared_bytes
        self.stats = Stats(per_cta=[Counter() for _ in range(nctas)])
        self.order, self.cta_of, self.patterns, self.found = Order(nctas, warps), [0], {}, {}
        self.clock, self.regions, self.symbols, self.params = 0, {}, {}, np.zeros(0, U8)
        self.granule = {
            s: min(
                [4]
                + [
                    TYPES[i.t][1] // 8
                    for i in kernel.instrs  # narrowest element accessed
                    if i.op in ("ld", "st", "atom", "red") and i.space == s
                ]
            )
            for s in ("shared", "global")
        }

    def race(self, cta, kind, ins, mem, idx, st, old, bad):
        where = tuple(np.argwhere(bad)[0])
        st, idx = (np.broadcast_to(x, bad.shape)[where] for x in (st, idx))
        c1, w1, first = cta.id, None, "a cp.async that has not been waited for"
        if old is not None:
            o = int(old[where])
            c1, w1 = self.cta_of[o >> SEQ], o & WARP_MASK
            first = str(self.kernel.instrs[o >> WARP_BITS & (1 << PC_BITS) - 1])
        found = self.stats.races if c1 == cta.id else self.stats.cta_races
        key = (kind, first, ins.pc, mem.name, c1 == cta.id)
        if key in self.found:
            self.found[key].count += int(bad.sum())
        elif len(found) < 100:
            self.found[key] = Race(
                kind,
                mem.name,
                int(idx) * mem.granule - mem.lead,
                first,
                str(ins),
                (c1, cta.id),
                (w1, int(st) & WARP_MASK),
                int(bad.sum()),
            )
            found.append(self.found[key])

    def spans(self, cta, ins, space, a, size, write=False, align=None):
        """Resolve the addresses of the active lanes: yields (memory, subset of them, byte offsets)."""
        align = a.dtype.type((align or size) - 1)
        if np.bitwise_or.reduce(a) & align:
            self.fault(cta, ins, space, a[(a & align) != 0][0], size, "misaligned access")
        if space == "shared":
            if int(a.max()) + size > cta.smem.nbytes:
                self.fault(cta, ins, space, a.max(), size, "out-of-bounds access")
            yield cta.smem, ALL, a.astype(I64)
            return
        slots = a >> U64(SLOT)
        one = (slots == slots[0]).all()
        for slot in slots[:1] if one else np.unique(slots):  # almost always a single array
            sel, r = ALL if one else slots == slot, self.regions.get(int(slot))
            limit = r.nbytes - size if r else -1
            off = a[sel] - U64(r.base if r else 0)
            if limit < 0 or off.max() > limit:
                bad = a[sel] if limit < 0 else a[sel][off > limit]
                self.fault(cta, ins, space, bad[0], size, "out-of-bounds access")
            if write and not r.writable:
                self.fault(cta, ins, space, a[sel][0], size, "write to a read-only array")
            yield r, sel, off.view(I64) + r.lead

    def fault(self, cta, ins, space, a, size, what):
        r = cta.smem if space == "shared" else self.regions.get(int(a) >> SLOT)
        place = (
            f"offset {int(a) - r.base} of {r.name!r} ({r.nbytes} bytes)"
            if r
            else f"address {int(a):#x}, in no argument"
        )
        raise MemoryFault(f"{what}: {size} bytes at {place}, CTA {cta.id}; {ins}")

    def pattern(self, space, a, lanes, size, nlanes):
        """(warps, sectors or wavefronts, ideal) of one access; memoised on the relative addresses."""
        rel = a - (a[0] & ~a.dtype.type(127))
        key = (space, size, rel.tobytes(), None if lanes is ALL else lanes.tobytes())
        if key not in self.patterns:
            if len(self.patterns) > 20_000:
                self.patterns.clear()
            ids, rel = np.arange(nlanes)[lanes], rel.astype(I64)
            group = ids // (32 if space == "global" or size <= 4 else 128 // size)  # lanes per transaction
            units = ideal = 0
            for g in np.unique(group):
                u = np.unique(rel[group == g])
                if space == "global":
                    units += len(np.unique(u >> 5))
                    ideal += -(-len(u) * size // 32)
                else:
                    words = np.unique((u[:, None] >> 2) + np.arange(max(1, size // 4)))
                    units += int(np.bincount(words & 31).max())
                    ideal += 1
            self.patterns[key] = len(np.unique(ids // 32)), units, ideal
        return self.patterns[key]


class Group:
    """Warps executing in lockstep: their registers, program counters and pending cp.asyncs."""

    def __init__(self, run, cta, warp0, nwarps, special):
        self.run, self.cta, self.warp0, self.nwarps, self.n = run, cta, warp0, nwarps, 32 * nwarps
        self.kernel, n, blocks = run.kernel, self.n, run.kernel.blocks
        self.bank = {
            b: np.empty((k, n), bool if b == 1 else f"u{b // 8}") for b, k in run.kernel.nregs.items()
        }
        self.local = np.zeros((n, -(-run.kernel.sizes["local"] // 8) * 8), U8)
        tid = 32 * warp0 + np.arange(n)
        self.warp = (tid // 32).astype(I64)
        special = {**special, "%laneid": tid % 32, "%warpid": tid // 32, "%tid.x": tid}
        self.special = {k: np.broadcast_to(np.asarray(v, U32), (n,)).copy() for k, v in special.items()}
        decoder = Decoder(self)
        self.fast, self.slow, self.term = zip(*(decoder.block(i, b) for i, b in enumerate(blocks)))
        self.rank = np.array([b.rank for b in blocks] + [1 << 30])
        self.by_rank, self.end = np.argsort(self.rank), len(blocks)

    def reset(self, ctaid):
        for axis, v in zip("xyz", ctaid):
            self.special["%ctaid." + axis][:] = v
        for bank in self.bank.values():
            bank.fill(~bank.dtype.type(0))  # poison: NaN in every float type
        self.live, self.mask = np.ones(self.n, bool), None  # mask None: every lane is active
        self.uniform, self.pc, self.pcs = True, 0, np.zeros(self.n, I64)
        self.wait, self.waiting = np.zeros(self.nwarps, I64), False  # barrier id + 1 a warp waits at
        self.done, self.ip, self.slow_steps = False, 0, 0
        self.counts = [0] * self.end  # warps that executed each block
        self.copies, self.committed = [], np.zeros(self.n, I64)

    def ready(self):
        return not self.done and not (
            self.waiting and not (self.live & (np.repeat(self.wait, 32) == 0)).any()
        )

    def live_warps(self):
        return int(self.live.reshape(-1, 32).any(1).sum())

    def step(self, budget=None):
        """Run one basic block, or at most `budget` closures of it."""
        if not self.ip:
            if self.uniform:
                self.cur, self.code = self.pc, self.fast[self.pc]
                self.counts[self.pc] += self.nwarps if self.mask is None else self.live_warps()
            else:
                self.select()
                self.code = self.slow[self.cur]
                self.counts[self.cur] += int(self.mask.reshape(-1, 32).any(1).sum())
        stop = len(self.code) if budget is None else self.ip + budget
        for f in self.code[self.ip : stop]:
            f()
        self.ip = stop if stop < len(self.code) else 0
        if not self.ip:
            self.term[self.cur]()

    def select(self):
        """Diverged: each warp wants its lowest-ranked block; run one such block, rotating now and then."""
        r = np.where(self.live & (np.repeat(self.wait, 32) == 0), self.rank[self.pcs], 1 << 30)
        best = r.reshape(-1, 32).min(1)
        wanted = np.unique(best[best < 1 << 30])
        self.slow_steps += 1
        pick = wanted[self.slow_steps // 16 % len(wanted) if self.slow_steps % 16 == 0 else 0]
        self.cur = int(self.by_rank[pick])
        self.mask = (r == pick) & np.repeat(best == pick, 32)

    def goto(self, block):
        if self.uniform:
            self.pc = block
        else:
            self.pcs[self.mask] = block
            self.converge()

    def branch(self, p, taken, other):
        if not self.uniform:
            self.pcs[self.mask] = np.where(p, taken, other)[self.mask]
            return self.converge()
        q = p if self.mask is None else p[self.mask]
        if q.all():
            self.pc = taken
        elif not q.any():
            self.pc = other
        else:
            self.uniform, self.pcs = False, np.where(p, taken, other)

    def converge(self):
        pcs = self.pcs[self.live]
        if len(pcs) and not self.waiting and (pcs == pcs[0]).all():
            self.uniform, self.pc = True, int(pcs[0])
            self.mask = None if self.live.all() else self.live

    def exit(self, p=None, other=0):
        """Lanes that return (where p) leave; the rest go to block `other`."""
        active = self.live if self.uniform else self.mask
        if self.uniform:
            self.uniform, self.pcs = False, np.full(self.n, other)
        else:
            self.pcs[active] = other
        self.live = self.live & ~(active if p is None else active & p)
        self.done = not self.live.any()
        self.converge()
        self.cta.settle()

    def barrier(self, ins, bar, count, nxt):
        active = self.live if self.uniform else self.mask
        warps = np.flatnonzero(active.reshape(-1, 32).any(1))
        aligned = ins.op == "bar" or "aligned" in ins.mods
        if aligned and (active != self.live).reshape(-1, 32)[warps].any():
            raise BarrierError(f"warp reaches a barrier while diverged: {ins}")
        if count is None and self.uniform and len(self.cta.groups) == 1 and not self.cta.bars:
            self.pc = nxt  # everybody is here
            return self.cta.released()
        self.wait[warps], self.waiting = bar + 1, True
        self.goto(nxt)
        self.cta.arrive(bar, warps + self.warp0, count)

    def active(self, pred):
        """Lanes that execute: ALL, or an array of lane numbers."""
        m = self.mask
        if pred is not None:
            p = ~pred[0] if pred[1] else pred[0]
            m = p if m is None else m & p
        return ALL if m is None or m.all() else np.flatnonzero(m)

    # cp.async: copies are queued per lane and land at the wait that covers them

    def commit(self, pred=None):
        self.committed[self.active(pred)] += 1

    def wait_copies(self, n, pred=None):
        lanes, keep, complete = self.active(pred), [], np.zeros(self.n, I64)
        complete[lanes] = self.committed[lanes] - n  # groups below this number
        for c in self.copies:
            done = c.group < complete[c.lanes]
            if done.all():
                c.land(self.cta)
            elif done.any():
                c.subset(done).land(self.cta)
                keep.append(c.subset(~done))
            else:
                keep.append(c)
        self.copies = keep


@dataclass
class Copy:
    """Lanes of one cp.async instruction that have not landed yet."""

    lanes: np.ndarray
    group: np.ndarray  # commit group, per lane
    words: np.ndarray  # destination, 4-byte index
    granules: np.ndarray
    data: np.ndarray
    pcw: np.ndarray  # pc and warp, as in a stamp

    def subset(self, sel):
        return Copy(*(getattr(self, f)[sel] for f in self.__dataclass_fields__))

    def land(self, cta):
        cta.inflight -= len(self.lanes)
        cta.smem.shadow.busy[self.granules] = 0
        cta.smem.shadow.w[self.granules] = (self.pcw + cta.now)[:, None]
        cta.smem.views[4][self.words] = self.data


class CTA:
    """One thread block: shared memory, barriers and the schedule of its groups."""

    def __init__(self, run, warps, special, rng):
        self.run, self.rng = run, rng
        size = -(-max(run.shared_bytes, 16) // 16) * 16
        self.smem = Memory("shared", 0, np.zeros(size, U8), 0, run.shared_bytes, run.granule["shared"], warps)
        self.groups = (
            [Group(run, self, w, 1, special) for w in range(warps)]
            if rng is not None
            else [Group(run, self, 0, warps, special)]
        )

    def start(self, cta_id, ctaid):
        self.id, self.seq, self.clk, self.inflight, self.steps = cta_id, len(self.run.cta_of), 0, 0, 0
        self.run.cta_of.append(cta_id)
        self.counts, self.bars, self.base = self.run.stats.per_cta[cta_id], {}, self.seq << SEQ
        self.tick()
        self.bar = self.now
        self.smem.views[1].fill(0xFF)  # poison: NaN in every float type
        self.smem.shadow.busy.fill(0)
        for g in self.groups:
            g.reset(ctaid)

    def tick(self):
        self.clk += 1
        self.now = self.base | self.clk << CLK

    def released(self):
        """A barrier of the whole CTA completed."""
        self.tick()
        self.bar = self.now
        self.counts["barriers"] += 1

    def arrive(self, bar, warps, count):
        self.bars.setdefault(bar, (set(), count))[0].update(int(w) for w in warps)
        self.settle()

    def settle(self):
        """Complete every barrier that has all its warps."""
        live = sum(g.live_warps() for g in self.groups)
        for bar, (arrived, count) in list(self.bars.items()):
            if len(arrived) >= (live if count is None else count // 32):
                del self.bars[bar]
                if len(arrived) >= live:
                    self.released()
                for g in self.groups:
                    g.wait[g.wait == bar + 1] = 0
                    g.waiting = bool(g.wait.any())
                    if not g.uniform:
                        g.converge()

    def run_for(self, quantum, max_steps):
        """Run until done (True) or for `quantum` steps (False)."""
        end = self.steps + quantum if quantum else max_steps + 1
        while self.steps < end:
            ready = [g for g in self.groups if g.ready()]
            if not ready:
                if all(g.done for g in self.groups):
                    self.finish()
                    return True
                raise BarrierError(
                    f"CTA {self.id} is stuck: barriers {sorted(self.bars)} wait for more warps"
                )
            if self.rng is None:
                ready[0].step()
            else:
                self.rng.choice(ready).step(self.rng.choice((1, 3, 10, 30, 100, 1000)))
            self.steps += 1
            if self.steps > max_steps:
                raise PtxError(
                    f"CTA {self.id} ran {max_steps} blocks without ending: it may wait for something "
                    "that never comes (for waits between CTAs, raise `resident`)"
                )
        return False

    def finish(self):
        c, st = self.counts, self.run.stats
        for g in self.groups:
            c["cp.async never waited for"] += sum(len(x.lanes) for x in g.copies)
            for b, n in zip(self.run.kernel.blocks, g.counts):
                for (opcode, klass), k in b.ops.items() if n else ():
                    st.ops[opcode] += k * n
                    st.classes[klass] += k * n
                    c[klass] += k * n
                    c["instructions"] += k * n
        for k in [k for k, v in c.items() if not v]:
            del c[k]
        st.total.update(c)
        self.run.order.seen.pop(self.seq, None)


class Access:
    """Bookkeeping common to memory instructions: traffic, coalescing, race stamps."""

    def __init__(self, g, ins, size, space, name):
        self.g, self.run, self.ins, self.size, self.space, self.name = (
            g,
            g.run,
            ins,
            size,
            space,
            name + " bytes",
        )
        self.unit = "global sectors" if space == "global" else "shared wavefronts"
        self.row = g.run.stats.access.setdefault(
            (ins.line, space),
            dict(text=str(ins), requests=0, bytes=0, unit=self.unit.split()[1], touched=0, ideal=0),
        )
        self.pcw = (ins.pc << WARP_BITS) + g.warp
        granule = g.run.granule[space]
        self.steps, self.bits = np.arange(max(1, size // granule)), granule.bit_length() - 1

    def count(self, a, lanes, nbytes=None):
        warps, touched, ideal = self.run.pattern(self.space, a, lanes, self.size, self.g.n)
        c, row, nbytes = self.g.cta.counts, self.row, len(a) * self.size if nbytes is None else nbytes
        c[self.name] += nbytes
        c[self.unit] += touched
        c[self.unit + " ideal"] += ideal
        row["requests"] += warps
        row["bytes"] += nbytes
        row["touched"] += touched
        row["ideal"] += ideal

    def spans(self, a, size=None, write=False):
        return self.run.spans(self.g.cta, self.ins, self.space, a, size or self.size, write, self.size)

    def stamp(self, lanes, sel=ALL):
        return (self.pcw[lanes][sel] + self.g.cta.now)[:, None]

    def granules(self, off):
        return (off >> self.bits)[:, None] + self.steps

    def read(self, mem, sel, off, lanes, strong=False):
        mem.shadow.read(
            self.run, self.g.cta, self.ins, mem, self.granules(off), self.stamp(lanes, sel), strong
        )

    def write(self, mem, sel, off, lanes, same=None, strong=False):
        mem.shadow.write(
            self.run, self.g.cta, self.ins, mem, self.granules(off), self.stamp(lanes, sel), same, strong
        )


# ---------------------------------------------------------------- 5. semantics


def widen(u16):
    """bfloat16 bits -> float32."""
    return (u16.astype(U32) << U32(16)).view(F32)


def to_bf16(x, mode="rn"):
    """float32 or float64 -> bfloat16 bits, rounded once."""
    x = np.ascontiguousarray(x if x.dtype == F64 else x.astype(F32))
    bits, drop = (U64, 45) if x.dtype == F64 else (U32, 16)
    u = x.view(bits)
    if mode == "rn":
        u = u + (bits((1 << drop - 1) - 1) + ((u >> bits(drop)) & bits(1)))
    u = (u >> bits(drop)) << bits(drop)
    return np.where(np.isnan(x), U16(0x7FFF), (u.view(x.dtype).astype(F32).view(U32) >> U32(16)).astype(U16))


def directed(x, dtype, mode):
    """float64 -> dtype, rounding toward zero (rz), down (rm) or up (rp)."""
    y = x.astype(dtype)
    over = {"rz": np.abs(y) > np.abs(x), "rm": y > x, "rp": y < x}[mode]
    return np.where(over, np.nextafter(y, dtype({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])), y)


def flush(x, t):
    """Subnormal numbers of type t -> signed zero."""
    return np.where(
        np.abs(x) < (6.1035e-05 if t[:3] == "f16" else 1.1754943e-38), np.copysign(x.dtype.type(0), x), x
    )


def to_int(x, dtype):
    """Rounded float -> integer, saturating; NaN gives 0."""
    info, x = np.iinfo(dtype), np.where(np.isnan(x), 0, x).astype(F64)
    lo, hi = x <= float(info.min), x >= float(info.max)
    y = np.where(lo | hi, 0, x).astype(U64 if dtype == U64 else I64).astype(dtype)
    return np.where(lo, dtype(info.min), np.where(hi, dtype(info.max), y))


def mul_high(a, b):
    """High half of a 64-bit product."""
    if a.dtype == I64:
        h = mul_high(a.view(U64), b.view(U64)).view(I64)
        return h - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    lo, half = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = a & lo, a >> half, b & lo, b >> half
    mid = ah * bl + (al * bl >> half)
    return ah * bh + (mid >> half) + ((al * bh + (mid & lo)) >> half)


INT = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.absolute,
}
FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.absolute,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "fma": lambda a, b, c: np.multiply(a, b, dtype=F64) + c,
    "copysign": lambda a, b: np.copysign(b, a),
}
CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
FCMP = dict(
    CMP,
    ne=lambda a, b: (a < b) | (a > b),
    equ=lambda a, b: ~((a < b) | (a > b)),
    neu=np.not_equal,
    ltu=lambda a, b: ~(a >= b),
    leu=lambda a, b: ~(a > b),
    gtu=lambda a, b: ~(a <= b),
    geu=lambda a, b: ~(a < b),
    num=lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    nan=lambda a, b: np.isnan(a) | np.isnan(b),
)
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ATOM = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda o, b: b,
    "min": np.minimum,
    "max": np.maximum,
    "inc": lambda o, b: np.where(o >= b, 0, o + 1).astype(o.dtype),
    "dec": lambda o, b: np.where((o == 0) | (o > b), b, o - 1).astype(o.dtype),
}
MASKED_HERE = {"ld", "st", "atom", "red", "cp", "ldmatrix", "call", "bar", "barrier"}
NO_EFFECT = {
    "membar",
    "fence",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "createpolicy",
    "discard",
    "applypriority",
}

MODS = {
    *TYPES,
    *SPACES,
    *FCMP,
    *ROUND,
    *INT,
    *ATOM,
    *(  # modifiers that are modelled, or change no result
        "rn rz rm rp rna ftz sat approx full noftz NaN lo hi wide cc l r wrap clamp shiftamt to uni v2 v4 up down bfly idx "
        "sync aligned warp arrive cta gpu sys weak volatile relaxed acquire release acq_rel nc ca cg cs lu cv wb wt cas "
        "async commit_group wait_group wait_all m8n8 x1 x2 x4 trans row col satfinite ballot any all"
    ).split(),
}
SIMPLE = {}  # opcode -> (function of the instruction and its operands, operand types)


def simple(op, types):
    """Register an instruction that is a plain function; 't' stands for the instruction's type."""

    def register(f):
        SIMPLE[op] = f, types.split()
        return f

    return register


@simple("div", "t t t")
def int_div(ins, a, b):
    one, zero = a.dtype.type(1), a.dtype.type(0)
    q = np.where(b == 0, zero, a // np.where(b == 0, one, b))
    q = q + ((q * b != a) & ((a < 0) != (b < 0)))  # floor -> truncation
    return np.where(b == 0, ~zero, q)


@simple("rem", "t t t")
def int_rem(ins, a, b):
    return np.where(b == 0, a, a - int_div(ins, a, b) * b)


@simple("shf", "b32 b32 b32 b32")
def funnel_shift(ins, a, b, c):
    n = (c & U32(31) if "wrap" in ins.mods else np.minimum(c, U32(32))).astype(U64)
    both = b.astype(U64) << U64(32) | a
    return (both << n) >> U64(32) if "l" in ins.mods else both >> n


@simple("bfe", "t t u32 u32")
def bit_extract(ins, a, pos, n):
    wide = I64 if a.dtype.kind == "i" else U64
    pos, n = np.minimum(pos & U32(255), U32(63)).astype(wide), (n & U32(255)).astype(wide)
    x = np.where(pos < 8 * a.itemsize, np.right_shift(a.astype(wide), pos), a.astype(wide) >> wide(63))
    up = np.where(n < 64, wide(64) - n, wide(0))
    return np.where(n == 0, wide(0), np.right_shift(np.left_shift(x, up), up))


@simple("bfi", "t t t u32 u32")
def bit_insert(ins, a, b, pos, n):
    pos, n = (np.minimum(x & U32(255), U32(64)).astype(U64) for x in (pos, n))
    hole = np.where(n < 64, (U64(1) << np.minimum(n, U64(63))) - U64(1), ~U64(0)) << pos
    return b.astype(U64) & ~hole | (a.astype(U64) << pos) & hole


@simple("lop3", "b32 b32 b32 b32 u32")
def logic3(ins, a, b, c, lut):
    out = np.zeros_like(a)
    for i in range(8):
        if lut[0] >> U32(i) & U32(1):
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


@simple("prmt", "b32 b32 b32 b32")
def permute_bytes(ins, a, b, sel):
    if ins.mods != ["b32"]:
        raise NotImplementedError(f"form not covered: {ins}")
    both, out = b.astype(U64) << U64(32) | a, np.zeros_like(a)
    for i in range(4):
        s = sel >> U32(4 * i)
        byte = (both >> (U64(8) * (s & U32(7)))).astype(U32) & U32(255)
        out |= np.where(s & U32(8), (byte >> U32(7)) * U32(255), byte) << U32(8 * i)
    return out


@simple("popc", "u32 t")
def population(ins, a):
    return np.bitwise_count(a)


@simple("bfind", "u32 t")
def top_bit(ins, a):
    """Index of the highest set bit, -1 if none."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a).view(f"u{a.itemsize}")
    hi, lo = (
        np.frexp((a >> a.dtype.type(16)).astype(F64))[1],
        np.frexp((a & a.dtype.type(0xFFFF)).astype(F64))[1],
    )
    if a.itemsize == 8:  # frexp of the upper 48 bits is still exact
        hi = np.frexp((a >> U64(16)).astype(F64))[1]
    top = np.where(a >> a.dtype.type(16) != 0, hi + 16, lo) - 1
    return np.where(top < 0, -1, 8 * a.itemsize - 1 - top) if "shiftamt" in ins.mods else top


@simple("clz", "u32 t")
def leading_zeros(ins, a):
    return 8 * a.itemsize - 1 - top_bit(ins, a)


@simple("brev", "t t")
def reverse_bits(ins, a):
    b = np.unpackbits(np.ascontiguousarray(a).view(U8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]


class Decoder:
    """Turns instructions into closures over the registers of one group."""

    def __init__(self, g):
        self.g, self.n, self.run, self.kernel = g, g.n, g.run, g.kernel
        self.consts, self.rows, self.carry = {}, [], np.zeros(g.n, U64)

    def block(self, i, b):
        """-> (closures when all live lanes are active, closures under g.mask, terminator)."""
        body = self.kernel.instrs[b.start : b.end]
        last = body.pop() if body[-1].ends else None
        fast, slow = [], []
        while body:
            count = self.independent_mmas(body)
            decoded = [self.decode(x) for x in body[:count]]
            slow += [s for _, s in decoded if s]
            fast += [self.mma(body[:count])] if count > 1 else [f for f, _ in decoded if f]
            del body[:count]
        return fast, slow, self.terminator(last, i + 1)

    def decode(self, ins):
        self.rows = []  # registers the instruction writes
        f = getattr(self, "op_" + ins.op, None)
        if ins.op in NO_EFFECT:
            return None, None
        if ins.op in SIMPLE and ins.t not in FLOATS:
            f = partial(self.function, *SIMPLE[ins.op])
        if f is None:
            raise NotImplementedError(f"instruction not covered: {ins}")
        odd = [m for m in ins.mods if m not in MODS and not re.match(r".*::|m\d+n\d+k\d+$", m)]
        if (
            odd
            or ("sat" in ins.mods and ins.op != "cvt" and ins.t not in FLOATS)
            or (ins.t == "f64" and ins.op != "cvt" and {"rz", "rm", "rp"} & set(ins.mods))
        ):
            raise NotImplementedError(f"modifier not covered: {ins}")
        try:
            f = f(ins)
        except (KeyError, IndexError, ValueError, StopIteration, AttributeError, TypeError) as e:
            raise NotImplementedError(f"form not covered ({e!r}): {ins}") from e
        if f is None:
            return None, None
        fast, slow, pred = f, f, self.pred(ins)
        if ins.op not in MASKED_HERE:
            slow = self.guard(f, self.rows, pred)
            fast = slow if pred else f
        return fast, self.whole_warps(ins, slow) if "sync" in ins.mods else slow

    def guard(self, f, rows, pred):
        """Run f, then restore what it wrote in the lanes that are not active."""
        g, rows = self.g, list(rows)

        def run():
            on = g.mask if pred is None else ~pred[0] if pred[1] else pred[0].copy()
            if pred is not None and g.mask is not None:
                on &= g.mask
            keep = [r.copy() for r in rows]
            f()
            if on is not None:
                for r, k in zip(rows, keep):
                    np.copyto(r, k, where=~on)

        return run

    def whole_warps(self, ins, f):
        g = self.g

        def run():
            m = g.mask.reshape(-1, 32)
            some = m.any(1)
            if (m != g.live.reshape(-1, 32))[some].any():
                raise BarrierError(f"warp-wide instruction reached by a diverged warp: {ins}")
            f()

        return run

    def terminator(self, ins, nxt):
        g = self.g
        if ins is None:
            return partial(g.goto, nxt) if nxt < len(self.kernel.blocks) else g.exit
        pred = self.pred(ins)
        take = (lambda: ~pred[0]) if pred and pred[1] else (lambda: pred[0])
        if ins.op == "bra":
            target = self.kernel.target(ins)
            return (lambda: g.branch(take(), target, nxt)) if pred else partial(g.goto, target)
        if ins.op in ("ret", "exit"):
            return (lambda: g.exit(take(), nxt)) if pred else g.exit
        if ins.op == "trap":

            def trap():
                if g.active(pred) is ALL or len(g.active(pred)):
                    raise PtxError(f"trap in CTA {g.cta.id}: {ins}")
                g.goto(nxt)

            return trap
        if pred or "red" in ins.mods:
            raise NotImplementedError(f"form not covered: {ins}")
        nums = [self.src(a, "u32") for a in ins.args]
        return lambda: g.barrier(ins, int(nums[0][0]), int(nums[1][0]) if len(nums) > 1 else None, nxt)

    # -- operands

    def pred(self, ins):
        return (self.src(ins.pred[0], "pred"), ins.pred[1]) if ins.pred else None

    def src(self, o, t):
        """The operand as an array of storage type t (bf16 as bits), valid for the whole launch."""
        dtype, bits = TYPES[t]
        if o in self.kernel.regs:
            have, row = self.kernel.regs[o]
            row = self.g.bank[have][row]
            if have < bits:
                raise ValueError(f"{o} is narrower than {t}")
            return row if have == 1 else row.view(dtype)[:: have // bits if have > bits else 1]
        if o in self.g.special:
            return self.g.special[o]
        if (o, t) not in self.consts:
            v = self.number(o)
            self.consts[o, t] = (
                np.full(self.n, bool(v))
                if bits == 1
                else np.full(self.n, v & (1 << bits) - 1, f"u{bits // 8}").view(dtype)
            )
        return self.consts[o, t]

    def number(self, o):
        """An immediate or the address of a symbol (plus an offset), as an integer or float bits."""
        m = re.match(r"([\w$%]+)\s*\+\s*(-?\w+)$", o)
        name, off = (m[1], int(m[2], 0)) if m else (o, 0)
        for table in (self.kernel.symbols["shared"], self.kernel.symbols["local"], self.run.symbols):
            if name in table:
                return table[name] + off
        m = re.match(r"0[fFdD]([0-9a-fA-F]+)$", o)
        return int(m[1], 16) if m else int(o.rstrip("uU"), 0)

    def dst(self, o, t):
        """Where a result of type t goes; a wider register is written whole, extended."""
        dtype, bits = TYPES[t]
        if o == "_":
            return np.empty(self.n, dtype)
        have, row = self.kernel.regs[o]
        row = self.g.bank[have][row]
        self.rows.append(row)
        return row.view(dtype if have == bits else f"{'i' if t[0] == 's' else 'u'}{have // 8}")

    def reader(self, o, t, ftz=False):
        """A function giving the operand as numbers (bf16 as float32)."""
        a = self.src(o, t)
        get = (lambda: widen(a)) if t in ("bf16", "bf16x2") else (lambda: a)
        return (lambda: flush(get(), t)) if ftz and t in FLOATS else get

    def writer(self, o, t, mods=()):
        """A function storing numbers into the operand, with the rounding and modifiers given."""
        d = self.dst(o, t)
        mode = next((m for m in mods if m in ("rz", "rm", "rp")), None)

        def put(x):
            if "sat" in mods:
                x = np.clip(np.where(np.isnan(x), 0, x), 0, 1)
            if mode and t not in ("bf16", "bf16x2"):
                x = directed(x.astype(F64), TYPES[t][0], mode)
            if "ftz" in mods:
                x = flush(x, t)
            d[...] = to_bf16(x, mode or "rn") if t in ("bf16", "bf16x2") else x

        return put

    def address(self, o):
        """'[%rd1+16]' -> a function giving the addresses of all lanes."""
        m = re.match(r"\[\s*([%\w$@]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$", o)
        name, off = m[1], int(m[3] or "0", 0) * (-1 if m[2] == "-" else 1)
        bits = self.kernel.regs.get(name, (32 if name in self.kernel.symbols["shared"] else 64,))[0]
        a = self.src(name, f"u{bits}")
        c = np.full(self.n, off & (1 << bits) - 1, a.dtype)
        return (lambda: a + c) if off else (lambda: a)

    # -- arithmetic

    def function(self, f, types, ins):  # SIMPLE instructions and most of cvt
        """d = f(ins, operands)."""
        types = [ins.t if t == "t" else t for t in types]
        args = [self.src(a, t) for a, t in zip(ins.args[1:], types[1:], strict=True)]
        d = self.dst(ins.args[0], types[0])

        def run():
            d[...] = f(ins, *args)

        return run

    def arith(self, ins, op=None):
        op, t, mods = op or ins.op, ins.t, set(ins.mods)
        if "cc" in mods:
            return self.carried(ins)
        if t not in FLOATS:
            f = np.logical_not if (op, t) == ("not", "pred") else INT[op]
            return partial(f, *[self.src(a, t) for a in ins.args[1:]], out=self.dst(ins.args[0], t))
        f = {"min": np.minimum, "max": np.maximum}[op] if "NaN" in mods else FLOAT[op]
        exact = mods & {"rz", "rm", "rp"} or (op == "fma" and t != "f64")  # compute in float64, round once
        if (
            isinstance(f, np.ufunc)
            and t not in ("bf16", "bf16x2")
            and not mods & {"ftz", "sat"}
            and not exact
        ):
            return partial(f, *[self.src(a, t) for a in ins.args[1:]], out=self.dst(ins.args[0], t))
        get = [self.reader(a, t, "ftz" in mods) for a in ins.args[1:]]
        put = self.writer(ins.args[0], t, mods)
        if exact:
            return lambda: put(f(*[x().astype(F64) for x in get]))
        return lambda: put(f(*[x() for x in get]))

    op_add = op_sub = op_min = op_max = op_and = op_or = op_xor = op_not = op_neg = op_abs = op_div = arith
    op_ex2 = op_lg2 = op_rcp = op_sqrt = op_rsqrt = op_sin = op_cos = op_tanh = op_fma = op_copysign = arith

    def op_mul(self, ins):
        """mul and mad."""
        t, mad = ins.t, ins.op == "mad"
        if t in FLOATS:
            return self.arith(ins, "fma" if mad else "mul")
        if "cc" in ins.mods:
            return self.carried(ins)
        bits = TYPES[t][1]
        wide = f"{t[0]}{2 * bits}" if bits < 64 else t
        out = wide if "wide" in ins.mods else t
        args = [self.src(a, out if i == 2 else t) for i, a in enumerate(ins.args[1:])]
        d = self.dst(ins.args[0], out)
        if "wide" in ins.mods:
            mul = partial(np.multiply, dtype=TYPES[wide][0])
        elif "hi" not in ins.mods:
            mul = np.multiply
        elif bits == 64:
            mul = mul_high
        else:
            mul = lambda a, b: (np.multiply(a, b, dtype=TYPES[wide][0]) >> bits).astype(a.dtype)
        if not mad and isinstance(mul, np.ufunc):
            return partial(mul, *args, d)

        def run():
            x = mul(*args[:2])
            d[...] = x + args[2] if mad else x

        return run

    op_mad = op_mul

    def carried(self, ins):
        """32-bit add, sub and mad with carry in (addc, subc, madc) and carry out (.cc)."""
        if TYPES[ins.t][1] != 32:
            raise NotImplementedError(f"form not covered: {ins}")
        xs, d, cc, op = (
            [self.src(a, "u32") for a in ins.args[1:]],
            self.dst(ins.args[0], "u32"),
            self.carry,
            ins.op,
        )
        lo = U64(0xFFFFFFFF)

        def run():
            v = [x.astype(U64) for x in xs]
            if op.startswith("mad"):
                p = v[0] * v[1]
                s = (p >> U64(32) if "hi" in ins.mods else p & lo) + v[2]
            else:
                s = v[0] - v[1] if op.startswith("sub") else v[0] + v[1]
            if op.endswith("c"):
                s = s - cc if op == "subc" else s + cc
            d[...] = s & lo
            if "cc" in ins.mods:
                cc[...] = (s >> U64(32)) & U64(1)

        return run

    op_addc = op_subc = op_madc = carried

    def op_shl(self, ins):
        """shl and shr; counts beyond the width act like the width (or width - 1 with sign)."""
        f, t, bits = np.left_shift if ins.op == "shl" else np.right_shift, ins.t, TYPES[ins.t][1]
        a, n, d = self.src(ins.args[1], t), self.src(ins.args[2], "u32"), self.dst(ins.args[0], t)
        if ins.args[2] not in self.kernel.regs:
            return partial(f, a, np.minimum(n, bits).astype(a.dtype), d)

        def run():
            d[...] = f(a, np.minimum(n, U32(bits)).astype(a.dtype))

        return run

    op_shr = op_shl

    # -- predicates, moves, conversions

    def op_setp(self, ins):
        t, ftz = ins.t, "ftz" in ins.mods
        f = (FCMP if t in FLOATS else CMP)[next(m for m in ins.mods if m in FCMP)]
        join = next((INT[m] for m in ins.mods if m in ("and", "or", "xor")), None)
        if t in ("f16x2", "bf16x2"):
            raise NotImplementedError(f"form not covered: {ins}")
        outs = [self.dst(o, "pred") for o in ins.args[0].split("|")]
        if join is None and len(outs) == 1 and isinstance(f, np.ufunc) and t != "bf16" and not ftz:
            return partial(f, self.src(ins.args[1], t), self.src(ins.args[2], t), outs[0])
        a, b = (self.reader(x, t, ftz) for x in ins.args[1:3])
        extra, negate = (
            (self.src(ins.args[3].lstrip("!"), "pred"), ins.args[3][0] == "!") if join else (None, False)
        )

        def run():
            p = f(a(), b())
            results = (p, ~p)[: len(outs)]
            if join:
                results = [join(x, ~extra if negate else extra) for x in results]
            for d, x in zip(outs, results):
                d[...] = x

        return run

    def op_selp(self, ins):
        a, b, d = self.src(ins.args[1], ins.t), self.src(ins.args[2], ins.t), self.dst(ins.args[0], ins.t)
        p = self.src(ins.args[3], "pred")

        def run():
            d[...] = np.where(p, a, b)

        return run

    def op_mov(self, ins):
        to, frm, t = ins.args[0], ins.args[1], ins.t
        if "{" in to or "{" in frm:  # split or join a register, low part first
            parts = unpack(to if "{" in to else frm)
            bits = TYPES[t][1] // len(parts)
            whole = (
                (self.src(frm, t) if "{" in to else self.dst(to, t)).view(f"u{bits // 8}").reshape(self.n, -1)
            )
            pairs = [
                (self.dst(p, f"b{bits}"), whole[:, i])
                if "{" in to
                else (whole[:, i], self.src(p, f"b{bits}"))
                for i, p in enumerate(parts)
                if p != "_"
            ]

            def run():
                for d, s in pairs:
                    d[...] = s

            return run if len(pairs) > 1 else partial(np.copyto, *pairs[0])
        d = self.dst(to, t)
        if frm.startswith(("%clock", "%globaltimer")):

            def tick():
                self.run.clock += 1
                d[...] = self.run.clock

            return tick
        return partial(np.copyto, d, self.src(frm, t), casting="unsafe")

    op_cvta = op_mov  # one address space per kind of access

    def op_cvt(self, ins):
        (to, frm), mods = ins.types[-2:], set(ins.mods)
        if mods & {"relu", "e4m3x2", "e5m2x2", "ue8m0x2"}:
            raise NotImplementedError(f"form not covered: {ins}")
        if to in ("f16x2", "bf16x2") and frm == "f32":  # the first operand is the upper half
            put, hi, lo = (
                self.writer(ins.args[0], to, mods),
                self.src(ins.args[1], frm),
                self.src(ins.args[2], frm),
            )
            return lambda: put(np.stack([lo, hi], 1).ravel())
        whole, dtype = next((ROUND[m] for m in ins.mods if m in ROUND), None), TYPES[to][0]
        if to == "tf32":  # rna: nearest, ties away from zero
            return self.function(lambda _, a: (a + U32(0x1000)) & U32(0xFFFFE000), ["b32", "b32"], ins)
        if to in FLOATS:
            put, get = self.writer(ins.args[0], to, mods), self.reader(ins.args[1], frm, "ftz" in mods)
            if whole:
                return lambda: put(whole(get()))
            if frm in FLOATS:
                return lambda: put(get())
            via = F32 if to == "f32" and not mods & {"rz", "rm", "rp"} else F64
            return lambda: put(get().astype(via))
        if frm in FLOATS:
            get, d = self.reader(ins.args[1], frm, "ftz" in mods), self.dst(ins.args[0], to)

            def convert():
                d[...] = to_int((whole or np.trunc)(get()), dtype)

            return convert
        info = np.iinfo(dtype)
        if "sat" in mods:
            return self.function(
                lambda _, a: np.clip(a.astype(I64), info.min, info.max).astype(dtype), [to, frm], ins
            )
        return self.function(lambda _, a: a.astype(dtype), [to, frm], ins)

    # -- warp-wide

    def op_shfl(self, ins):
        mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
        out, *pout = ins.args[0].split("|")
        a, b, c = (self.src(x, "u32") for x in ins.args[1:4])
        d, p = self.dst(out, "b32"), self.dst(pout[0], "pred") if pout else None
        lane, base = np.arange(self.n) % 32, np.arange(self.n) // 32 * 32

        def source():
            step, clamp, seg = (x.astype(I64) for x in (b & U32(31), c & U32(31), c >> U32(8) & U32(31)))
            top = lane & seg | clamp & ~seg
            j = {
                "up": lane - step,
                "down": lane + step,
                "bfly": lane ^ step,
                "idx": lane & seg | step & ~seg,
            }[mode]
            ok = j >= top if mode == "up" else j <= top
            return base + np.where(ok, j, lane), ok

        fixed = None if {ins.args[2], ins.args[3]} & self.kernel.regs.keys() else source()

        def run():
            j, ok = fixed or source()
            d[...] = a[j]
            if p is not None:
                p[...] = ok

        return run

    def members(self):
        m = self.g.mask
        return np.ones((self.n // 32, 32), bool) if m is None else m.reshape(-1, 32)

    def op_vote(self, ins):
        """vote.sync and activemask."""
        arg = ins.args[1] if ins.op == "vote" else "1"
        p, negate, mods = self.src(arg.lstrip("!"), "pred"), arg[0] == "!", ins.mods
        ballot = ins.op == "activemask" or "ballot" in mods
        d = self.dst(ins.args[0], "b32" if ballot else "pred")

        def run():
            m, x = self.members(), (~p if negate else p).reshape(-1, 32)
            some, every = (x & m).any(1), (x | ~m).all(1)
            v = (
                ((x & m).astype(U64) << np.arange(32, dtype=U64)).sum(1)
                if ballot
                else some
                if "any" in mods
                else every
                if "all" in mods
                else every | ~some
            )
            d[...] = np.repeat(v, 32)

        return run

    op_activemask = op_vote

    def op_redux(self, ins):
        op = next(m for m in ins.mods if m in INT)
        a, d = self.src(ins.args[1], ins.t), self.dst(ins.args[0], ins.t)
        info = np.iinfo(a.dtype)
        unit = a.dtype.type(
            {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(op, 0)
        )

        def run():
            x = np.where(self.members(), a.reshape(-1, 32), unit)
            d[...] = np.repeat(INT[op].reduce(x, axis=1, dtype=a.dtype), 32)

        return run

    # mma fragments: lane = 4 * g + t. Register r of A holds row g + 8 * (r & 1) and, with E
    # elements to a register, columns E * t + e + 4 * E * (r >> 1); B and C likewise.

    def independent_mmas(self, body):
        """How many leading instructions can run as one: mmas of one kind that do not feed each other."""
        written, count = set(), 0
        for ins in body:
            if (ins.op, ins.mods, ins.pred) != ("mma", body[0].mods, None) or written & {
                r for a in ins.args for r in unpack(a)
            }:
                break
            written |= set(unpack(ins.args[0]))
            count += 1
        return max(count, 1)

    def op_mma(self, ins):
        return self.mma([ins])

    def mma(self, group):
        ins, g, n = group[0], self.g, len(group)
        M, N, K = map(
            int, re.match(r"m(\d+)n(\d+)k(\d+)$", next(m for m in ins.mods if m[0] == "m")).groups()
        )
        td, ta, tb, tc = ins.types
        if (
            "row" not in ins.mods
            or N != 8
            or (td, ta) != (tc, tb)
            or (td, ta)
            not in {
                ("f32", "f16"),
                ("f32", "bf16"),
                ("f16", "f16"),
                ("f32", "tf32"),
                ("s32", "s8"),
                ("s32", "u8"),
                ("f64", "f64"),
            }
        ):
            raise NotImplementedError(f"form not covered: {ins}")
        size = 64 if ta == "f64" else 32
        E, Ec = size // TYPES[ta][1], size // TYPES[td][1]  # elements to a register of A and B, of C and D
        H, Q, W = M // 8, K // (4 * E), self.n // 32
        bank = g.bank[size]
        D, A, B, C = (
            np.array([[self.kernel.regs[r][1] for r in unpack(i.args[k])] for i in group]) for k in range(4)
        )
        self.rows += [bank[r] for r in D.ravel()]

        def numbers(x, t):
            if t == "bf16":
                return widen(x.view(U16))
            if t == "tf32":  # the hardware ignores the low 13 bits
                return (x & U32(0xFFFFE000)).view(F32)
            return x.view(TYPES[t][0]).astype(F64 if t == "f64" else F32, copy=False)

        def run():
            a = numbers(bank.take(A, 0), ta).reshape(n, Q, H, W, 8, 4, E).transpose(0, 3, 2, 4, 1, 5, 6)
            b = numbers(bank.take(B, 0), ta).reshape(n, Q, W, 8, 4, E).transpose(0, 2, 1, 4, 5, 3)
            c = (
                bank.take(C, 0)
                .view(TYPES[td][0])
                .reshape(n, H, 2 // Ec, W, 8, 4, Ec)
                .transpose(0, 3, 1, 4, 5, 2, 6)
            )
            d = np.matmul(a.reshape(n, W, M, K), b.reshape(n, W, K, 8))
            d = d.astype(c.dtype if td == "s32" else d.dtype, copy=False) + c.reshape(n, W, M, 8)
            d = (
                d.astype(c.dtype, copy=False)
                .reshape(n, W, H, 8, 4, 2 // Ec, Ec)
                .transpose(0, 2, 5, 1, 3, 4, 6)
            )
            bank[D] = np.ascontiguousarray(d).view(bank.dtype).reshape(n, -1, self.n)
            g.cta.counts["mma flops"] += 2 * M * N * K * n * int(self.members().any(1).sum())

        return run

    def op_ldmatrix(self, ins):
        g, outs = self.g, [self.dst(o, "b32") for o in unpack(ins.args[0])]
        num, lane, addr = len(outs), np.arange(32), self.address(ins.args[1])
        at = Access(g, ins, 16, "shared", "ld.shared")
        if not {"m8n8", f"x{num}", "b16"} <= set(ins.mods):
            raise NotImplementedError(f"form not covered: {ins}")
        giver = (np.arange(self.n) % 32 < 8 * num, False)  # lanes whose address is used
        i = 8 * np.arange(num)[:, None]

        def run():
            lanes = g.active(giver)
            a = addr()[lanes]
            at.count(a, lanes)
            for mem, sel, off in at.spans(a):
                at.read(mem, sel, off, lanes)
            warps = np.flatnonzero(self.members().any(1))
            a = addr().reshape(-1, 32)[warps].astype(I64)
            if "trans" in ins.mods:
                half, col, row = g.cta.smem.views[2], 2 * (lane // 4), 2 * (lane % 4)
                lo, hi = (half.take((a[:, i + row + k] + col) >> 1) for k in (0, 1))
                got = lo | hi.astype(U32) << U32(16)
            else:
                got = g.cta.smem.views[4].take((a[:, i + lane // 4] + 4 * (lane % 4)) >> 2)
            for k, d in enumerate(outs):
                d.reshape(-1, 32)[warps] = got[:, k]

        return run

    # -- memory

    def strong(self, ins):
        return bool({"volatile", "relaxed", "acquire", "release"} & set(ins.mods))

    def synchronise(self, ins, a, lanes):
        """Release/acquire of a few addresses orders this CTA against others (see Order)."""
        acquire, release = (bool({"acq_rel", m} & set(ins.mods)) for m in ("acquire", "release"))
        if (acquire or release) and ins.space == "global" and len(a) <= 4:
            self.run.order.sync(self.g.cta, a.tolist(), self.g.warp[lanes].tolist(), acquire, release)

    def op_ld(self, ins):
        g, (dtype, bits), pred, addr = self.g, TYPES[ins.t], self.pred(ins), self.address(ins.args[1])
        outs, width, every = [self.dst(o, ins.t) for o in unpack(ins.args[0])], bits // 8, np.arange(self.n)
        if ins.space == "param":
            return self.load_param(outs, addr, dtype, width, pred)
        if ins.space == "local":
            return self.local(ins, outs, addr, pred)
        strong, shift, part = self.strong(ins), width.bit_length() - 1, np.arange(ins.vec)
        at = Access(g, ins, width * ins.vec, ins.space, ins.klass)

        def run():
            lanes = g.active(pred)
            a = addr()[lanes]
            if not a.size:
                return
            at.count(a, lanes)
            self.synchronise(ins, a, lanes)
            for mem, sel, off in at.spans(a):
                at.read(mem, sel, off, lanes, strong)
                data = mem.views[width].take((off >> shift)[:, None] + part).view(dtype)
                to = lanes if sel is ALL else every[lanes][sel]
                for i, d in enumerate(outs):
                    d[to] = data[:, i]

        return run

    def load_param(self, outs, addr, dtype, width, pred):
        part = np.arange(width * len(outs))

        def run():
            data = self.run.params.take(addr().astype(I64)[:, None] + part, mode="clip").view(dtype)
            for i, d in enumerate(outs):
                d[...] = data[:, i]

        return self.guard(run, self.rows, pred)

    def local(self, ins, regs, addr, pred):
        g, size, every = self.g, TYPES[ins.t][1] // 8 * len(regs), np.arange(self.n)

        def run():
            lanes = g.active(pred)
            off = addr()[lanes].astype(I64)
            if not off.size:
                return
            if off.min() < 0 or off.max() + size > g.local.shape[1]:
                raise MemoryFault(f"local access out of bounds; {ins}")
            where = every[lanes][:, None], off[:, None] + np.arange(size)
            if ins.op == "st":
                g.local[where] = np.stack([r[lanes] for r in regs], 1).view(U8)
                return
            data = np.ascontiguousarray(g.local[where]).view(TYPES[ins.t][0])
            for i, d in enumerate(regs):
                d[lanes] = data[:, i]

        return run

    def op_st(self, ins):
        if ins.space == "param":
            return None  # argument of a call; see op_call
        g, width, pred, addr = self.g, TYPES[ins.t][1] // 8, self.pred(ins), self.address(ins.args[0])
        regs = [self.src(o, f"b{8 * width}") for o in unpack(ins.args[1])]
        if ins.space == "local":
            return self.local(ins, regs, addr, pred)
        strong, shift, part = self.strong(ins), width.bit_length() - 1, np.arange(ins.vec)
        at = Access(g, ins, width * ins.vec, ins.space, ins.klass)

        def run():
            lanes = g.active(pred)
            a = addr()[lanes]
            if not a.size:
                return
            at.count(a, lanes)
            self.synchronise(ins, a, lanes)
            values = np.stack([r[lanes] for r in regs], 1)
            for mem, sel, off in at.spans(a, write=True):
                idx, view, data = (off >> shift)[:, None] + part, mem.views[width], values[sel]
                at.write(mem, sel, off, lanes, lambda: view.take(idx) == data, strong)
                view[idx] = data
                clash = (view.take(idx) != data).any(1, keepdims=True)  # lanes of this very store disagree
                if clash.any():
                    st = np.broadcast_to(at.stamp(lanes, sel), clash.shape)
                    self.run.race(g.cta, "write-write", ins, mem, at.granules(off)[:, :1], st, st, clash)

        return run

    def op_atom(self, ins):
        g, (dtype, bits), ret = self.g, TYPES[ins.t], ins.op == "atom"
        op, raw = next(m for m in ins.mods if m in ATOM or m == "cas"), f"u{bits // 8}"
        if ins.vec > 1 or (op in ("min", "max") and ins.t in FLOATS):
            raise NotImplementedError(f"form not covered: {ins}")
        d = self.dst(ins.args[0], f"b{bits}") if ret else None
        addr, vals = self.address(ins.args[ret]), [self.src(x, f"b{bits}") for x in ins.args[1 + ret :]]
        pred, at = self.pred(ins), Access(g, ins, bits // 8, ins.space, ins.klass)

        def apply(old, b, *c):
            if op == "cas":
                return np.where(old == b, c[0], old)
            if ins.t in ("bf16", "bf16x2"):
                return to_bf16(ATOM[op](widen(old.view(U16)), widen(b.view(U16)))).view(raw)
            return ATOM[op](old.view(dtype), b.view(dtype)).view(raw)

        def run():
            lanes = g.active(pred)
            a = addr()[lanes]
            if not a.size:
                return
            at.count(a, lanes)
            self.synchronise(ins, a, lanes)
            args, old = [np.ascontiguousarray(x[lanes]) for x in vals], np.empty(len(a), raw)
            for mem, sel, off in at.spans(a, write=True):
                at.write(mem, sel, off, lanes, strong=True)
                view, cell, todo = mem.views[bits // 8], np.zeros(len(a), I64), np.arange(len(a))[sel]
                cell[todo] = off // (bits // 8)
                while todo.size:  # one lane per address each round, in lane order
                    now = todo[np.unique(cell[todo], return_index=True)[1]]
                    old[now] = view[cell[now]]
                    view[cell[now]] = apply(old[now], *(x[now] for x in args))
                    todo = np.setdiff1d(todo, now, assume_unique=True)
            if ret:
                d[lanes] = old

        return run

    op_red = op_atom

    def op_cp(self, ins):
        g, mods, pred, every = self.g, ins.mods, self.pred(ins), np.arange(self.n)
        if mods[:2] == ["async", "commit_group"]:
            return partial(g.commit, pred)
        if mods[:2] in (["async", "wait_group"], ["async", "wait_all"]):  # wait_all: uncommitted copies too
            return partial(g.wait_copies, int(ins.args[0], 0) if mods[1] == "wait_group" else -1, pred)
        if mods[0] != "async" or mods[1] not in ("ca", "cg"):
            raise NotImplementedError(f"instruction not covered: {ins}")
        to, frm, size, rest = (
            self.address(ins.args[0]),
            self.address(ins.args[1]),
            int(ins.args[2], 0),
            ins.args[3:],
        )
        if "L2::cache_hint" in mods:
            rest = rest[:-1]
        ignore = bool(rest) and self.kernel.regs.get(rest[0], (0,))[0] == 1  # a predicate: ignore the source
        limit = self.src(rest[0], "pred" if ignore else "u32") if rest else self.src(str(size), "u32")
        source, dest = (
            Access(g, ins, size, "global", "cp.async"),
            Access(g, ins, size, "shared", "cp.async shared"),
        )

        def run():
            ids = every[g.active(pred)]
            if not ids.size:
                return
            keep = (
                np.where(limit[ids], 0, size) if ignore else limit[ids].astype(I64)
            )  # bytes; the rest is zero
            if keep.max() > size:
                raise PtxError(f"cp.async source size above {size}; {ins}")
            data, src = np.zeros((len(ids), size // 4), U32), frm()[ids]
            if keep.any():
                source.count(src[keep > 0], ids[keep > 0], int(keep.sum()))
            for n in np.unique(keep[keep > 0]):
                part = np.flatnonzero(keep == n)
                for mem, sel, off in source.spans(src[part], int(n)):
                    source.read(mem, ALL, off, ids[part[sel]])
                    data.view(U8)[part[sel], :n] = mem.views[1].take(off[:, None] + np.arange(n))
            dst = to()[ids]
            dest.count(dst, ids)
            for mem, _, off in dest.spans(dst):
                cells = dest.granules(off)
                mem.shadow.check_write(self.run, g.cta, ins, mem, cells, dest.stamp(ids))
                mem.shadow.busy[cells] = 1
                g.cta.inflight += len(ids)
                g.copies.append(
                    Copy(
                        ids,
                        g.committed[ids],
                        (off >> 2)[:, None] + np.arange(size // 4),
                        cells,
                        data,
                        dest.pcw[ids],
                    )
                )

        return run

    # -- the rest

    def op_bar(self, ins):
        """bar.warp.sync (nothing to do) and bar.arrive; bar.sync ends a block, see terminator."""
        if ins.mods[0] == "warp":
            return None
        nums = [self.src(a, "u32") for a in ins.args]
        return lambda: self.g.cta.arrive(
            int(nums[0][0]),
            np.flatnonzero((self.members() & self.g.live.reshape(-1, 32)).any(1)) + self.g.warp0,
            int(nums[1][0]),
        )

    op_barrier = op_bar

    def op_call(self, ins):
        name = next(a for a in ins.args if not a.startswith("("))
        if name == "vprintf":
            return None  # device_print is dropped

        def run():
            if name != "__assertfail":
                raise NotImplementedError(f"calls are not covered: {ins}")
            texts = [
                bytes(v).split(b"\0")[0].decode()
                for k, v in self.kernel.symbols["global"].items()
                if k.startswith("assertMessage")
            ]
            raise PtxError(f"device assertion failed in CTA {self.g.cta.id}: {' or '.join(texts)}; {ins}")

        return run


# ---------------------------------------------------------------- 6. launcher


def launch(
    ptx,
    grid,
    args,
    num_warps,
    shared_bytes,
    *,
    schedule="lockstep",
    seed=0,
    check_uninit=True,
    resident=1,
    names=None,
    scratch_bytes=0,
    max_steps=5_000_000,
    entry=None,
):
    """Run one kernel over `grid` and return its Stats. See README.md for the arguments."""
    kernel, grid = Kernel(ptx, entry), (tuple(grid) + (1, 1, 1))[:3]
    if kernel.threads not in (None, 32 * num_warps):
        raise PtxError(f"the kernel wants {kernel.threads} threads, num_warps gives {32 * num_warps}")
    if schedule not in ("lockstep", "random"):
        raise ValueError(f"unknown schedule {schedule!r}")
    nctas = grid[0] * grid[1] * grid[2]
    run = Run(kernel, nctas, num_warps, check_uninit, shared_bytes)
    names, args = list(names or [f"arg{i}" for i in range(len(args))]), list(args)
    extra = len(kernel.params) - len(args)  # Triton appends global and profile scratch pointers
    if not 0 <= extra <= 2 or any(t != "u64" for _, t, _ in kernel.params[len(args) :]):
        raise PtxError(f"the kernel takes {len(kernel.params)} parameters, {len(args)} arguments given")
    args += [np.zeros(scratch_bytes * nctas, U8) if scratch_bytes and i == 0 else 0 for i in range(extra)]
    names += ["global scratch", "profile scratch"][:extra]
    tables = [(k, v.copy()) for k, v in kernel.symbols["global"].items()]
    is_array = [hasattr(a, "data_ptr") or np.ndim(a) > 0 for a in args]
    arrays = [(n, a) for n, a, yes in zip(names, args, is_array) if yes]
    run.regions, address = map_arguments(arrays + tables, run.granule["global"])
    run.symbols = {k: at for (k, _), at in zip(tables, address[len(arrays) :])}
    address, raw = iter(address), b""
    for (pname, t, size), a, yes in zip(kernel.params, args, is_array):
        raw += bytes(-len(raw) % size)
        run.symbols[pname] = len(raw)  # parameters have their own small address space
        a = next(address) if yes else a
        if t[0] == "f" or (t[0] == "b" and isinstance(a, (float, np.floating))):
            raw += struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(a))
        else:
            raw += (int(a) & (1 << 8 * size) - 1).to_bytes(size, "little")
    run.symbols["retval0"] = len(raw)  # what a dropped call returns
    run.params = np.frombuffer(raw + bytes(64), U8)

    rng = random.Random(seed) if schedule == "random" else None
    special = {
        f"%{k}.{x}": v
        for k, vs in (
            ("ntid", (32 * num_warps, 1, 1)),
            ("nctaid", grid),
            ("ctaid", (0, 0, 0)),
            ("tid", (0, 0, 0)),
        )
        for x, v in zip("xyz", vs)
    }
    special.update({"%smid": 0, "%nsmid": 1, "%dynamic_smem_size": shared_bytes})
    todo = list(range(nctas))
    if rng:
        rng.shuffle(todo)
    todo.reverse()

    def start(cta):
        i = todo.pop()
        cta.start(i, (i % grid[0], i // grid[0] % grid[1], i // (grid[0] * grid[1])))
        return cta

    with np.errstate(all="ignore"):
        busy = [start(CTA(run, num_warps, special, rng)) for _ in range(min(max(1, resident), nctas))]
        while busy:
            for cta in list(busy):
                quantum = None if len(busy) == 1 else rng.randrange(1, 200) if rng else 50
                if cta.run_for(quantum, max_steps):
                    start(cta) if todo else busy.remove(cta)
    st = run.stats
    for r in run.regions.values():
        if r._shadow is not None:
            s = r.shadow
            written = s.w != 0 if s.a is None else (s.w != 0) | (s.a != 0)
            st.unique[r.name] = tuple(int(np.count_nonzero(x)) * r.granule for x in (s.readers[0], written))
    st.access = {k: v for k, v in sorted(st.access.items()) if v["requests"]}
    return st


def compile_triton(fn, signature, constexprs, attrs=None, **options):
    """Cross-compile a @triton.jit function for sm_80 -> (ptx, metadata). No GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    src = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    out = triton.compile(src, target=GPUTarget("cuda", 80, 32), options=options)
    return out.asm["ptx"], out.metadata


def run_triton(
    fn, grid, *args, schedule="lockstep", seed=0, check_uninit=True, resident=1, max_steps=5_000_000, **kwargs
):
    """Specialise, compile and run fn as fn[grid](*args, **kwargs) would. Arrays may be NumPy (uint16 is
    bfloat16) or torch CPU tensors. The Stats returned also carry .ptx and .metadata."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if not hasattr(fn, "_pack_args"):
        raise TypeError("pass the @triton.jit function itself, not an autotuner or heuristics wrapper")

    def tensor(x):
        if not (isinstance(x, np.ndarray) and x.ndim):
            return x
        return torch.from_numpy(x).view(torch.bfloat16) if x.dtype == U16 else torch.from_numpy(x)

    target = GPUTarget("cuda", 80, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = {"debug": False, **{k: tensor(v) for k, v in kwargs.items()}}
    bound, special, options = bind(*map(tensor, args), **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, special, options)
    out = triton.compile(ASTSource(fn, signature, constexprs, attrs), target=target, options=options.__dict__)
    live, meta = [n for n, t in signature.items() if t != "constexpr"], out.metadata
    stats = launch(
        out.asm["ptx"],
        grid(bound) if callable(grid) else grid,
        [bound[n] for n in live],
        meta.num_warps,
        meta.shared,
        schedule=schedule,
        seed=seed,
        check_uninit=check_uninit,
        resident=resident,
        names=live,
        max_steps=max_steps,
        scratch_bytes=meta.global_scratch_size,
        entry=meta.name,
    )
    stats.ptx, stats.metadata = out.asm["ptx"], meta
    return stats
