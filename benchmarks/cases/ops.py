"""The ops' rows of the registry: every row of the kernels' acceptance table, at shapes of real models.

The call of apex follows its documentation and has not been run where this was written: the check before the
time has to pass first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.registry import Case, add, compiled, drawer, needs
from dalle2_fast import functional

# ------------------------------------------------------------------------------------------------- group norm


def norm_inputs(shape, film: bool, channels_last: bool, gradient: bool, device, dtype, tiny):
    n, c, h, w = (1, 6, 5, 4) if tiny else shape
    draw = drawer(device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = draw(n, c, h, w).mul_(2).add_(0.5).contiguous(memory_format=layout)
    film_rows = draw(n, 2 * c).mul_(0.3).chunk(2, dim=1) if film else (None, None)
    grad = draw(n, c, h, w).contiguous(memory_format=layout) if gradient else None
    weight, bias = draw(c).mul_(0.2).add_(1), draw(c)
    return dict(x=x, weight=weight, bias=bias, scale=film_rows[0], shift=film_rows[1], grad=grad)


def groups(x: Tensor) -> int:
    return 32 if x.shape[1] % 32 == 0 else 2  # 2: of a tiny one


def norm_ours(impl, x, weight, bias, scale=None, shift=None, activation="silu"):
    return functional.group_norm_silu(x, groups(x), weight, bias, 1e-5, scale, shift, activation, impl)


def norm_eager(x, weight, bias, scale=None, shift=None, activation="silu"):
    y = F.group_norm(x, groups(x), weight, bias, 1e-5)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if activation == "silu" else y


def norm_liger(x, weight, bias, scale=None, shift=None):
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    y = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], 32, 1e-5)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y)


@functools.cache
def apex_module(channels: int, dtype: torch.dtype):
    from apex.contrib.group_norm import GroupNorm

    return GroupNorm(32, channels, eps=1e-5, act="silu", device="cuda", dtype=dtype)


def norm_apex(x, weight, bias, scale=None, shift=None):
    norm = apex_module(x.shape[1], x.dtype)
    norm.weight.data, norm.bias.data = weight, bias
    return norm(x)


LIGER, APEX = {"liger": needs("liger_kernel", norm_liger)}, {"apex": needs("apex", norm_apex)}


def add_norm(name, shape, *, film, channels_last=False, backward=False, target_us, factors, extra=None):
    size = 2 * math.prod(shape)
    rivals = {"eager": norm_eager, "compile": compiled(norm_eager), **(extra or {})}
    leaves = ("x", "weight", "bias", *(("scale", "shift") if film else ()))
    add(
        Case(
            name,
            functools.partial(norm_inputs, shape, film, channels_last, backward),
            norm_ours,
            rivals,
            bytes=(3 if backward else 2) * size,
            target_us=target_us,
            factors=factors,
            backward=leaves if backward else (),
        )
    )


DECODER, UPSAMPLER = (64, 320, 64, 64), (8, 320, 256, 256)
add_norm("norm film silu forward", DECODER, film=True, target_us=92,
         factors={"eager": 3.5, "compile": 1.2, "liger": 2.0}, extra=LIGER)  # fmt: skip
add_norm("norm silu forward", DECODER, film=False, target_us=92,
         factors={"eager": 2.0, "compile": 1.2, "liger": 1.3}, extra=LIGER)  # fmt: skip
add_norm("norm silu forward channels_last", DECODER, film=False, channels_last=True, target_us=105,
         factors={"eager": 2.5, "compile": 1.3, "apex": 0.95}, extra=APEX)  # fmt: skip
add_norm("norm silu forward upsampler", UPSAMPLER, film=False, target_us=260,
         factors={"eager": 1.5, "compile": 1.0})  # fmt: skip
add_norm("norm film silu backward", DECODER, film=True, backward=True, target_us=230,
         factors={"eager": 2.3, "compile": 1.1, "liger": 1.5}, extra=LIGER)  # fmt: skip


@functools.cache
def decoder_norms() -> tuple[tuple[tuple[int, ...], bool, str | None], ...]:
    """(shape at batch 1, with FiLM, activation) of each of the 95 norms of the default decoder."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dalle2_fast import Decoder
    from dalle2_fast.modules import GroupNormSiLU

    found = []

    def look(module, args, kwargs):
        found.append((tuple(args[0].shape), kwargs.get("scale") is not None, module.activation))

    with FakeTensorMode(), torch.no_grad():
        net = Decoder().unet
        for module in net.modules():
            if isinstance(module, GroupNormSiLU):
                module.register_forward_pre_hook(look, with_kwargs=True)
        context = net.encode_context(torch.empty(1, 81, net.cross_dim))
        labels = torch.empty(1, net.class_embed_dim or net.embed_dim)
        net(torch.empty(1, 3, 64, 64), torch.empty(1), context, labels)
    return tuple(found)


