"""Rows of `diffusion_step`: the acceptance table at the sizes of the decoder and of 256 x 256 pixels."""

from __future__ import annotations

import functools

import torch

from benchmarks.cases.registry import Case, add, compiled, rounded_randn
from dalle2_fast import functional
from dalle2_fast.ops._dtypes import compute_dtype


def step_inputs(b, size, dynamic, device, dtype, tiny):
    b, size = (2, 4) if tiny else (b, size)
    randn = rounded_randn(device, dtype)
    row = torch.tensor([0.8, 0.6, 0.5, 0.4, 0.0, 0.1, -5.0, -4.0], device=device)
    table = row.expand(50, 8).contiguous()
    return dict(
        x=randn(b, 3, size, size),
        output=randn(2 * b, 3 if dynamic else 6, size, size).mul_(0.5),
        table=table,
        step=torch.tensor(7, device=device),
        seeds=torch.arange(b, device=device),
        guidance=torch.tensor(3.0, device=device),
    )


def step_ours(dynamic, impl, x, output, table, step, seeds, guidance):
    bound_on_x0 = dict(dynamic_threshold=0.995) if dynamic else dict(clip=1.0)
    learned_range = output.shape[1] == 2 * x.shape[1]
    return functional.diffusion_step(
        x, output, table.to(compute_dtype(x.dtype)), step, seeds=seeds, guidance=guidance,
        learned_range=learned_range, impl=impl, **bound_on_x0,
    )  # fmt: skip


def step_eager(dynamic, x, output, table, step, seeds, guidance):
    """The same formulas as samplers usually write them, with torch's noise."""
    alpha, sigma, a, b, _, std, log_min, log_max = table.index_select(0, step.reshape(1))[0].unbind()
    channels = x.shape[1]
    conditional, unconditional = output.chunk(2)
    epsilon = unconditional[:, :channels] + guidance * (conditional - unconditional)[:, :channels]
    x0 = (x - sigma * epsilon) / alpha
    if dynamic:
        limit = torch.quantile(x0.flatten(1).abs().float(), 0.995, dim=1).clamp_min(1.0).to(x.dtype)
        limit = limit[:, None, None, None]
        x0 = torch.minimum(torch.maximum(x0, -limit), limit) / limit
    else:
        x0 = x0.clamp(-1, 1)
        fraction = (conditional[:, channels:] + 1) / 2
        std = torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min))
    return a * x + b * x0 + std * torch.randn_like(x), x0


def add_step(name, b, size, *, dynamic=False, wall_clock=False, factors, **targets):
    eager = functools.partial(step_eager, dynamic)
    elements = 2 * b * 3 * size * size
    add(
        Case(
            name,
            functools.partial(step_inputs, b, size, dynamic),
            functools.partial(step_ours, dynamic),
            {"eager": eager, "compile": compiled(eager)},
            # In: x, the two predictions and the conditional range. Out: x_next and x0.
            bytes=elements * (1 + 2 + (0 if dynamic else 1) + 2),
            checked_outputs=(1,),  # the noise of x_next differs
            wall_clock=wall_clock,
            target_factors=factors,
            **targets,
        )
    )


# tests/ops/test_graphs.py checks the other goal of the small step: no recompilation in 50 steps.
add_step("diffusion step, decoder, batch 4", 4, 64, target_launches=1, target_us=3, factors={})
add_step("diffusion step, decoder, batch 4, wall", 4, 64, wall_clock=True, factors={"eager": 15.0})
add_step("diffusion step, 256 px, batch 64", 64, 256, target_share=0.8,
         factors={"eager": 8.0, "compile": 0.95})  # fmt: skip
add_step("diffusion step, dynamic threshold, batch 64", 64, 256, dynamic=True, target_launches=2,
         factors={"eager": 5.0, "compile": 3.0})  # fmt: skip
