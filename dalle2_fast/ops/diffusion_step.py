"""x_next = a x + b x0 + c previous_x0 + std noise(seed, step)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype, per_sample
from dalle2_fast.ops.noise import sample_noise_reference, tensor_or_number

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_TABLE_COLUMNS = 8


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
    """One step of any sampler: from the output of the network to the next x.

    Guidance comes first, then x0 from the prediction, then its clipping, then the update that DDPM, DDIM and
    DPM-Solver++(2M) share because each of them is linear:

        x_next = a x + b x0 + c previous_x0 + std noise(seed, step)

    Args:
        x: current samples [B, C, *]; x = alpha x0 + sigma epsilon.
        model_output: output of the network, floating. Without guidance it has B rows; with guidance 2B, of
            which the first B are conditional and the last B unconditional. It has C channels; with
            learned_range 2C, of which the second half is in about [-1, 1].
        table: float32 or float64 [steps, 8] on the device of x. Each row is one step; its columns are (alpha,
            sigma, a, b, c, std, log_var_min, log_var_max).
        step: row of the table: an int, or an int64 scalar tensor on the device of x. With a tensor nothing
            waits for the device. Its value is therefore not checked on a GPU: if it is no row of the table,
            x_next is NaN.
        seeds: int64 [B], seeds of the noise of this step. None adds no noise, also where std > 0: x_next is
            the mean of the update. That is the whole update of a deterministic sampler.
        guidance: weight w of out = unconditional + w * (conditional - unconditional): a finite number, a
            scalar tensor or a tensor [B]. None means that model_output has no unconditional rows.
        guidance_rescale: number in [0, 1]; how far the standard deviation of the guided output is brought
            back to that of the conditional output.
        prediction: what the network predicts: "epsilon", "sample" (x0) or "v_prediction" (v = alpha epsilon -
            sigma x0).
        clip: number > 0; x0 is clamped to [-clip, clip].
        dynamic_threshold: quantile p in (0, 1]. Per sample, x0 is clamped to [-s, s] with s =
            max(quantile_p(|x0|), clip) and scaled to [-clip, clip]; here clip is 1 where it is not given.
        learned_range: the standard deviation of the noise is exp(log_var / 2), where log_var goes from
            log_var_min (v = -1) to log_var_max (v = 1) and v is the second half of the conditional rows'
            channels. Where std is 0 (the last step) no noise is added.
        previous_x0: x0 of the previous step [B, C, *], for multistep samplers. None means x0 of this step.
        impl: "auto", "reference" or "fused".

    Returns:
        x_next and the clipped x0, both [B, C, *] in the dtype of x. The maths is float32 (float64 for a
        float64 x).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: impl="fused" and no kernel can run here, or an input requires a gradient, which only the
            reference has (impl="auto" then takes it).

    Source: Ho et al., 2006.11239; Nichol and Dhariwal, 2102.09672, equation 15; Song et al., 2010.02502,
    equation 12; Lu et al., 2211.01095, algorithm 2; Ho and Salimans, 2207.12598; Lin et al., 2305.08891,
    section 3.4; Saharia et al., 2205.11487, section 2.3.

    Example:
        >>> from dalle2_fast import functional
        >>> x, model_output = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 4, 4)
        >>> table = torch.tensor([[0.8, 0.6, 0.5, 0.5, 0.0, 0.1, -4.0, -1.0]])  # a sampler of one step
        >>> options = dict(seeds=torch.tensor([7, 8]), guidance=3.0, clip=1.0)
        >>> x_next, x0 = functional.diffusion_step(x, model_output, table, 0, **options)
        >>> x_next.shape, bool(x0.abs().max() <= 1)
        (torch.Size([2, 3, 4, 4]), True)
    """
    tensors: dict[str, Any] = dict(seeds=seeds, guidance=guidance, previous_x0=previous_x0)
    options: dict[str, Any] = dict(
        guidance_rescale=guidance_rescale,
        prediction=prediction,
        clip=clip,
        dynamic_threshold=dynamic_threshold,
        learned_range=learned_range,
    )
    _check_arguments(x, model_output, table, step, **tensors, **options)
    tracked = _dispatch.needs_gradient(x, model_output, table, guidance, previous_x0)
    tensors_in = (x, model_output, previous_x0)
    if (tracked and impl == "auto") or _dispatch.use_reference(impl, *tensors_in):
        return diffusion_step_reference(x, model_output, table, step, **tensors, **options)
    if tracked:
        raise RuntimeError(
            'impl="fused": diffusion_step has no fused gradient; use impl="auto" or torch.no_grad()'
        )
    guidance_tensor, guidance_number = (guidance, None) if isinstance(guidance, Tensor) else (None, guidance)
    # The order is that of the schema in kernels/diffusion/op.py: keywords cost 4 us (one CPU host).
    return torch.ops.dalle2_fast.diffusion_step(
        x, model_output, table, *tensor_or_number(step), seeds, guidance_tensor, guidance_number,
        guidance_rescale, prediction, clip, dynamic_threshold, learned_range, previous_x0,
    )  # fmt: skip


def _check_arguments(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    seeds: Tensor | None,
    guidance: float | Tensor | None,
    previous_x0: Tensor | None,
    learned_range: bool,
    **options,
) -> None:
    _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, C, ...] with at least 2 dimensions, got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    trailing = ", ..." if x.dim() > 2 else ""

    _checks.floating("model_output", model_output)
    rows, row_letters = (batch, "B") if guidance is None else (2 * batch, "2B")
    _checks.flag("learned_range", learned_range)
    outputs, output_letters = (2 * channels, "2C") if learned_range else (channels, "C")
    letters = f"{row_letters}, {output_letters}{trailing}"
    _checks.shape("model_output", model_output, letters, (rows, outputs, *x.shape[2:]))
    _checks.same_device("model_output", model_output, "x", x)

    _checks.floating("table", table)
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"table: expected torch.float32 or torch.float64, got {table.dtype}")
    if table.dim() != 2 or table.shape[1] != _TABLE_COLUMNS or table.shape[0] == 0:
        raise ValueError(f"table: expected [steps >= 1, {_TABLE_COLUMNS}], got {tuple(table.shape)}")
    _checks.same_device("table", table, "x", x)
    _checks.step_index(step, x, length=table.shape[0])

    if seeds is not None:
        _checks.seeds_and_step(seeds, step, batch)
        _checks.same_device("seeds", seeds, "x", x)
    if isinstance(guidance, Tensor):
        _checks.real("guidance", guidance)
        if guidance.dim() > 0:
            _checks.shape("guidance", guidance, "B", (batch,))
        _checks.same_device("guidance", guidance, "x", x)
    elif guidance is not None:
        _checks.finite_number("guidance", guidance)
    if previous_x0 is not None:
        _checks.floating("previous_x0", previous_x0)
        _checks.shape("previous_x0", previous_x0, f"B, C{trailing}", x.shape)
        _checks.same_device("previous_x0", previous_x0, "x", x)
    _check_options(guided=guidance is not None, **options)


def _check_options(
    *,
    guided: bool,
    guidance_rescale: float,
    prediction: str,
    clip: float | None,
    dynamic_threshold: float | None,
) -> None:
    _checks.finite_number("guidance_rescale", guidance_rescale)
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale: expected a number in [0, 1], got {guidance_rescale}")
    if guidance_rescale > 0 and not guided:
        raise ValueError(f"guidance_rescale: expected 0 because guidance is None, got {guidance_rescale}")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction: expected one of {_PREDICTIONS}, got {prediction!r}")
    if clip is not None:
        _checks.positive_number("clip", clip)
    if dynamic_threshold is not None:
        _checks.positive_number("dynamic_threshold", dynamic_threshold)
        if dynamic_threshold > 1:
            raise ValueError(f"dynamic_threshold: expected a quantile in (0, 1], got {dynamic_threshold}")


def diffusion_step_reference(
    x: Tensor,  # [B, C, *]
    model_output: Tensor,  # [B or 2B, C or 2C, *]
    table: Tensor,  # [steps, 8]: alpha, sigma, a, b, c, std, log_var_min, log_var_max
    step: int | Tensor,  # the row; a tensor is a scalar
    *,
    seeds: Tensor | None = None,  # int64 [B]
    guidance: float | Tensor | None = None,  # number, scalar or [B]
    guidance_rescale: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    dynamic_threshold: float | None = None,
    learned_range: bool = False,
    previous_x0: Tensor | None = None,  # [B, C, *]
) -> tuple[Tensor, Tensor]:  # x_next, x0: [B, C, *], dtype of x
    """x_next = a x + b x0 + c previous_x0 + std noise(seed, step)"""
    dtype = compute_dtype(x.dtype)
    batch, channels = x.shape[:2]
    row = _row_on_device(table, step) if isinstance(step, Tensor) else table[step]
    alpha, sigma, a, b, c, std, log_var_min, log_var_max = row.to(dtype).unbind()

    output = model_output.to(dtype)
    variance_logit = None
    if learned_range:
        # The variance is not guided: it is that of the conditional rows.
        output, variance_logit = output[:, :channels], output[:batch, channels:]
    if guidance is not None:
        output = _guide(output[:batch], output[batch:], guidance, guidance_rescale)

    state = x.to(dtype)
    x0 = predict_x0(state, output, alpha, sigma, prediction)
    if dynamic_threshold is not None:
        x0 = _threshold(x0, dynamic_threshold, 1.0 if clip is None else clip)
    elif clip is not None:
        x0 = x0.clamp(-clip, clip)

    x_next = a * state + (b * x0 + c * (x0 if previous_x0 is None else previous_x0.to(dtype)))
    if seeds is not None:
        noise = sample_noise_reference(seeds, step, tuple(x.shape), dtype)
        if variance_logit is not None:  # Nichol and Dhariwal, 2102.09672, equation 15
            fraction = (variance_logit + 1) / 2
            log_var = fraction * log_var_max + (1 - fraction) * log_var_min
            std = torch.exp(0.5 * log_var) * (std > 0)
        x_next = x_next + std * noise
    return x_next.to(x.dtype), x0.to(x.dtype)


def _row_on_device(table: Tensor, step: Tensor) -> Tensor:
    """table[step], where nothing waits for the device. A step that is no row is a ValueError on the CPU and
    gives NaN on other devices, where its value is not known here."""
    step = step.reshape(1)
    if table.device.type == "cpu":
        try:
            return table.index_select(0, step)[0]
        except IndexError:
            expected = f"0 <= step < {table.shape[0]} (the rows of table)"
            raise ValueError(f"step: expected {expected}, got {step.item()}") from None
    row = table.index_select(0, step.clamp(0, table.shape[0] - 1))
    return row.masked_fill((step < 0) | (step >= table.shape[0]), float("nan"))[0]


def _guide(
    conditional: Tensor,  # [B, C, *]
    unconditional: Tensor,  # [B, C, *]
    guidance: float | Tensor,
    rescale: float,
) -> Tensor:  # [B, C, *]
    """unconditional + guidance (conditional - unconditional), rescaled towards the std of conditional"""
    if isinstance(guidance, Tensor):
        guidance = per_sample(guidance.to(conditional.dtype), conditional)
    output = unconditional + guidance * (conditional - unconditional)
    if rescale > 0:  # Lin et al., 2305.08891, equations 15 and 16
        dims = tuple(range(1, output.dim()))
        tiny = torch.finfo(output.dtype).tiny
        ratio = conditional.std(dims, keepdim=True) / output.std(dims, keepdim=True).clamp_min(tiny)
        output = output * (rescale * ratio + (1 - rescale))
    return output


def predict_x0(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """x0 from what the network predicts, where x = alpha x0 + sigma epsilon"""
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":  # v = alpha epsilon - sigma x0 (Salimans and Ho, 2202.00512, appendix D)
        return alpha * x - sigma * output
    return output


def _threshold(x0: Tensor, quantile: float, bound: float) -> Tensor:
    """x0 clamped to [-s, s], s = max(quantile of |x0|, bound), and scaled to [-bound, bound], per sample

    Source: Saharia et al., 2205.11487, section 2.3.
    """
    limit = quantile_of_rows(x0.flatten(1).abs(), quantile).clamp_min(bound)
    limit = per_sample(limit, x0)
    return torch.minimum(torch.maximum(x0, -limit), limit) * (bound / limit)


def quantile_of_rows(magnitude: Tensor, p: float) -> Tensor:  # [B, n] -> [B]
    """The p-quantile of each row with linear interpolation: torch.quantile for rows of any length."""
    n = magnitude.shape[1]
    position = p * (n - 1)
    below = min(int(position), n - 1)
    largest = magnitude.topk(n - below, dim=1).values  # descending: the last one has rank `below`
    value = largest[:, -1]
    if below + 1 < n:
        value = torch.lerp(value, largest[:, -2], position - below)
    return value
