"""--compile: the networks through torch.compile, on the CPU."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fastnet.config import sample
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.network.network import Network
from fastnet.training.parallel import data_parallel
from fastnet.training.setup import choices

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="needs a C++ compiler",
)
CLASSES, BATCH, SIZE = 5, 4, 32


@pytest.fixture(autouse=True)
def _compiled_anew() -> Any:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def made(network: str, frozen: str, **settings: Any) -> Network:
    torch.manual_seed(0)
    net = Network(replace(sample(network), image_size=SIZE, backend="torch", **settings), CLASSES)
    net.freeze(frozen)
    return net.train()


def trained(model: nn.Module, network: Network) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [4, K] and gradients in float64, of images [4, 3, 32, 32] and labels [4] that are always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    logits = model(x.to(network.classifier.weight.dtype))
    F.cross_entropy(logits, y).backward()
    gradients = {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}
    return logits.detach().double(), gradients


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.hypot(*((a[name] - b[name]).norm().item() for name in b))


def check(network: Network, compile_it: Callable[[Network], nn.Module]) -> None:
    """Gradients in float64 as far from the plain network's as rounding explains. How much it grows on its way is known
    from float32's; there, a ReLU that turns over would make the comparison useless now and then."""
    exact, compiled = copy.deepcopy(network).double(), copy.deepcopy(network).double()
    true_logits, true = trained(exact, exact)
    _, rounded = trained(network, network)
    logits, ours = trained(compile_it(compiled), compiled)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    assert torch.equal(logits, true_logits)  # float32, rounded at the end
    assert distance(ours, true) <= 3 * ratio * distance(rounded, true)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_compiler
@pytest.mark.parametrize("frozen", ["conv5", "none"])
def test_the_cpus_compiler(frozen: str) -> None:
    runtime = Runtime(torch.device("cpu"))
    check(made("baseline", frozen), lambda network: data_parallel(network, runtime, compiled=True))


@pytest.mark.long
@pytest.mark.slow
def test_the_lstm_network_is_one_graph() -> None:
    """With torch's LSTMs, which Inductor would unroll and take minutes for. With the kernels' operator it is compiled
    on softgpu (tests/softgpu/checks/check_compiled.py)."""
    network = made("lstm", "none", stages=("conv5",))

    def compile_it(network: Network) -> nn.Module:
        return cast(nn.Module, torch.compile(network, backend="aot_eager", fullgraph=True))

    check(network, compile_it)


def test_ranks_compile_nothing_but_the_step(tmp_path: Path) -> None:
    """DDP's buckets are settled by a pass with one image, for which the network is not compiled."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = made("baseline", "none")
        model = data_parallel(network, Runtime(torch.device("cpu"), world_size=2), compiled=True)
        assert isinstance(model, DistributedDataParallel) and not counters["stats"]
    finally:
        dist.destroy_process_group()


def test_no_compiler_is_one_line() -> None:
    none = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(InputError, match=r"--compile: there is no C\+\+ compiler here; install g\+\+"):
        choices(replace(sample("baseline"), compile=True), Runtime(torch.device("cpu")))