def all_norms_inputs(device, dtype, tiny):
    draw = drawer(device, dtype)
    inputs = {}
    for index, ((_, c, h, w), film, _) in enumerate(decoder_norms()[:3] if tiny else decoder_norms()):
        c, h, w = (6, 4, 4) if tiny else (c, h, w)
        inputs[f"x{index}"] = draw(2, c, h, w).contiguous(memory_format=torch.channels_last)
        inputs[f"weight{index}"], inputs[f"bias{index}"] = draw(c), draw(c)
        inputs[f"film{index}"] = draw(2, 2 * c) if film else None
    return inputs


def all_norms(function, **inputs):
    outputs = []
    for index, (_, film, activation) in enumerate(decoder_norms()[: len(inputs) // 4]):
        rows = inputs[f"film{index}"].chunk(2, dim=1) if film else (None, None)
        parameters = inputs[f"weight{index}"], inputs[f"bias{index}"]
        outputs.append(function(inputs[f"x{index}"], *parameters, *rows, activation=activation))
    return tuple(outputs)


def all_norms_eager(**inputs):
    return all_norms(norm_eager, **inputs)


add(
    Case(
        "norms of the decoder, batch 2",
        all_norms_inputs,
        lambda impl, **inputs: all_norms(functools.partial(norm_ours, impl), **inputs),
        {"eager": all_norms_eager, "compile": compiled(all_norms_eager)},
        bytes=467_000_000,  # tests/benchmarks adds it up
        target_us=350,
        factors={"eager": 3.0, "compile": 1.5},
    )
)


# -------------------------------------------------------------------------------------------------- attention


def attention_inputs(b, h, t, s, d, image, masked, gradient, device, dtype, tiny):
    b, h, t, s = (2, 2, 20, 9) if tiny else (b, h, t, s)
    draw = drawer(device, dtype)

    def rows(count: int, parts: int) -> tuple[Tensor, ...]:  # views of one projection, as in the U-Net
        return draw(b, count, parts, h, d).permute(2, 0, 3, 1, 4).unbind(0)

    q, *own = rows(t, 3 if image else 1)
    context_k, context_v = rows(s, 2)
    mask = None
    if masked:
        lengths = torch.arange(b, device=device) % s + 1
        mask = torch.arange(s, device=device) < lengths[:, None]
    grad = draw(b, t, h, d).transpose(1, 2) if gradient else None
    return dict(q=q, context_k=context_k, context_v=context_v, context_mask=mask,
                image_k=own[0] if image else None, image_v=own[1] if image else None, grad=grad)  # fmt: skip


def attention_ours(impl, q, context_k, context_v, context_mask=None, image_k=None, image_v=None):
    return functional.cross_attention(q, context_k, context_v, context_mask, image_k, image_v, impl=impl)


def attention_sdpa(q, context_k, context_v, context_mask=None, image_k=None, image_v=None):
    """Concatenation and one scaled_dot_product_attention: what is written without a fused op."""
    k, v, mask = context_k, context_v, context_mask
    if image_k is not None:
        k, v = torch.cat([k, image_k], dim=2), torch.cat([v, image_v], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, image_k.shape[2]), value=True)
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :])


def with_backend(backend: SDPBackend) -> Callable:
    def run(**inputs):
        with sdpa_kernel(backend):
            return attention_sdpa(**inputs)

    return run


