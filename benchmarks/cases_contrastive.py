"""The contrastive losses' rows of the registry: loss and gradients of one process's whole batch.

`flops` counts what has to be multiplied when no N x N matrix is kept: 8 N^2 D (logits, logits again, two
gradients), 6 N^2 D for the sigmoid loss, which needs no normaliser first, 16 N^2 D with soft targets. Inf-CL
does one direction of the loss a call, so it is called twice; 1.2.1 has not been run where this was written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case, add, compiled, installed
from torch import Tensor

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


def open_clip(name: str) -> Callable | str:
    if not installed("open_clip"):
        return "open_clip is not installed"

    def run(**values):
        from open_clip import loss

        return getattr(loss, name)()(**values)

    return run


def inf_cl() -> Callable | str:
    if not installed("inf_cl"):
        return "inf_cl is not installed"

    def run(image_features, text_features, logit_scale):
        from inf_cl import cal_flash_loss

        # The scale goes in with the features: as an argument it needs a process group.
        head = 256 if image_features.shape[1] % 256 == 0 else image_features.shape[1]
        scaled = logit_scale * image_features
        rows = cal_flash_loss(scaled, text_features, head_dim=head)
        columns = cal_flash_loss(text_features, scaled, head_dim=head)
        return (rows + columns) / 2

    return run


def add_loss(name, op, rows, width, *, eager, package, rivals=None, flops, biased=False, cpu_rows, factors):
    def ours(impl, **values):
        return getattr(functional, op)(**values, impl=impl)

    def make_cpu():
        return inputs(cpu_rows, width, biased, "cpu", torch.float32)

    add(
        Case(
            name,
            functools.partial(inputs, rows, width, biased),
            ours,
            {
                "eager": eager, "eager amp": amp(eager), "compile": compiled(eager),
                "compile amp": compiled(amp(eager)), **package, **(rivals or {}),
            },
            bytes=4 * 2 * rows * width,  # both features in, both gradients out
            flops=flops * rows**2 * width,
            factors=factors,
            backward=(*LEAVES, *(("logit_bias",) if biased else ())),
            with_forward=True,
            make_check=functools.partial(inputs, min(rows, CHECKED_ROWS), width, biased),
            make_cpu=make_cpu if cpu_rows else None,
        )
    )  # fmt: skip


def add_clip(rows, width, cpu_rows=0, factors=None):
    add_loss(
        f"contrastive loss, N = {rows}, D = {width}", "contrastive_loss", rows, width, eager=clip_eager,
        package={"open_clip": open_clip("ClipLoss"), "open_clip amp": _amp_or_why(open_clip("ClipLoss"))},
        rivals={"single product, compiled": compiled(clip_single_product), "inf_cl": inf_cl()},
        flops=8, cpu_rows=cpu_rows, factors=factors or {},
    )  # fmt: skip


def _amp_or_why(rival: Callable | str) -> Callable | str:
    return rival if isinstance(rival, str) else amp(rival)


# The factors are the goals of the Hopper kernels; those of every other GPU are lower.
add_clip(32768, 512, cpu_rows=4096, factors={
    "eager amp": 3.0, "eager": 1.8, "compile amp": 1.5, "single product, compiled": 0.9, "inf_cl": 8.0,
})  # fmt: skip
for rows in (4096, 8192, 16384, 65536, 131072):  # what does not fit says so
    add_clip(rows, 512)
add_clip(32768, 768)
add_clip(131072, 768)
add_clip(32768, 1024, factors={"eager amp": 2.4, "eager": 1.5, "compile amp": 1.3, "inf_cl": 8.0})
add_loss(
    "sigmoid loss, N = 32768, D = 512", "sigmoid_loss", 32768, 512, eager=sigmoid_eager, biased=True, flops=6,
    package={"open_clip": open_clip("SigLipLoss")}, cpu_rows=4096, factors={"eager amp": 3.0},
)  # fmt: skip
add_loss(
    "soft contrastive loss, N = 16384, D = 512", "soft_contrastive_loss", 16384, 512, eager=soft_eager,
    flops=16, package={"open_clip": "open_clip has no soft targets"}, cpu_rows=2048, factors={},
)  # fmt: skip
