"""diffusion_step and the noise ops on the CPU, in dalle2_fast._C (csrc/cpu/diffusion.cpp).

A step reads x, the output and previous_x0 once and writes x_next and x0, in any layout. Guidance rescale and
the dynamic threshold read x and the output once more each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle2_fast import _C

from .._op import implement_on_cpu
from .._planes import arrange
from .op import add_drawn_noise, add_noise, diffusion_step, empty_noise, empty_result, sample_noise

_DTYPES = {
    torch.float32: _C.DTYPES["float32"],
    torch.bfloat16: _C.DTYPES["bfloat16"],
    torch.float16: _C.DTYPES["float16"],
}
_PREDICTIONS = {"epsilon": 0, "sample": 1, "v_prediction": 2}
_ROW_BYTES = 8 * 4  # of the table in float32


def _check_dtypes(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {value.dtype}")


# What _C takes. A tensor of which it has the address must stay alive during the call.


def _strided(value: Tensor | None, strides: tuple[int, int, int], first: int = 0) -> tuple[int, ...]:
    """A tensor [B, C, P], from its element `first` on; zeros for None."""
    if value is None:
        return 0, 0, 0, 0, 0
    return value.data_ptr() + first * value.element_size(), _DTYPES[value.dtype], *strides


def _seeds(seeds: Tensor | None, step: int) -> tuple[int, int]:
    return (0, 0) if seeds is None else (seeds.data_ptr(), step)


def _number(step: Tensor | None, step_number: int) -> int:
    return step_number if step is None else int(step)


def _diffusion_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor | None,
    step_number: int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    guidance_number: float | None,
    guidance_rescale: float,
    prediction: str,
    clip: float | None,
    dynamic_threshold: float | None,
    learned_range: bool,
    previous_x0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_dtypes(x=x, model_output=model_output, previous_x0=previous_x0)
    step_number = _number(step, step_number)
    if not 0 <= step_number < table.shape[0]:
        expected = f"0 <= step < {table.shape[0]} (the rows of table)"
        raise ValueError(f"step: expected {expected}, got {step_number}")
    x_next, x0 = empty_result(x), empty_result(x)
    if x.numel() == 0:
        return x_next, x0
    batch = x.shape[0]
    (x, model_output, previous_x0, _), planes = arrange([x, model_output, previous_x0, x_next])
    channels, positions, (of_x, of_output, of_previous, of_results) = planes
    table = table.to(torch.float32).contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    guided = guidance is not None or guidance_number is not None
    weight, weight_stride = 0, 0
    if guidance is not None:
        guidance = guidance.to(torch.float32).contiguous()
        weight, weight_stride = guidance.data_ptr(), min(guidance.dim(), 1)
    if clip is None:
        clip = math.inf if dynamic_threshold is None else 1.0
    _C.cpu.diffusion_step(
        (batch, channels, positions),
        (
            _strided(x, of_x),
            _strided(model_output, of_output),
            _strided(model_output if guided else None, of_output, batch * of_output[0]),
            _strided(model_output if learned_range else None, of_output, channels * of_output[1]),
            _strided(previous_x0, of_previous),
            _strided(x_next, of_results),
            _strided(x0, of_results),
        ),
        _seeds(seeds, step_number),
        (
            table.data_ptr() + step_number * _ROW_BYTES,
            _PREDICTIONS[prediction],
            weight,
            weight_stride,
            guidance_number or 0.0,
            guidance_rescale,
            clip,
            dynamic_threshold or 0.0,
        ),
        torch.get_num_threads(),
    )
    return x_next, x0


def _sample_noise(
    seeds: Tensor, step: Tensor | None, step_number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    noise = empty_noise(seeds, step, step_number, shape, dtype)
    _check_dtypes(noise=noise)
    if noise.numel() == 0:
        return noise
    seeds = seeds.contiguous()
    elements = noise.numel() // shape[0]
    _C.cpu.sample_noise(
        (shape[0], 1, elements),
        _strided(noise, (elements, elements, 1)),
        _seeds(seeds, _number(step, step_number)),
        torch.get_num_threads(),
    )
    return noise


def _add(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, seeds: Tensor | None, step: int) -> Tensor:
    """x_t = alpha x0 + sigma noise. With seeds the noise is drawn and written."""
    _check_dtypes(x0=x0, noise=noise)
    x_t = empty_result(x0)
    if x0.numel() == 0:
        return x_t
    (x0, noise, _), planes = arrange([x0, noise, x_t])
    channels, positions, (of_x0, of_noise, of_x_t) = planes
    alpha, sigma = alpha.to(torch.float32).contiguous(), sigma.to(torch.float32).contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    _C.cpu.add_noise(
        (x0.shape[0], channels, positions),
        _strided(x0, of_x0),
        alpha.data_ptr(),
        sigma.data_ptr(),
        _strided(noise, of_noise),
        _seeds(seeds, step),
        _strided(x_t, of_x_t),
        torch.get_num_threads(),
    )
    return x_t


def _add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return _add(x0, alpha, sigma, noise, None, 0)


def _add_drawn_noise(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor, step: Tensor | None, step_number: int
) -> tuple[Tensor, Tensor]:
    noise = empty_result(x0)  # arrange copies no tensor of this kind, so _add writes into it
    return _add(x0, alpha, sigma, noise, seeds, _number(step, step_number)), noise


implement_on_cpu(diffusion_step, _diffusion_step)
implement_on_cpu(sample_noise, _sample_noise)
implement_on_cpu(add_noise, _add_noise)
implement_on_cpu(add_drawn_noise, _add_drawn_noise)
