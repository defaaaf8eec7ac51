"""Rows of the contrastive losses: the loss and its gradients for the whole batch of one process.

`flops` counts the products that are needed if no N x N matrix is stored: 8 N^2 D (logits, logits again for
the backward pass, two gradients); 6 N^2 D for the sigmoid loss, whose gradient needs no normaliser first;
16 N^2 D with soft targets.

"ours, any GPU": the kernels for every GPU from sm_80 on, timed on a Hopper GPU next to those for Hopper.
"eager": open_clip's formula in plain torch at the dtype of the features; "eager amp": under autocast.
"open_clip": its class, which computes the same formula and needs the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.registry import Case, add, compiled, device_suffix, needs
from benchmarks.cases.rival_losses import (
    amp,
    clip_eager,
    clip_single_product,
    inf_cl,
    liger_hopper,
    open_clip,
    open_clip_chunked,
    sigmoid_eager,
    soft_eager,
)
from dalle2_fast import functional
from dalle2_fast.ops._dtypes import compute_dtype

SCALE, BIAS = 14.3, -10.0  # initial values: CLIP's scale, SigLIP's bias
LEAVES = ("image_features", "text_features", "logit_scale")
CHECKED_ROWS = 2048  # the float64 truth of 32768 pairs would need several matrices of 8.6 GB


def inputs(rows: int, width: int, biased: bool, device: str, dtype: torch.dtype, tiny: bool = False):
    rows, width = (20, 8) if tiny else (rows, width)
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)

    def unit_rows() -> Tensor:
        return F.normalize(torch.randn(rows, width, device=device, generator=generator), dim=1)

    image = unit_rows()
    text = F.normalize(image + 2 * unit_rows(), dim=1)  # cosine about 0.45: neither easy nor hopeless
    scalars = dict(logit_scale=torch.full((), SCALE, dtype=compute_dtype(dtype), device=device))
    if biased:
        scalars["logit_bias"] = torch.full((), BIAS, dtype=compute_dtype(dtype), device=device)
    # Rounded to bfloat16, so that every dtype sees the same numbers.
    features = dict(image_features=image.bfloat16().to(dtype), text_features=text.bfloat16().to(dtype))
    return features | scalars


def any_gpu(op: Callable) -> Callable | str:
    """Ours without the kernels for Hopper. On other GPUs that is what "ours" already runs."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "only a Hopper GPU has kernels for its architecture"

    def run(**values):
        def function(*tensors):
            return op("fused", **dict(zip(values, tensors, strict=True)))

        return WithoutHopper.apply(function, *values.values())

    return run


class WithoutHopper(torch.autograd.Function):
    """function(*tensors) without Hopper kernels. Both passes choose their kernel, so both are wrapped."""

    @staticmethod
    def forward(ctx, function, *tensors):
        with torch.enable_grad(), without_hopper():
            ctx.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            ctx.loss = function(*ctx.leaves)
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx, grad):
        with without_hopper():
            return None, *torch.autograd.grad(ctx.loss, ctx.leaves, grad)


def without_hopper():
    from dalle2_fast import _C

    return mock.patch.object(_C, "sm90", None, create=True)


def add_loss(
    name, op, rows, width, *, eager, rivals, flops, device="cuda", biased=False, only=None, factors=None,
    **targets,
):  # fmt: skip
    """only: names of the rivals that are timed; None: all of them."""

    def ours(impl, **values):
        return getattr(functional, op)(**values, impl=impl)

    contestants = {"eager": eager, "compile": compiled(eager)}
    if device == "cuda":
        contestants |= {"eager amp": amp(eager), "compile amp": compiled(amp(eager)),
                        "ours, any GPU": any_gpu(ours)}  # fmt: skip
    contestants |= rivals
    if only is not None:
        contestants = {kind: contestants[kind] for kind in only if kind in contestants}
    add(
        Case(
            f"{name}{device_suffix(device)}",
            functools.partial(inputs, rows, width, biased),
            ours,
            contestants,
            bytes=4 * 2 * rows * width * (1 if device == "cuda" else 2),  # features in, gradients out
            flops=flops * rows**2 * width,
            device=device,
            backward=(*LEAVES, *(("logit_bias",) if biased else ())),
            with_forward=True,
            make_check=functools.partial(inputs, min(rows, CHECKED_ROWS), width, biased),
            # Plain torch rounds its products, tensor cores truncate theirs: on an H200 the loss of 2048 pairs
            # at D = 512 was off by a relative 1.5e-6 before contrastive_loss corrected for it.
            slack=3e-6,
            target_factors=factors or {},
            **targets,
        )
    )


