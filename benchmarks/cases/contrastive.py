"""The contrastive losses' rows of the registry: loss and gradients of one process's whole batch.

`flops` counts what has to be multiplied when no N x N matrix is kept: 8 N^2 D (logits, logits again, two
gradients), 6 N^2 D for the sigmoid loss, which needs no normaliser first, 16 N^2 D with soft targets. Inf-CL
does one direction of the loss a call, row by row, so it is called twice.
"ours, any GPU" are the kernels for every GPU from sm_80 on (M1), on a Hopper beside its own (M2).

"eager" is open_clip's formula in plain torch at the dtype of the features, "eager amp" the same under
autocast, and "open_clip" its class, which is the same again and needs the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.registry import Case, add, compiled, needs
from dalle2_fast import functional

SCALE, BIAS = 14.3, -10.0  # CLIP's scale at the start, SigLIP's bias at the start
LEAVES = ("image_features", "text_features", "logit_scale")
CHECKED_ROWS = 2048  # the float64 truth of 32768 pairs would be several matrices of 8.6 GB


def inputs(rows: int, width: int, biased: bool, device: str, dtype: torch.dtype, tiny: bool = False):
    rows, width = (20, 8) if tiny else (rows, width)
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)

    def draw() -> Tensor:
        return F.normalize(torch.randn(rows, width, device=device, generator=generator), dim=1)

    image = draw()
    text = F.normalize(image + 2 * draw(), dim=1)  # cosine about 0.45: neither easy nor hopeless
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = dict(logit_scale=torch.full((), SCALE, dtype=wide, device=device))
    if biased:
        scalars["logit_bias"] = torch.full((), BIAS, dtype=wide, device=device)
    # rounded to bfloat16, so that every dtype sees the same numbers
    features = dict(image_features=image.bfloat16().to(dtype), text_features=text.bfloat16().to(dtype))
    return features | scalars


def clip_eager(image_features, text_features, logit_scale):
    """Two products and two cross-entropies: what open_clip's ClipLoss computes in one process."""
    scale = logit_scale.to(image_features.dtype)
    labels = torch.arange(len(image_features), device=image_features.device)
    by_row = scale * image_features @ text_features.T
    by_column = scale * text_features @ image_features.T
    return (F.cross_entropy(by_row, labels) + F.cross_entropy(by_column, labels)) / 2


def clip_single_product(image_features, text_features, logit_scale):
    """One product for both directions; what a compiler can make of the plain formula."""
    logits = logit_scale * (image_features @ text_features.T).float()
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def sigmoid_eager(image_features, text_features, logit_scale, logit_bias):
    logits = logit_scale.to(image_features.dtype) * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def soft_eager(image_features, text_features, logit_scale):
    scale = logit_scale.to(image_features.dtype)
    with torch.no_grad():
        alike = image_features @ image_features.T + text_features @ text_features.T
        targets = (scale * alike / 2).softmax(1)
    by_row = scale * image_features @ text_features.T
    by_column = scale * text_features @ image_features.T
    return (F.cross_entropy(by_row, targets) + F.cross_entropy(by_column, targets)) / 2


def amp(function: Callable) -> Callable:
    """As trainers call it: float32 features under autocast. On a CPU there is none, and nothing changes."""

    def run(**values):
        values = {name: value.float() for name, value in values.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=values["image_features"].is_cuda):
            return function(**values)

    return run


def open_clip(name: str, **values) -> Tensor:
    from open_clip import loss

    return getattr(loss, name)()(**values)


def inf_cl(image_features, text_features, logit_scale):
    from inf_cl import cal_flash_loss

    # The scale goes in with the features: as an argument it needs a process group.
    head = 256 if image_features.shape[1] % 256 == 0 else image_features.shape[1]
    scaled = logit_scale * image_features
    rows = cal_flash_loss(scaled, text_features, head_dim=head)
    columns = cal_flash_loss(text_features, scaled, head_dim=head)
    return (rows + columns).mean() / 2  # it returns the loss of each row


