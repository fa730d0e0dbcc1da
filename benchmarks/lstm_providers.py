"""Every way to compute the channel-group LSTMs that benchmarks/lstm.py compares, on equal inputs and weights.

Legend: B batch, G groups, T steps, S input size = H hidden size; a stage is (G, T, H), with one LSTM per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet_kernels import ChannelGroupLSTM, Stage, Weights, naive

STREAMS = 4


class Problem:
    """Feature maps, weights and the output's gradient, the same for all providers."""

    def __init__(
        self, stages: Sequence[tuple[int, int, int]], batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.batch, self.dtype, self.device = batch, dtype, device
        self.module = ChannelGroupLSTM(stages).to(device)
        self.stages = self.module.stages
        self.features = [self._feature(s).requires_grad_() for s in self.stages]
        self.dout = torch.randn(batch, self.module.out_features, device=device, dtype=dtype)

    def _feature(self, s: Stage) -> Tensor:
        """[B, G*T, H, 1] channels_last: positions in one column, in memory as any h*w = H."""
        x = torch.randn(self.batch, s.hidden, 1, s.groups * s.seq_len, device=self.device)
        return x.to(self.dtype).permute(0, 3, 1, 2)

    def sequences(self) -> list[Tensor]:
        """One [B, T, S] per group of all stages, as a loop over channels_last feature maps cuts them out."""
        return [
            x[:, g * s.seq_len : (g + 1) * s.seq_len].flatten(2)
            for x, s in zip(self.features, self.stages, strict=True)
            for g in range(s.groups)
        ]

    def lstms(self, dtype: torch.dtype) -> list[nn.LSTM]:
        return [lstm.to(dtype) for lstm in self.module.to_lstms()]


@dataclass
class Provider:
    """`forward` gives the output [B, sum(G*H)]; `parameters` are differentiated besides the features.

    `order` says how the parameters' gradients compare with the reference: "stacked" as ChannelGroupLSTM's, "groups"
    as one nn.LSTM per group; "" where they are not compared, being of other shapes.
    """

    forward: Callable[[], Tensor]
    parameters: list[Tensor]
    order: str = ""
    setting: Callable[[], AbstractContextManager] = nullcontext
    graph: bool = False  # one CUDA graph of forward and backward
    backward: Callable[[Tensor], object] | None = None  # in place of autograd's


def stacked_parameters(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], list[Weights]]:
    flat = [w.detach().to(dtype).requires_grad_() for w in p.module.parameters()]
    return flat, [Weights(*flat[n : n + 4]) for n in range(0, len(flat), 4)]


def fastnet(p: Problem, *, backend: str, recompute: bool = False, graph: bool = False) -> Provider:
    module = ChannelGroupLSTM(p.stages, backend=backend, recompute=recompute).to(p.device)  # type: ignore[arg-type]
    module.load_state_dict(p.module.state_dict())
    return Provider(lambda: module(p.features), list(module.parameters()), "stacked", graph=graph)


def loop(p: Problem, *, autocast: bool = False, graph: bool = False) -> Provider:
    """nn.LSTM per group, one after the other; weights in the inputs' dtype, or float32 under autocast."""
    lstms = p.lstms(torch.float32 if autocast else p.dtype)

    def forward() -> Tensor:
        ends = [lstm(x)[1][0][0] for lstm, x in zip(lstms, p.sequences(), strict=True)]
        return torch.cat(ends, dim=1).to(p.dtype)

    setting = lambda: torch.autocast(p.device.type, dtype=p.dtype, enabled=autocast)
    return Provider(forward, [w for lstm in lstms for w in lstm.parameters()], "groups", setting, graph)


def on_streams(p: Problem) -> Provider:
    """The loop with the groups dealt out to CUDA streams; autograd runs the backward on the same ones."""
    lstms = p.lstms(p.dtype)
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]

    def forward() -> Tensor:
        here = torch.cuda.current_stream()
        ends = []
        for n, (lstm, x) in enumerate(zip(lstms, p.sequences(), strict=True)):
            stream = streams[n % STREAMS]
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                ends.append(lstm(x)[1][0][0])
        for stream in streams:
            here.wait_stream(stream)
        return torch.cat(ends, dim=1)

    return Provider(forward, [w for lstm in lstms for w in lstm.parameters()], "groups")


