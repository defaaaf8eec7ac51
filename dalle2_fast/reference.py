"""The specification of every op: plain, differentiable torch.

A kernel is right when it agrees with the function of the same name in this file, evaluated in float64. The
functions here expect arguments that `functional` has checked. float16 and bfloat16 are widened to float32 for
the maths and rounded once at the end; float32 and float64 are computed as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maths on `dtype` is done."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B, ...] -> [B, ..., 1, 1] so that it broadcasts over the trailing dimensions of `like`."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


# ------------------------------------------------------------------------------------------------- group norm


def group_norm_silu(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    activation: str | None,
) -> Tensor:  # [N, C, *], dtype and memory format of x
    """y = act(gn(x) * (1 + scale) + shift)"""
    wide = _wide(x.dtype)
    layout = _memory_format(x)
    y = x.to(wide)
    if layout != torch.contiguous_format and x.numel() > 0:
        # In this layout torch's CPU variance is E[x^2] - E[x]^2: float32 results are 8 % off for mean 1e3 and
        # sigma 1. The norm does not see a constant taken from a whole group: take its first element away.
        group_width = x.shape[1] // num_groups
        first = y.detach()[(slice(None), slice(None, None, group_width)) + (0,) * (x.dim() - 2)]  # [N, G]
        y = y - _per_sample(first.repeat_interleave(group_width, dim=1), x)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's backward fails on a bias without a weight
    y = F.group_norm(
        y,
        num_groups,
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        eps,
    )
    if scale is not None:
        gain = _per_sample(1 + scale.to(wide), x)
        # addcmul is one pass over y where a product and a sum would be two.
        y = y * gain if shift is None else torch.addcmul(_per_sample(shift.to(wide), x), y, gain)
    elif shift is not None:
        y = y + _per_sample(shift.to(wide), x)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=layout)


# -------------------------------------------------------------------------------------------------- attention


def cross_attention(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None,  # bool [B, S], True = attend
    image_k: Tensor | None,  # [B, H, T2, D]
    image_v: Tensor | None,  # [B, H, T2, D]
    softmax_scale: float,
) -> Tensor:  # [B, H, T, D]
    """softmax(softmax_scale q [context_k; image_k]^T) [context_v; image_v]; zero without keys"""
    mask = context_mask
    empty = None
    if image_k is not None:
        k = torch.cat((context_k, image_k), dim=2)
        v = torch.cat((context_v, image_v), dim=2)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(mask.shape[0], image_k.shape[2])), dim=1)
    else:
        k, v = context_k, context_v
    if k.shape[2] == 0:
        return q * 0 if q.requires_grad else torch.zeros_like(q)
    if mask is not None:
        if image_k is None or image_k.shape[2] == 0:
            # A softmax over nothing is 0 / 0 forward and backward. Let such rows attend to everything and
            # discard what they found: zeros, and zero gradients, whatever the backend under SDPA does.
            empty = ~mask.any(dim=1)[:, None]
            mask = mask | empty
        mask = mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out if empty is None else out.masked_fill(empty[:, None, None], 0)


# ------------------------------------------------------------------------------------------------------ noise

_LOW_32_BITS = 0xFFFFFFFF
# Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): multipliers and the
# Weyl increments of the key.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # four int64 tensors holding 32-bit words
    key: tuple[Tensor, Tensor],  # two int64 tensors holding 32-bit words
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # four int64 tensors holding 32-bit words
    """Philox4x32 with ten rounds. The six words may have any shapes that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps modulo 2^64, so its bit pattern is the unsigned 64-bit product. The shift
        # copies the sign into the upper half; the mask after the exclusive or removes it.
        product0 = c0 * _PHILOX_M0
        product1 = c2 * _PHILOX_M1
        c0 = (product1 >> 32).bitwise_xor(c1).bitwise_xor(k0).bitwise_and(_LOW_32_BITS)
        c2 = (product0 >> 32).bitwise_xor(c3).bitwise_xor(k1).bitwise_and(_LOW_32_BITS)
        c1 = product1.bitwise_and(_LOW_32_BITS)
        c3 = product0.bitwise_and(_LOW_32_BITS)
        k0 = (k0 + _PHILOX_W0) & _LOW_32_BITS
        k1 = (k1 + _PHILOX_W1) & _LOW_32_BITS
    return c0, c1, c2, c3