def add_attention(
    name, b, h, t, s, d=64, *, image=False, masked=False, backward=False, target_us=None, factors
):
    size = 2 * b * h * d
    keys = s + (t if image else 0)
    forward = size * (2 * t + 2 * keys)
    flops = 4 * b * h * t * keys * d
    if backward:  # out is not read again, P is recomputed: five products where forward has two
        forward, flops = forward + size * (3 * t + 4 * keys), flops * 7 // 2
    rivals = {kind: with_backend(getattr(SDPBackend, backend)) for kind, backend in (
        ("sdpa cudnn", "CUDNN_ATTENTION"), ("sdpa flash", "FLASH_ATTENTION"),
        ("sdpa efficient", "EFFICIENT_ATTENTION"), ("eager", "MATH"),
    )}  # fmt: skip
    leaves = ("q", "context_k", "context_v", *(("image_k", "image_v") if image else ()))
    add(
        Case(
            name,
            functools.partial(attention_inputs, b, h, t, s, d, image, masked, backward),
            attention_ours,
            {**rivals, "compile": compiled(attention_sdpa)},
            bytes=forward,
            flops=flops,
            target_us=target_us,
            factors=factors,
            backward=leaves if backward else (),
            with_forward=backward,
        )
    )


SDPA = ("sdpa cudnn", "sdpa flash", "sdpa efficient")
CROSS = dict(b=16, h=10, t=4096, s=77)
add_attention("cross-attention forward", **CROSS, target_us=52,
              factors={"eager": 8.0, **dict.fromkeys(SDPA, 1.1)})  # fmt: skip
add_attention("cross-attention forward masked", **CROSS, masked=True, factors=dict.fromkeys(SDPA, 1.5))
add_attention("cross-attention forward and backward", **CROSS, backward=True, target_us=180,
              factors=dict.fromkeys(SDPA, 2.0))  # fmt: skip
add_attention("unclip attention, batch 2", 2, 10, 1024, 81, image=True, masked=True, target_us=18,
              factors=dict.fromkeys(SDPA, 1.5))  # fmt: skip
add_attention("unclip attention, batch 64", 64, 10, 1024, 81, image=True, masked=True, target_us=464,
              factors=dict.fromkeys(SDPA, 1.1))  # fmt: skip  # 464 us are 400 TFLOP/s


# --------------------------------------------------------------------------------------------- diffusion step


def step_inputs(b, size, dynamic, device, dtype, tiny):
    b, size = (2, 4) if tiny else (b, size)
    draw = drawer(device, dtype)
    row = torch.tensor([0.8, 0.6, 0.5, 0.4, 0.0, 0.1, -5.0, -4.0], device=device)
    table = row.expand(50, 8).contiguous()
    return dict(
        x=draw(b, 3, size, size),
        output=draw(2 * b, 3 if dynamic else 6, size, size).mul_(0.5),
        table=table,
        step=torch.tensor(7, device=device),
        seeds=torch.arange(b, device=device),
        guidance=torch.tensor(3.0, device=device),
    )


def step_ours(dynamic, impl, x, output, table, step, seeds, guidance):
    bound = dict(dynamic_threshold=0.995) if dynamic else dict(clip=1.0)
    learned_range = output.shape[1] == 2 * x.shape[1]
    return functional.diffusion_step(
        x, output, table.to(torch.float64 if x.dtype == torch.float64 else table.dtype), step, seeds=seeds,
        guidance=guidance, learned_range=learned_range, impl=impl, **bound,
    )  # fmt: skip


def step_eager(dynamic, x, output, table, step, seeds, guidance):
    """The same chain as samplers write it, with torch's own noise."""
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


def add_step(name, b, size, *, dynamic=False, wall=False, factors, **goals):
    eager = functools.partial(step_eager, dynamic)
    elements = 2 * b * 3 * size * size
    add(
        Case(
            name,
            functools.partial(step_inputs, b, size, dynamic),
            functools.partial(step_ours, dynamic),
            {"eager": eager, "compile": compiled(eager)},
            # x, the two predictions and the conditional range in; x_next and x0 out
            bytes=elements * (1 + 2 + (0 if dynamic else 1) + 2),
            factors=factors,
            checked=(1,),
            wall=wall,
            **goals,
        )
    )


# tests/ops/test_graphs.py holds the other goal of the small step: no recompilation in 50 steps.
add_step("diffusion step, decoder, batch 4", 4, 64, launches=1, target_us=3, factors={})
add_step("diffusion step, decoder, batch 4, wall", 4, 64, wall=True, factors={"eager": 15.0})
add_step("diffusion step, 256 px, batch 64", 64, 256, share=0.8, factors={"eager": 8.0, "compile": 0.95})
add_step("diffusion step, dynamic threshold, batch 64", 64, 256, dynamic=True, launches=2,
         factors={"eager": 5.0, "compile": 3.0})  # fmt: skip
