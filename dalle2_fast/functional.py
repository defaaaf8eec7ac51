"""The ops of dalle2_fast as functions: check the arguments, choose an implementation, call it.

Every function takes `impl`: "auto" (the fused kernel where one can run, otherwise the reference), "reference"
or "fused" (raises where it cannot run; there is no silent fall-back).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast import reference
from dalle2_fast.ops import _checks, _dispatch

__all__ = [
    "add_noise",
    "contrastive_loss",
    "cross_attention",
    "diffusion_step",
    "group_norm_silu",
    "sample_noise",
    "sigmoid_loss",
    "soft_contrastive_loss",
]


def group_norm_silu(
    x: Tensor,  # [N, C, *]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    activation: str | None = "silu",
    impl: str = "auto",
) -> Tensor:  # [N, C, *]
    """Group normalisation, an optional scale and shift per sample (FiLM), and SiLU: one op.

    y = act(gn(x) * (1 + scale) + shift), gn(x) = (x - mean) / sqrt(var + eps) * weight + bias, where mean and
    the biased variance are taken over each sample's group of C / num_groups channels and all positions.

    Args:
        x: floating point; 2 to 5 dimensions are usual, contiguous or channels_last.
        num_groups: a divisor of C.
        weight, bias: parameters of the norm, any floating dtype. None means 1 and 0.
        eps: added to the variance, >= 0.
        scale, shift: per sample and channel, any floating dtype. None means 0.
        activation: "silu" or None.
        impl: "auto", "reference" or "fused".

    Returns:
        The dtype of x. Statistics and maths are float32 (float64 for float64 input), rounded once at the end;
        autocast does not change this.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Wu and He, 1803.08494 (group norm); Dhariwal and Nichol, 2105.05233, equation 4 (scale and shift).
    """
    _checks.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation)
    if _dispatch.use_reference(impl, x):
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, scale, shift, activation)
    return torch.ops.dalle2_fast.group_norm_silu(
        x, num_groups, weight, bias, float(eps), scale, shift, activation == "silu"
    )[0]


def cross_attention(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None = None,  # bool [B, S]
    image_k: Tensor | None = None,  # [B, H, T2, D]
    image_v: Tensor | None = None,  # [B, H, T2, D]
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # [B, H, T, D]
    """Attention of q on context keys and, in the same softmax, optionally on the image's own keys.

    out = softmax(softmax_scale * q [context_k; image_k]^T) [context_v; image_v]. Without image keys this is
    plain (cross-)attention; `cross_attention(q, k, v)` is bidirectional self-attention.

    Args:
        q, context_k, context_v, image_k, image_v: one floating dtype (any mix under autocast, which casts all
            to its dtype), any strides.
        context_mask: True = attend. Image keys are always attended to.
        softmax_scale: D ** -0.5 when None.
        impl: "auto", "reference" or "fused".

    Returns:
        The dtype of q; under autocast the autocast dtype. A query that may attend to no key at all gives
        zeros, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or only one of image_k and
            image_v is given, or impl="fused" and D > 128.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Vaswani et al., 1706.03762; the joint softmax over text and image keys: GLIDE, 2112.10741.
    """
    _checks.cross_attention(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    tensors = (q, context_k, context_v, image_k, image_v)
    if _dispatch.use_reference(impl, *tensors) or _attention_needs_reference(impl, *tensors, context_mask):
        return reference.cross_attention(
            q, context_k, context_v, context_mask, image_k, image_v, softmax_scale
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, context_k, context_v, image_k, image_v = (x if x is None else x.to(dtype) for x in tensors)
    return torch.ops.dalle2_fast.cross_attention(
        q, context_k, context_v, context_mask, image_k, image_v, softmax_scale
    )[0]


# (compute capability, D) -> the least T and S from which scaled_dot_product_attention, which the reference
# calls, is faster than the kernel where there is neither a mask nor image keys: ((9, 0), 64): 2048 would be
# for H100 and D = 64. An entry needs its measurement. Empty: none has been made, so all shapes run fused.
_LIBRARY_ATTENTION_FROM: dict[tuple[tuple[int, int], int], int] = {}
_MAX_HEAD_WIDTH = 128


def _attention_needs_reference(impl, q, context_k, context_v, image_k, image_v, context_mask) -> bool:
    width = q.shape[3]
    if width > _MAX_HEAD_WIDTH:
        if impl == "fused":
            expected = f'a head width D <= {_MAX_HEAD_WIDTH} with impl="fused"'
            raise ValueError(f"q: expected {expected}, got {width}")
        return True
    if impl == "fused" or not _LIBRARY_ATTENTION_FROM or context_mask is not None or image_k is not None:
        return False
    least = _LIBRARY_ATTENTION_FROM.get((torch.cuda.get_device_capability(q.device), width))
    return least is not None and min(q.shape[2], context_k.shape[2]) >= least


def sample_noise(
    seeds: Tensor,  # int64 [B]
    step: int | Tensor,
    shape: Sequence[int],  # (B, *)
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, *]
    """Standard normal noise that depends on (seed, step, element), not on batch mates or the device.

    Element e of sample b is normal number e % 4 of Philox4x32-10 with key seeds[b] and counter (e // 4,
    step); elements count in the order of a contiguous tensor. Words become numbers by Box-Muller in float32.

    Args:
        seeds: one per sample; all 64 bits count.
        step: >= 0; an int, or an int64 scalar tensor on the device of the noise.
        shape: of the noise; shape[0] is the number of seeds.
        device: where the noise is wanted; the device of seeds when None.
        dtype: floating; every dtype gets the same numbers, rounded.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if device is not None:
        _checks.tensor("seeds", seeds)
        seeds = seeds.to(device)
    _checks.sample_noise(seeds, step, shape, dtype)
    if _dispatch.use_reference("auto", torch.empty(0, dtype=dtype, device=seeds.device)):
        return reference.sample_noise(seeds, step, tuple(shape), dtype)
    return torch.ops.dalle2_fast.sample_noise(seeds, *_tensor_or_number(step), tuple(shape), dtype)


