"""How the programs that share a group wait for each other, once a time step, in Triton.

The programs of a (group, batch tile) have a counter in global memory. A program adds one when it has stored its part
of a step (arrive), and goes on when all have (wait). This needs all programs of the launch on the GPU at once: a
cooperative launch. The interpreter, which runs one program after the other, would wait for ever.

Why what the others stored is seen, in the terms of PTX's memory consistency model:

    arrive  the barrier orders the stores of all threads of the program before the addition, which one thread makes;
            being a release at the GPU's scope, it makes all of them visible to whoever acquires from it
    wait    every thread reads the counter itself, and each read acquires at the GPU's scope: its own loads that
            follow, through L1 or not, find what was released; no barrier is needed for that

A counter only grows while programs wait at it, so that a program that is late cannot miss that the others have gone
on. It is zero at the start: pack_kernel writes zeros in every forward pass, earlier in the same stream, and the last
program to leave puts them back, for a second backward from what one forward kept. Nothing of it is up to the host, so
that a CUDA graph replays it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter):
    """What this program has stored is there for all that wait for it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, arrivals):
    """Returns once there have been so many arrivals."""
    seen = 0
    while seen < arrivals:
        seen = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def leave(counter, arrivals, PARTS: tl.constexpr):
    """This program has made its part of so many arrivals and waits no more; the last to leave zeroes the counter."""
    tl.debug_barrier()  # until here a thread of this program may have waited
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals + PARTS - 1:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