def padded(p: Problem) -> Provider:
    """The loop with hidden and input sizes above 192 padded to a multiple of 128, where cuDNN can be persistent.

    Padded units have zero weights and biases: their cell stays at zero.
    """
    lstms = []
    for old in p.lstms(p.dtype):
        size, wide = old.hidden_size, wide_size(old.hidden_size)
        new = nn.LSTM(wide, wide, batch_first=True, device=p.device, dtype=p.dtype)
        with torch.no_grad():
            for name, value in old.named_parameters():
                columns = (0, wide - size) if value.dim() == 2 else ()
                rows = value.unflatten(0, (4, size))  # [4, H, ...]
                grown = F.pad(rows, (*columns, 0, wide - size))
                new.get_parameter(name).copy_(grown.flatten(0, 1))
        lstms.append(new)

    def forward() -> Tensor:
        ends = []
        for lstm, x in zip(lstms, p.sequences(), strict=True):
            size = x.shape[-1]
            ends.append(lstm(F.pad(x, (0, lstm.hidden_size - size)))[1][0][0, :, :size])
        return torch.cat(ends, dim=1)

    return Provider(forward, [w for lstm in lstms for w in lstm.parameters()])


def wide_size(size: int) -> int:
    return size if size <= 192 else -(-size // 128) * 128


def block_diagonal(p: Problem) -> Provider:
    """One nn.LSTM per stage over all its groups at once, its weight matrices block diagonal."""
    lstms = []
    for stage, weights in zip(p.stages, p.module.weights(), strict=True):
        groups, _, hidden = stage
        size = groups * hidden
        lstm = nn.LSTM(size, size, batch_first=True, device=p.device, dtype=p.dtype)
        with torch.no_grad():
            for name, value in (("weight_ih_l0", weights.ih), ("weight_hh_l0", weights.hh)):
                blocks = [torch.block_diag(*value.unflatten(1, (4, hidden))[:, n]) for n in range(4)]
                lstm.get_parameter(name).copy_(torch.cat(blocks))
            for name, value in (("bias_ih_l0", weights.bias_ih), ("bias_hh_l0", weights.bias_hh)):
                lstm.get_parameter(name).copy_(value.unflatten(1, (4, hidden)).transpose(0, 1).flatten())
        lstms.append(lstm)

    def forward() -> Tensor:
        ends = []
        for lstm, x, (groups, seq_len, _) in zip(lstms, p.features, p.stages, strict=True):
            steps = x.flatten(2).unflatten(1, (groups, seq_len)).transpose(1, 2).flatten(2)  # [B, T, G*S]
            ends.append(lstm(steps)[1][0][0])
        return torch.cat(ends, dim=1)

    return Provider(forward, [w for lstm in lstms for w in lstm.parameters()])


def batched(p: Problem) -> Provider:
    """The plain loop over the steps, all groups of a stage in one batched product."""
    flat, weights = stacked_parameters(p, p.dtype)
    return Provider(lambda: naive(p.features, weights, p.stages), flat, "stacked")


def cell(step: Tensor, h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A step of all groups: projected input [G, B, 4H], h and c [G, B, H], w [G, H, 4H]."""
    i, f, g, o = (step + h @ w).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def recurrent_loop(projected: Sequence[Tensor], hh: Sequence[Tensor], step: Callable = cell) -> Tensor:
    """The recurrent part: projected inputs with biases [T, G, B, 4H] and W_hh [G, 4H, H] -> [B, sum(G*H)]."""
    ends = []
    for sequence, w in zip(projected, hh, strict=True):
        h = c = sequence.new_zeros(*sequence.shape[1:3], w.shape[2])  # [G, B, H]
        for projection in sequence:
            h, c = step(projection, h, c, w.mT)
        ends.append(h.transpose(0, 1).flatten(1))
    return torch.cat(ends, dim=1)


def projections(p: Problem, weights: Sequence[Weights]) -> list[Tensor]:
    """[T, G, B, 4H] per stage, with both biases."""
    return [
        torch.einsum("bgts,gns->tgbn", x.flatten(2).unflatten(1, s[:2]), w.ih)
        + (w.bias_ih + w.bias_hh)[:, None]
        for x, w, s in zip(p.features, weights, p.stages, strict=True)
    ]


def compiled(p: Problem) -> Provider:
    """The plain loop with its cell through torch.compile."""
    flat, weights = stacked_parameters(p, p.dtype)
    step = torch.compile(cell)
    return Provider(
        lambda: recurrent_loop(projections(p, weights), [w.hh for w in weights], step), flat, "stacked"
    )


def flashrnn(p: Problem) -> Provider:
    """FlashRNN's recurrent kernel behind a projection by torch, head dimensions padded to a power of two from 16.

    Release 1.0.8 cannot run here: see benchmarks/README.md.
    """
    from flashrnn import flashrnn as run  # not on every machine

    flat, weights = stacked_parameters(p, p.dtype)

    def forward() -> Tensor:
        ends = []
        for x, w, (groups, seq_len, hidden) in zip(p.features, weights, p.stages, strict=True):
            wide = max(16, 1 << (hidden - 1).bit_length())
            pad = (0, wide - hidden)
            sequence = x.flatten(2).unflatten(1, (groups, seq_len))  # [B, G, T, S]
            ih = w.ih.unflatten(1, (4, hidden))  # [G, 4, H, S]
            wx = F.pad(torch.einsum("bgts,gnhs->btngh", sequence, ih), pad)  # [B, T, 4, G, D]
            hh = F.pad(w.hh.unflatten(1, (4, hidden)), (*pad, *pad)).transpose(0, 1)  # [4, G, D, D]
            bias = F.pad((w.bias_ih + w.bias_hh).unflatten(1, (4, hidden)), pad).transpose(0, 1)  # [4, G, D]
            states, _ = run(
                wx.contiguous(),
                hh.contiguous(),
                bias.contiguous(),
                function="lstm",
                backend="cuda_fused",
                dtype=str(p.dtype).removeprefix("torch."),
            )
            ends.append(states[0][:, -1, :, :hidden].flatten(1))  # h of [S, B, T, G, D] at the last step
        return torch.cat(ends, dim=1)

    return Provider(forward, flat, "stacked")


BASELINE = "nn.LSTM x12"
GPU_ONLY = (
    "fastnet (fused)",
    "fastnet (fused, recompute)",
    "fastnet (fused), one CUDA graph",
    f"{BASELINE}, streams",
    f"{BASELINE}, one CUDA graph",
    f"{BASELINE}, padded",
    f"{BASELINE}, autocast",
    "FlashRNN",
)


def providers(p: Problem, *, quick: bool) -> dict[str, Callable[[Problem], Provider]]:
    """What can run on the problem's device, by name; the baseline first."""
    if p.device.type == "cpu":
        rows: dict[str, Callable[[Problem], Provider]] = {
            BASELINE: loop,
            "fastnet (torch backend)": lambda q: fastnet(q, backend="torch"),
            "batched eager loop": batched,
            "block-diagonal nn.LSTM": block_diagonal,
        }
        return rows if quick else {**rows, "compiled cell": compiled}
    rows = {
        BASELINE: loop,
        "fastnet (fused)": lambda q: fastnet(q, backend="triton"),
        "fastnet (fused, recompute)": lambda q: fastnet(q, backend="triton", recompute=True),
        # In small cases the other rows time the host.
        "fastnet (fused), one CUDA graph": lambda q: fastnet(q, backend="triton", graph=True),
        f"{BASELINE}, streams": on_streams,
        f"{BASELINE}, one CUDA graph": lambda q: loop(q, graph=True),
        f"{BASELINE}, padded": padded,
        "block-diagonal nn.LSTM": block_diagonal,
        "batched eager loop": batched,
        "compiled cell": compiled,
    }
    # Under autocast torch casts to float16 before cuDNN's LSTMs, whatever its dtype.
    if p.dtype == torch.float16:
        rows[f"{BASELINE}, autocast"] = lambda q: loop(q, autocast=True)
    if find_spec("flashrnn"):
        rows["FlashRNN"] = flashrnn
    return rows