def _tensor_or_number(step: int | Tensor) -> tuple[Tensor | None, int]:
    """A step as the ops take it: what is on the device stays there, and a number is not sent there."""
    return (step, 0) if isinstance(step, Tensor) else (None, step)


def add_noise(
    x0: Tensor,  # [B, *]
    alpha: Tensor,  # [B]
    sigma: Tensor,  # [B]
    noise: Tensor | None = None,  # [B, *]
    seeds: Tensor | None = None,  # int64 [B]
    step: int | Tensor = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # x_t, noise: [B, *]
    """The forward process: x_t = alpha x0 + sigma noise.

    Args:
        x0: clean samples, floating.
        alpha, sigma: floating, one per sample.
        noise: standard normal, the shape of x0; or
        seeds, step: draw it by `sample_noise`. Exactly one of noise and seeds is given.
        impl: "auto", "reference" or "fused".

    Returns:
        x_t in the dtype of x0 (the maths is float32, or float64 for float64 input), and the noise that was
        added.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; both or neither of noise and
            seeds.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Kingma et al., 2107.00630, equation 1.
    """
    _checks.add_noise(x0, alpha, sigma, noise, seeds, step)
    if _dispatch.use_reference(impl, x0, noise):
        if noise is None:
            noise = reference.sample_noise(seeds, step, tuple(x0.shape), x0.dtype)
        return reference.add_noise(x0, alpha, sigma, noise), noise
    if noise is None:
        return torch.ops.dalle2_fast.add_drawn_noise(x0, alpha, sigma, seeds, *_tensor_or_number(step))
    return torch.ops.dalle2_fast.add_noise(x0, alpha, sigma, noise), noise


def diffusion_step(
    x: Tensor,  # [B, C, *]
    model_output: Tensor,  # [B or 2B, C or 2C, *]
    table: Tensor,  # [steps, 8]
    step: int | Tensor,
    *,
    seeds: Tensor | None = None,  # int64 [B]
    guidance: float | Tensor | None = None,  # number, scalar or [B]
    guidance_rescale: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    dynamic_threshold: float | None = None,
    learned_range: bool = False,
    previous_x0: Tensor | None = None,  # [B, C, *]
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # x_next, x0: [B, C, *]
    """One step of any sampler, from the network's output to the next x.

    Guidance, then x0 from the prediction, then its bound, then the update that DDPM, DDIM and
    DPM-Solver++(2M) share because each of them is linear:

        x_next = a x + b x0 + c previous_x0 + std noise(seed, step)

    Args:
        x: the current samples, x = alpha x0 + sigma epsilon.
        model_output: what the network returned. With guidance its first B rows are conditional, the last B
            unconditional. With learned_range it has 2C channels, the second half in about [-1, 1].
        table: float32 on the device of x; a row per step, columns (alpha, sigma, a, b, c, std, log_var_min,
            log_var_max).
        step: the row; an int, or an int64 scalar tensor on the device of x (then nothing waits for the
            device).
        seeds: per sample, for the noise of this step. None leaves the noise out, whatever std is: the mean of
            the update, which is all there is when the sampler is deterministic.
        guidance: out = unconditional + guidance * (conditional - unconditional). A float must be finite. None
            means that the network was run without unconditional rows.
        guidance_rescale: in [0, 1]; how far the guided output is brought back to the standard deviation of
            the conditional one.
        prediction: "epsilon", "sample" (x0) or "v_prediction" (v = alpha epsilon - sigma x0).
        clip: x0 is clamped to [-clip, clip].
        dynamic_threshold: a quantile p in (0, 1]: x0 is clamped to [-s, s] with s = max(quantile_p(|x0|),
            bound) per sample and brought back to [-bound, bound]; bound is clip, or 1 without clip.
        learned_range: the noise's standard deviation is exp(log_var / 2) with log_var between log_var_min
            (v = -1) and log_var_max (v = 1), v the second half of the network's conditional rows. Where
            std is 0 (the last step) no noise is added.
        previous_x0: x0 of the step before, for multistep samplers. None: x0 itself stands in for it.
        impl: "auto", "reference" or "fused".

    Returns:
        x_next and x0 (bounded), in the dtype of x; the maths is float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
        RuntimeError: impl="fused" and no kernel can run here, or an input requires a gradient, which only the
            reference has (impl="auto" then takes it).

    Sources: Ho et al., 2006.11239; Nichol and Dhariwal, 2102.09672, equation 15; Song et al., 2010.02502,
    equation 12; Lu et al., 2211.01095, algorithm 2; Ho and Salimans, 2207.12598; Lin et al., 2305.08891,
    section 3.4; Saharia et al., 2205.11487, section 2.3.
    """
    _checks.diffusion_step(
        x, model_output, table, step, seeds, guidance, guidance_rescale, prediction, clip, dynamic_threshold,
        learned_range, previous_x0,
    )  # fmt: skip
    inputs = (x, model_output, table, guidance, previous_x0)
    tracked = _is_tracked(*inputs)
    if _dispatch.use_reference(impl, x, model_output, previous_x0) or (tracked and impl == "auto"):
        return reference.diffusion_step(
            x, model_output, table, step, seeds, guidance, guidance_rescale, prediction, clip,
            dynamic_threshold, learned_range, previous_x0,
        )  # fmt: skip
    if tracked:
        raise RuntimeError(
            'impl="fused": diffusion_step has no fused gradient; use impl="auto" or torch.no_grad()'
        )
    guidance_tensor, guidance = (guidance, None) if isinstance(guidance, Tensor) else (None, guidance)
    return torch.ops.dalle2_fast.diffusion_step(
        x, model_output, table, *_tensor_or_number(step), seeds, guidance_tensor, guidance, guidance_rescale,
        prediction, clip, dynamic_threshold, learned_range, previous_x0,
    )  # fmt: skip


def contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:  # scalar
    """Symmetric InfoNCE: mean cross-entropy of finding each image's text and each text's image.

    Fused, the N^2 logits exist a tile at a time: beside the gradients it takes a workspace of 16 MB on the
    CPU and 256 MB on a GPU, whatever N is. It then has no second derivative.

    Args:
        image_features, text_features: floating; row i of one belongs to row i of the other. Usually of unit
            norm.
        logit_scale: factor of the inner products (a temperature's inverse, already exponentiated).
        logit_bias: added to every logit (it cancels; accepted because open_clip does).
        impl: "auto", "reference" or "fused".

    Returns:
        A float32 scalar (float64 for float64 features). The maths is float32 also under autocast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or the batch is empty.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Radford et al., 2103.00020, figure 3.
    """
    _checks.contrastive(image_features, text_features, logit_scale, logit_bias)
    if not _dispatch.use_native(impl, image_features, text_features):
        return reference.contrastive_loss(image_features, text_features, logit_scale, logit_bias)
    scale = _scalar(logit_scale, image_features)
    loss = torch.ops.dalle2_fast.contrastive_loss(image_features, text_features, scale)[0]
    if isinstance(logit_bias, Tensor):  # it cancels; its gradient is 0, not None
        loss = loss + 0 * logit_bias.to(loss).reshape(())
    return loss


def sigmoid_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    impl: str = "auto",
) -> Tensor:  # scalar
    """SigLIP's loss: every pair of the batch is a binary question. Sum over pairs, divided by N.

    Arguments, dtypes and errors as `contrastive_loss`; logit_bias is required (it is -10 at the start of
    training).

    Source: Zhai et al., 2303.15343, equation 1.
    """
    _checks.contrastive(image_features, text_features, logit_scale, logit_bias)
    if logit_bias is None:
        raise TypeError("logit_bias: expected a number or a scalar tensor, got None")
    if not _dispatch.use_native(impl, image_features, text_features):
        return reference.sigmoid_loss(image_features, text_features, logit_scale, logit_bias)
    tracked = _is_tracked(image_features, text_features, logit_scale, logit_bias)
    scale, bias = _scalar(logit_scale, image_features), _scalar(logit_bias, image_features)
    op = torch.ops.dalle2_fast.sigmoid_loss
    return op(image_features, text_features, scale, bias, 0, False, tracked)[0]


def soft_contrastive_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    impl: str = "auto",
) -> Tensor:  # scalar
    """`contrastive_loss` with soft targets: pairs that resemble each other are not pushed fully apart.

    The targets are softmax(logit_scale * (I I^T + T T^T) / 2), row by row, for both directions. They carry no
    gradient: otherwise features could lower the loss by moving the targets. Arguments, dtypes and errors as
    `contrastive_loss`.
    """
    _checks.contrastive(image_features, text_features, logit_scale)
    if not _dispatch.use_native(impl, image_features, text_features):
        return reference.soft_contrastive_loss(image_features, text_features, logit_scale)
    tracked = _is_tracked(image_features, text_features, logit_scale)
    scale = _scalar(logit_scale, image_features)
    return torch.ops.dalle2_fast.soft_contrastive_loss(image_features, text_features, scale, tracked)[0]


def _scalar(value: Tensor | float, beside: Tensor) -> Tensor:
    """[], on the device of `beside` and in the dtype of sums of its values."""
    dtype = torch.float64 if beside.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        return value.to(beside.device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=beside.device)


def _is_tracked(*values: Tensor | float) -> bool:
    """Whether a gradient will be wanted."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