def any_gpu(op: Callable) -> Callable | str:
    """Ours without the kernels for Hopper, which "ours" are where the two are not the same."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "only a Hopper GPU has kernels of its own"

    def run(**values):
        function = lambda *tensors: op("fused", **dict(zip(values, tensors, strict=True)))  # noqa: E731
        return WithoutHopper.apply(function, *values.values())

    return run


class WithoutHopper(torch.autograd.Function):
    """function(*tensors), forward and backward, where _C has no kernels for Hopper: each chooses anew."""

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
    **goals,
):  # fmt: skip
    """only: the names of the rivals to time."""
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
            name,
            functools.partial(inputs, rows, width, biased),
            ours,
            contestants,
            bytes=4 * 2 * rows * width * (1 if device == "cuda" else 2),  # features in, gradients out
            flops=flops * rows**2 * width,
            device=device,
            backward=(*LEAVES, *(("logit_bias",) if biased else ())),
            with_forward=True,
            make_check=functools.partial(inputs, min(rows, CHECKED_ROWS), width, biased),
            # Plain torch's products are rounded, those of tensor cores cut off: on an H200 the loss of
            # 2048 pairs at D = 512 was off by 1.5e-6 of itself before contrastive_loss mended its own.
            slack=3e-6,
            factors=factors or {},
            **goals,
        )
    )


def add_clip(rows, width, device="cuda", tflops=None, **goals):
    """tflops: of 8 N^2 D operations, the goal."""
    package = needs("open_clip", functools.partial(open_clip, "ClipLoss"))
    rivals = {"open_clip": package, "single product, compiled": compiled(clip_single_product)}
    if device == "cuda":
        rivals |= {"open_clip amp": package if isinstance(package, str) else amp(package),
                   "inf_cl": needs("inf_cl", inf_cl)}  # fmt: skip
    else:
        rivals["inf_cl"] = "inf_cl has Triton kernels alone: it needs a CUDA device"
    if tflops is not None:
        goals["target_us"] = 8 * rows**2 * width / tflops / 1e6
    add_loss(
        f"contrastive loss, N = {rows}, D = {width}{on(device)}", "contrastive_loss", rows, width,
        eager=clip_eager, rivals=rivals, flops=8, device=device, **goals,
    )  # fmt: skip


def on(device: str) -> str:
    return "" if device == "cuda" else " (CPU)"


# The factors are the goals of the Hopper kernels; those of every other GPU are lower. What has a goal comes
# first: a run with --minutes may end before the others.
add_clip(32768, 512, tflops=450, peak=600_000_000, factors={
    "eager amp": 3.0, "open_clip amp": 3.0, "eager": 1.8, "compile amp": 1.5, "single product, compiled": 0.9,
    "inf_cl": 8.0,
})  # fmt: skip
add_clip(32768, 1024, tflops=550, peak=600_000_000, factors={
    "eager amp": 2.4, "open_clip amp": 2.4, "eager": 1.5, "compile amp": 1.3, "inf_cl": 8.0,
})  # fmt: skip
for rows, device in ((32768, "cuda"), (4096, "cpu")):
    add_loss(
        f"sigmoid loss, N = {rows}, D = 512{on(device)}", "sigmoid_loss", rows, 512, eager=sigmoid_eager,
        rivals={"open_clip": needs("open_clip", functools.partial(open_clip, "SigLipLoss"))}, flops=6,
        device=device, biased=True, factors={"eager amp": 3.0},
    )  # fmt: skip
for rows, device in ((16384, "cuda"), (2048, "cpu")):
    add_loss(
        f"soft contrastive loss, N = {rows}, D = 512{on(device)}", "soft_contrastive_loss", rows, 512,
        eager=soft_eager, rivals={"open_clip": "open_clip has no soft targets"}, flops=16, device=device,
    )  # fmt: skip
# The matrices of 131072 pairs do not fit; who makes them says so.
CURVE = ("eager", "eager amp", "compile amp")
add_clip(131072, 768, peak=1_600_000_000, only=CURVE)
for rows, width in ((4096, 512), (8192, 512), (16384, 512), (65536, 512), (131072, 512), (32768, 768)):
    # Inf-CL takes a quarter of a second at 32768 pairs, 16 times that at 131072.
    add_clip(rows, width, only=CURVE + ("inf_cl",) * (rows <= 16384))
for rows in (2048, 4096):  # more: contrastive_memory.py
    add_clip(rows, 512, "cpu")
