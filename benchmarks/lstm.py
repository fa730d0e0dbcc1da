"""How fast are the channel-group LSTMs, against what one would take instead?

    python -m benchmarks.lstm [--quick]     all providers on this machine, into results/MACHINE/lstm.csv
    python -m benchmarks.lstm --model       what the compiled kernels imply for A100 and H100; needs no GPU

Times are of one call for a whole batch, forward, backward and both, from feature maps to their gradients and those
of the weights. Before anything is timed, a provider's output and gradients are compared with float64 nn.LSTM; one
that is wrong is listed without times.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, model
from benchmarks.harness import Candidate, Laps, Table
from benchmarks.lstm_providers import BASELINE, GPU_ONLY, Problem, Provider, providers
from benchmarks.lstm_recurrent import recurrent_providers
from fastnet.cli import run_command
from fastnet.config import Config

KEYS = ("stages", "image_size", "seq_len", "batch", "dtype", "part", "l2", "threads", "quantity")


class Case(NamedTuple):
    stages: str = "conv4,conv5"
    image_size: int = 224
    seq_len: int = 64
    batch: int = 64
    dtype: str = "float32"

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return Config(
            network="lstm",
            stages=tuple(self.stages.split(",")),
            image_size=self.image_size,
            seq_len=self.seq_len,
        ).lstm_stages


def cases(device: torch.device, *, quick: bool) -> list[Case]:
    """The paper's case, and around it one thing changed at a time."""
    if device.type == "cpu":
        if quick:
            return [Case(image_size=64, batch=32), Case(batch=4)]
        around = [Case(stages="conv4"), Case(stages="conv5"), Case(seq_len=128), Case(image_size=128)]
        return [Case(), *around, Case(image_size=64), Case(batch=256)]
    found = []
    for dtype in ("bfloat16", "float16", "float32"):
        paper = Case(batch=256, dtype=dtype)
        found.append(paper)
        if quick and dtype == "bfloat16":
            found.append(paper._replace(batch=32))  # where the recurrent kernels are split
        if quick:
            continue
        for change in (
            *({"batch": n} for n in (32, 64, 512, 1024)),
            *({"image_size": n} for n in (64, 128)),
            *({"stages": s} for s in ("conv4", "conv5")),
            {"seq_len": 128},
        ):
            found.append(paper._replace(**change))  # type: ignore[arg-type]
    return found


def gradients(p: Problem, provider: Provider) -> list[Tensor]:
    """Output, then gradients of the features and of the parameters."""
    with provider.setting():
        y = provider.forward()
        return [y.detach(), *torch.autograd.grad(y, [*p.features, *provider.parameters], p.dout)]


def stack_groups(flat: Sequence[Tensor], p: Problem) -> list[Tensor]:
    """Gradients of one nn.LSTM per group -> as ChannelGroupLSTM's parameters."""
    stacked, at = [], 0
    for s in p.stages:
        own = flat[at : at + 4 * s.groups]
        stacked += [torch.stack(list(own[n::4])) for n in range(4)]
        at += 4 * s.groups
    return stacked


