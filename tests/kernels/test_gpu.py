"""The kernels on a GPU: the ground of the other kernel tests, CUDA graphs, determinism. See kernels/sanitize.sh too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnet_kernels import ChannelGroupLSTM, launch, plan
from fastnet_kernels.plan import is_split, plans_for
from tests.support.kernels import failures, feature_maps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu"),
]
PAPER = [(4, 64, 196), (8, 64, 49)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["float32", "float16", "bfloat16"]  # kernels/sanitize.sh chooses by them


@pytest.fixture(params=[True, False], ids=["split", "whole"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the GPU decides, which splits the small batches of these tests, and as it trains large ones."""
    if not request.param:
        monkeypatch.setattr(plan, "multiprocessors", lambda device: 0)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 16, 19])
def test_network_of_the_paper(batch: int, recompute: bool, dtype: torch.dtype) -> None:
    assert not failures(launch, PAPER, batch, dtype, recompute=recompute, device="cuda")


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("hidden", [1, 4, 16, 24, 37, 49, 64, 100, 196, 256, 257, 784, 1024])
def test_hidden_sizes(hidden: int, dtype: torch.dtype) -> None:
    assert not failures(launch, [(2, 5, hidden), (1, 3, 16)], 19, dtype, device="cuda")


def training_setup(dtype: torch.dtype = torch.bfloat16) -> tuple[ChannelGroupLSTM, list[Tensor]]:
    module = ChannelGroupLSTM(PAPER, backend="triton").cuda()
    x = [f.to("cuda", dtype).requires_grad_() for f in feature_maps(PAPER, 40)]
    return module, x


def step(module: ChannelGroupLSTM, x: list[Tensor]) -> list[Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [*x, *module.parameters()])]


@pytest.mark.usefixtures("splits")
def test_runs_are_bit_identical() -> None:
    module, x = training_setup()
    for first, second in zip(step(module, x), step(module, x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("splits")
def test_cuda_graph() -> None:
    """Forward and backward captured once, replayed on other inputs; the second replay finds what the first has left."""
    module, x = training_setup()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x)
    with torch.no_grad():
        for f in x:
            f.normal_()
    graph.replay()
    graph.replay()
    for replayed, expected in zip(captured, step(module, x), strict=True):
        assert torch.equal(replayed, expected)


def test_one_binary_for_every_batch_size() -> None:
    """Or two, where only the small ones are split."""
    from fastnet_kernels import fused_forward

    module, _ = training_setup()

    def compiled() -> int:
        return sum(len(entry[0]) for entry in fused_forward.forward_kernel.device_caches.values())

    counts, splits = [], set()
    for batch in (1, 5, 16, 17, 64):
        x = [f.to("cuda", torch.bfloat16).requires_grad_() for f in feature_maps(PAPER, batch)]
        step(module, x)
        counts.append(compiled())
        splits.add(is_split(plans_for(x[0], module.stages, save=True)))
    assert len(set(counts)) == len(splits)


@pytest.mark.usefixtures("splits")
def test_compile_fullgraph() -> None:
    module, x = training_setup()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=0, atol=0)


def test_cudnn_order() -> None:
    """to_cudnn is the buffer that nn.LSTM hands to cuDNN."""
    module = ChannelGroupLSTM([(2, 3, 49)]).cuda()
    for buffer, lstm in zip(module.to_cudnn(), module.to_lstms(), strict=True):
        lstm.flatten_parameters()
        start = lstm.get_parameter("weight_ih_l0").untyped_storage()
        flat = torch.empty(0, device="cuda").set_(start)
        assert torch.equal(flat[: buffer.numel()], buffer)