def _normal_pair(word0: Tensor, word1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Box-Muller: two words -> two independent standard normal numbers."""
    # The uniforms are float32 whatever the dtype (u in (0, 1], the product is exact), so that a float64 run
    # sees the same numbers as a float32 one and not others that differ by the rounding of u.
    uniform0 = (word0.to(torch.float32) * 2.0**-32 + 2.0**-33).to(dtype)
    uniform1 = (word1.to(torch.float32) * 2.0**-32).to(dtype)
    radius = uniform0.log_().mul_(-2).sqrt_()
    angle = uniform1.mul_(6.283185307179586)
    return radius * angle.cos(), radius * angle.sin()


def sample_noise(
    seeds: Tensor,  # int64 [B]
    step: int | Tensor,  # >= 0; a tensor is a scalar
    shape: tuple[int, ...],  # (B, *)
    dtype: torch.dtype,
) -> Tensor:  # [B, *] on the device of seeds
    """noise[b, 4 i + j] = normal j of Philox(key = seeds[b], counter = (i, step))"""
    wide = _wide(dtype)
    batch = shape[0]
    elements = 1
    for size in shape[1:]:
        elements *= size
    blocks = torch.arange((elements + 3) // 4, device=seeds.device)[None]  # [1, blocks]
    if isinstance(step, Tensor):
        step = step.to(torch.int64).reshape(1, 1)
        step_low, step_high = step & _LOW_32_BITS, (step >> 32) & _LOW_32_BITS
    else:
        step_low = torch.full((1, 1), step & _LOW_32_BITS, dtype=torch.int64, device=seeds.device)
        step_high = torch.full((1, 1), step >> 32, dtype=torch.int64, device=seeds.device)
    seeds = seeds[:, None]
    words = philox_4x32_10(
        (blocks & _LOW_32_BITS, blocks >> 32, step_low, step_high),
        (seeds & _LOW_32_BITS, (seeds >> 32) & _LOW_32_BITS),
    )
    normals = _normal_pair(words[0], words[1], wide) + _normal_pair(words[2], words[3], wide)
    flat = torch.stack(normals, dim=-1).reshape(batch, blocks.shape[1] * 4)[:, :elements]
    return flat.reshape(shape).to(dtype)


# ------------------------------------------------------------------------------------------------- diffusion


def add_noise(
    x0: Tensor,  # [B, *]
    alpha: Tensor,  # [B]
    sigma: Tensor,  # [B]
    noise: Tensor,  # [B, *]
) -> Tensor:  # [B, *], dtype of x0
    """x_t = alpha x0 + sigma noise"""
    wide = _wide(x0.dtype)
    signal = _per_sample(alpha.to(wide), x0) * x0.to(wide)
    return torch.addcmul(signal, _per_sample(sigma.to(wide), x0), noise.to(wide)).to(x0.dtype)


def predict_x0(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """x0 from what the network predicts, where x = alpha x0 + sigma epsilon"""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":  # v = alpha epsilon - sigma x0 (Salimans and Ho, 2202.00512, appendix D)
        return alpha * x - sigma * output
    return output


def _quantile(magnitude: Tensor, p: float) -> Tensor:  # [B, n] -> [B]
    """The p-quantile of each row with linear interpolation, as torch.quantile but for rows of any length."""
    n = magnitude.shape[1]
    position = p * (n - 1)
    below = min(int(position), n - 1)
    largest = magnitude.topk(n - below, dim=1).values  # descending: the last one has rank `below`
    value = largest[:, -1]
    if below + 1 < n:
        value = torch.lerp(value, largest[:, -2], position - below)
    return value


def diffusion_step(
    x: Tensor,  # [B, C, *]
    model_output: Tensor,  # [B or 2B, C or 2C, *]
    table: Tensor,  # [steps, 8]: alpha, sigma, a, b, c, std, log_var_min, log_var_max
    step: int | Tensor,  # the row; a tensor is a scalar
    seeds: Tensor | None,  # int64 [B]
    guidance: float | Tensor | None,  # number, scalar or [B]
    guidance_rescale: float,
    prediction: str,
    clip: float | None,
    dynamic_threshold: float | None,
    learned_range: bool,
    previous_x0: Tensor | None,  # [B, C, *]
) -> tuple[Tensor, Tensor]:  # x_next, x0: [B, C, *], dtype of x
    """x_next = a x + b x0 + c previous_x0 + std noise(seed, step)"""
    wide = _wide(x.dtype)
    batch, channels = x.shape[:2]
    # index_select, because table[step] with a tensor on the GPU would wait for the device.
    row = table.index_select(0, step.reshape(1))[0] if isinstance(step, Tensor) else table[step]
    alpha, sigma, a, b, c, std, log_var_min, log_var_max = row.to(wide).unbind()

    output = model_output.to(wide)
    range_position = None
    if learned_range:
        # The variance is not guided: the conditional rows' prediction is the one that is meant.
        output, range_position = output[:, :channels], output[:batch, channels:]
    if guidance is not None:
        conditional, unconditional = output[:batch], output[batch:]
        if isinstance(guidance, Tensor):
            guidance = _per_sample(guidance.to(wide), output)
        output = unconditional + guidance * (conditional - unconditional)
        if guidance_rescale > 0:  # Lin et al., 2305.08891, equations 15 and 16
            dims = tuple(range(1, output.dim()))
            tiny = torch.finfo(wide).tiny
            ratio = conditional.std(dims, keepdim=True) / output.std(dims, keepdim=True).clamp_min(tiny)
            output = output * (guidance_rescale * ratio + (1 - guidance_rescale))

    state = x.to(wide)
    x0 = predict_x0(state, output, alpha, sigma, prediction)
    if dynamic_threshold is not None:  # Saharia et al., 2205.11487, section 2.3
        bound = 1.0 if clip is None else clip
        limit = _quantile(x0.flatten(1).abs(), dynamic_threshold).clamp_min(bound)
        limit = _per_sample(limit, x0)
        x0 = torch.minimum(torch.maximum(x0, -limit), limit) * (bound / limit)
    elif clip is not None:
        x0 = x0.clamp(-clip, clip)

    x_next = a * state + (b * x0 + c * (x0 if previous_x0 is None else previous_x0.to(wide)))
    if seeds is not None:
        noise = sample_noise(seeds, step, tuple(x.shape), wide)
        if range_position is not None:  # Nichol and Dhariwal, 2102.09672, equation 15
            fraction = (range_position + 1) / 2
            log_var = fraction * log_var_max + (1 - fraction) * log_var_min
            std = torch.exp(0.5 * log_var) * (std > 0)
        x_next = x_next + std * noise
    return x_next.to(x.dtype), x0.to(x.dtype)


# ----------------------------------------------------------------------------------------------- contrastive


def _without_autocast(device: torch.device) -> AbstractContextManager:
    if device.type == "meta":  # knows no autocast; to ask torch for it would break torch 2.11's compiler
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _logits(
    rows: Tensor, columns: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> Tensor:
    logits = logit_scale * (rows @ columns.T)
    return logits if logit_bias is None else logits + logit_bias


def contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
) -> Tensor:  # scalar
    """mean over i of (-log softmax_j(L[i, j])[i] - log softmax_j(L[j, i])[i]) / 2,  L = scale I T^T + bias"""
    wide = _wide(image_features.dtype)
    with _without_autocast(image_features.device):
        logits = _logits(image_features.to(wide), text_features.to(wide), logit_scale, logit_bias)
        matched = torch.arange(logits.shape[0], device=logits.device)
        return 0.5 * (F.cross_entropy(logits, matched) + F.cross_entropy(logits.T, matched))


def sigmoid_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
) -> Tensor:  # scalar
    """sum over i, j of -log sigmoid(z L[i, j]) / N, z = 1 on the diagonal and -1 elsewhere"""
    wide = _wide(image_features.dtype)
    with _without_autocast(image_features.device):
        logits = _logits(image_features.to(wide), text_features.to(wide), logit_scale, logit_bias)
        signs = torch.full_like(logits, -1, requires_grad=False).fill_diagonal_(1)
        return -F.logsigmoid(signs * logits).sum() / logits.shape[0]


def soft_contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
) -> Tensor:  # scalar
    """mean over i of the cross-entropies of L[i, :] and L[:, i] against P[i, :], halved,
    L = scale I T^T, P = softmax(scale (I I^T + T T^T) / 2) without gradient"""
    wide = _wide(image_features.dtype)
    with _without_autocast(image_features.device):
        image, text = image_features.to(wide), text_features.to(wide)
        logits = _logits(image, text, logit_scale, None)
        with torch.no_grad():
            targets = (logit_scale * 0.5 * (image @ image.T + text @ text.T)).softmax(dim=1)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
