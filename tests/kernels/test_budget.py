"""What one training step of the operator asks of the GPU: the numbers may go down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY

# Forward: pack, project, recurrent. Backward: recurrent, weight gradients, unpack, input gradients; recomputed, the
# projection again. No operator of torch runs a kernel, nothing is copied or filled, nothing waits.
BUDGET = [{"triton": 7}, {"triton": 8}]

PROGRAM = """
import json
import softgpu

softgpu.install(operators="null", triton="null")
import torch

from fastnet_kernels import ChannelGroupLSTM

seen = []
for recompute in (False, True):
    lstm = ChannelGroupLSTM([(1, 8, 68), (2, 8, 16)], backend="triton", recompute=recompute).cuda()
    x = [torch.empty(4, 8 * g, 1, h, device="cuda", dtype=torch.bfloat16) for g, h in ((1, 68), (2, 16))]
    x = [f.contiguous(memory_format=torch.channels_last).requires_grad_() for f in x]
    gradient = torch.empty(4, lstm.out_features, device="cuda", dtype=torch.bfloat16)

    def step():
        torch.autograd.grad(lstm(x), [*x, *lstm.parameters()], gradient)

    step()  # compiles, and fills the allocator
    with softgpu.watch() as watched:
        step()
    seen.append(watched.counts)
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler"
)
def test_launches_of_a_step() -> None:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == BUDGET