def add_clip(rows, width, device="cuda", tflops=None, **targets):
    """tflops: the goal, for 8 N^2 D operations."""
    package = needs("open_clip", functools.partial(open_clip, "ClipLoss"))
    rivals = {"open_clip": package, "single product, compiled": compiled(clip_single_product)}
    if device == "cuda":
        rivals |= {"open_clip amp": package if isinstance(package, str) else amp(package),
                   "liger, Hopper": needs("liger_kernel", liger_hopper),
                   "inf_cl": needs("inf_cl", inf_cl)}  # fmt: skip
    else:
        rivals["inf_cl"] = "inf_cl consists of Triton kernels: it needs a CUDA device"
    if tflops is not None:
        targets["target_us"] = 8 * rows**2 * width / tflops / 1e6
    add_loss(
        f"contrastive loss, N = {rows}, D = {width}", "contrastive_loss", rows, width,
        eager=clip_eager, rivals=rivals, flops=8, device=device, **targets,
    )  # fmt: skip


# The factors are the goals of the Hopper kernels; those of other GPUs are lower. Rows with a goal come first,
# because a run with --minutes may end before the others.
add_clip(32768, 512, tflops=450, target_peak_bytes=600_000_000, factors={
    "eager amp": 3.0, "open_clip amp": 3.0, "eager": 1.8, "compile amp": 1.5, "single product, compiled": 0.9,
    "inf_cl": 8.0,
})  # fmt: skip
add_clip(32768, 1024, tflops=550, target_peak_bytes=600_000_000, factors={
    "eager amp": 2.4, "open_clip amp": 2.4, "eager": 1.5, "compile amp": 1.3, "inf_cl": 8.0,
})  # fmt: skip
for rows, device in ((32768, "cuda"), (4096, "cpu")):
    add_loss(
        f"sigmoid loss, N = {rows}, D = 512", "sigmoid_loss", rows, 512, eager=sigmoid_eager,
        rivals={"open_clip": needs("open_clip", functools.partial(open_clip, "SigLipLoss")),
                "open_clip, chunked": needs("open_clip", open_clip_chunked)}, flops=6,
        device=device, biased=True, factors={"eager amp": 3.0},
    )  # fmt: skip
for rows, device in ((16384, "cuda"), (2048, "cpu")):
    add_loss(
        f"soft contrastive loss, N = {rows}, D = 512", "soft_contrastive_loss", rows, 512,
        eager=soft_eager, rivals={"open_clip": "open_clip has no soft targets"}, flops=16, device=device,
    )  # fmt: skip
# The N x N matrices of 131072 pairs do not fit into memory; rivals that make them are then listed as absent.
CURVE = ("eager", "eager amp", "compile amp")
add_clip(131072, 768, target_peak_bytes=1_600_000_000, only=CURVE)
for rows, width in ((4096, 512), (8192, 512), (16384, 512), (65536, 512), (131072, 512), (32768, 768)):
    # Inf-CL takes a quarter of a second for 32768 pairs and 16 times that for 131072.
    add_clip(rows, width, only=CURVE + ("inf_cl",) * (rows <= 16384))
for rows in (2048, 4096):  # larger ones: benchmarks/jobs/contrastive_memory.py
    add_clip(rows, 512, "cpu")