def by_lstms(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the features and stacked weights by torch's nn.LSTM in `dtype`."""
    lstms = p.lstms(dtype)
    with torch.autocast(p.device.type, enabled=False):
        y = torch.cat([m(x.to(dtype))[1][0][0] for m, x in zip(lstms, p.sequences(), strict=True)], dim=1)
    leaves = [*p.features, *(w for m in lstms for w in m.parameters())]
    flat = torch.autograd.grad(y, leaves, p.dout.to(dtype))
    count = len(p.features)
    return [y.detach(), *flat[:count], *stack_groups(flat[count:], p)]


def check(p: Problem, make: Callable[[Problem], Provider]) -> str:
    """Compares with float64 nn.LSTM in the 2-norm: "" if near enough, else what is not.

    Bounds are the kernels': twice eager nn.LSTM's own error in the dtype for the output, three times for gradients;
    where eager is more exact by chance, one rounding of the dtype takes its place.
    """
    provider = make(p)
    ours = gradients(p, provider)
    count = 1 + len(p.features)
    if provider.order == "groups":
        ours = [*ours[:count], *stack_groups(ours[count:], p)]
    elif not provider.order:
        ours = ours[:count]
    names = ["output", *(f"gradient of map {n}" for n in range(len(p.features)))]
    names += [f"gradient of {name}" for name, _ in p.module.named_parameters()]
    exact, eager = by_lstms(p, torch.float64), by_lstms(p, p.dtype)
    eps = torch.finfo(p.dtype).eps
    for name, mine, right, theirs in zip(names, ours, exact, eager, strict=False):
        error = (mine.double() - right.double()).norm().item()
        least = eps * right.double().norm().item()
        bound = (2 if name == "output" else 3) * max((theirs.double() - right.double()).norm().item(), least)
        if not error <= bound:
            return f"{name}: error {error:.2g} against float64, at most {bound:.2g} allowed"
    return ""


def candidate(p: Problem, provider: Provider) -> Callable[[Laps], None]:
    def run(laps: Laps) -> None:
        with provider.setting():
            y = provider.forward()
            laps("forward")
            if provider.backward is not None:
                provider.backward(y)
            else:
                torch.autograd.grad(y, [*p.features, *provider.parameters], p.dout)
            laps("backward")

    if not provider.graph:
        return run
    unmarked = lambda: run(Laps(torch.device("cpu")))
    return harness.Captured(unmarked)


def measure(
    table: Table, case: Case, device: torch.device, threads: int, *, seconds: float, quick: bool
) -> None:
    """All providers on one case: checked, then timed in turns."""
    dtype = getattr(torch, case.dtype)
    full = {**case._asdict(), "part": "whole", "l2": "", "threads": threads}
    print(f"{case.stages} at {case.image_size} px, T={case.seq_len}, batch {case.batch}, {case.dtype}")
    small = Problem(case.sizes, case.batch if device.type == "cuda" else min(case.batch, 8), dtype, device)
    p = Problem(case.sizes, case.batch, dtype, device)
    for name in GPU_ONLY if device.type == "cpu" else ():
        table.note(full, name, "not run: no GPU here")
    right = []
    for name, make in providers(p, quick=quick).items():
        try:
            problem = check(small, make)
        except Exception as error:  # whatever another package raises for a shape that it does not take
            problem = f"cannot run: {str(error).splitlines()[0]}"
        if problem:
            table.note(full, name, problem)
        else:
            right.append((name, make))
    time_all(table, full, p, dict(right), seconds)
    made = recurrent_providers(p, quick=quick)
    parts = {n: m for n, m in made.items() if n.replace(", split", "") in dict(right)}
    time_all(table, {**full, "part": "recurrent"}, p, parts, seconds / 3)


def time_all(
    table: Table,
    full: dict[str, Any],
    p: Problem,
    makes: dict[str, Callable[[Problem], Provider]],
    seconds: float,
) -> None:
    ready = {name: candidate(p, make(p)) for name, make in makes.items()}
    memory = {name: harness.peak_mb(run, p.device) for name, run in ready.items()}
    settings: list[tuple[str, Callable[[Candidate], object]]] = [("", lambda _: None)]
    if p.device.type == "cuda":
        settings = [("warm", harness.warm), ("flushed", harness.flushed(p.device))]
    for l2, before in settings:
        times = harness.alternate(ready, p.device, seconds=seconds, before=before)
        for name, laps in times.items():
            for lap, samples in laps.items():
                if lap != "replay":
                    table.add({**full, "l2": l2}, name, lap, "ms", samples, peak_mb=memory[name])


def main(argv: Sequence[str]) -> None:
    parser = harness.parser("lstm", __doc__)
    parser.add_argument("--model", action="store_true", help="bounds from compiled code, labelled modelled")
    args = parser.parse_args(argv)
    if args.model:
        model.main()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # as the kernels, which multiply float32 as it is
    torch._dynamo.config.recompile_limit = 64  # a limit reached would time the eager cell as the compiled one
    table = Table("lstm", quick=args.quick)
    for case in cases(device, quick=args.quick):
        measure(table, case, device, args.threads, seconds=3 if args.quick else 14, quick=args.quick)
        gc.collect()
        if args.quick:  # what ends it at a limit leaves the cases before
            table.write()
    harness.mark_ratios(table.rows, BASELINE, KEYS)
    table.write()


if __name__ == "__main__":
    run_command(main)
