"""Refuses, under torch.use_deterministic_algorithms, what CUDA's kernels refuse then and the CPU's compute."""

from __future__ import annotations

import os

import torch
from torch._prims_common import alert_not_deterministic

# Those of the list in the documentation of torch.use_deterministic_algorithms that are operators of their own.
WITHOUT = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "put_",
    "histc",
    "median",
    "nanmedian",
    "kthvalue",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
}
PRODUCTS = {"mm", "addmm", "addmv", "bmm", "baddbmm", "addmm_", "_addmm_activation"}  # by cuBLAS
WORKSPACES = (":4096:8", ":16:8")


def check(name: str) -> None:
    """Raises RuntimeError if deterministic algorithms are asked for and the operator `name` has none on CUDA."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    if name in WITHOUT:
        alert_not_deterministic(f"{name} on CUDA")
    if name in PRODUCTS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        alert_not_deterministic(f"{name} on CUDA without CUBLAS_WORKSPACE_CONFIG={WORKSPACES[0]}")
