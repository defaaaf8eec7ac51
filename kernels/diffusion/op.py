"""The ops of diffusion sampling and noising: schemas, shapes of the outputs, gradients.

step.py and noise.py implement them in Triton, native.py implements them on the CPU. diffusion_step has no
gradient: where one is needed (not in sampling), the public function takes the reference. The gradients of x_t
are written in torch: in training x0 and the noise are data, so they are rarely needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._op import define, differentiate
from .._planes import memory_format


def empty_result(x: Tensor) -> Tensor:
    """Uninitialised, with the shape, dtype and memory format of x."""
    return torch.empty_like(x, memory_format=memory_format(x))


def empty_noise(
    seeds: Tensor, step: Tensor | None, step_number: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Uninitialised, contiguous. The arguments are those of sample_noise."""
    return torch.empty(shape, dtype=dtype, device=seeds.device)


diffusion_step = define(
    "diffusion_step(Tensor x, Tensor model_output, Tensor table, Tensor? step, int step_number,"
    " Tensor? seeds, Tensor? guidance, float? guidance_number, float guidance_rescale, str prediction,"
    " float? clip, float? dynamic_threshold, bool learned_range, Tensor? previous_x0) -> (Tensor, Tensor)",
    fake=lambda x, *_: (empty_result(x), empty_result(x)),
)
sample_noise = define(
    "sample_noise(Tensor seeds, Tensor? step, int step_number, SymInt[] shape, ScalarType dtype) -> Tensor",
    fake=empty_noise,
)
add_noise = define(
    "add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor noise) -> Tensor",
    fake=lambda x0, *_: empty_result(x0),
)
add_drawn_noise = define(
    "add_drawn_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor seeds, Tensor? step, int step_number)"
    " -> (Tensor, Tensor)",
    fake=lambda x0, *_: (empty_result(x0), empty_result(x0)),
)


def _gradients(ctx, grad: Tensor | None, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> tuple:
    """Gradients of x0, alpha, sigma and noise, or None if not needed. Products and sums are float32."""
    if grad is None:  # a later function has no gradient for x_t
        return (None,) * 4
    grad, per_sample = grad.to(torch.float32), (-1,) + (1,) * (x0.dim() - 1)

    def scaled(factor: Tensor, like: Tensor) -> Tensor:
        return (grad * factor.to(torch.float32).reshape(per_sample)).to(like.dtype)

    def summed(value: Tensor, like: Tensor) -> Tensor:
        # Not -1: it is ambiguous where the batch is empty.
        return (grad * value).reshape(value.shape[0], math.prod(value.shape[1:])).sum(1).to(like.dtype)

    # The fourth input is the noise, or the seeds, which need no gradient.
    needs_x0, needs_alpha, needs_sigma, needs_noise, *_ = ctx.needs_input_grad
    return (
        scaled(alpha, x0) if needs_x0 else None,
        summed(x0, alpha) if needs_alpha else None,
        summed(noise, sigma) if needs_sigma else None,
        scaled(sigma, noise) if needs_noise else None,
    )


def _tangent(
    values: tuple[Tensor, ...],  # x0, alpha, sigma, noise
    dx0: Tensor | None,
    dalpha: Tensor | None,
    dsigma: Tensor | None,
    dnoise: Tensor | None,
) -> Tensor:
    """The tangent of x_t. x_t is linear in (x0, noise) and in (alpha, sigma), so it is one x_t or two."""
    x0, alpha, sigma, noise = values

    def zeros_unless(value: Tensor | None, like: Tensor) -> Tensor:
        return like.new_zeros(()).expand_as(like) if value is None else value

    along_images = along_factors = None
    if dx0 is not None or dnoise is not None:
        along_images = zeros_unless(dx0, x0), alpha, sigma, zeros_unless(dnoise, noise)
    if dalpha is not None or dsigma is not None:
        along_factors = x0, zeros_unless(dalpha, alpha), zeros_unless(dsigma, sigma), noise
    if along_images is None or along_factors is None:
        return add_noise(*(along_factors if along_images is None else along_images))
    first, *rest = along_images
    total = add_noise(first.float(), *rest)  # float32, so that the sum is rounded once
    first, *rest = along_factors
    return (total + add_noise(first.float(), *rest)).to(x0.dtype)


def _save_given(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an absent tangent is None, and costs nothing
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _save_drawn(ctx, inputs, output) -> None:
    x_t, noise = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(noise)
    ctx.save_for_backward(*inputs[:3], noise)
    ctx.save_for_forward(*inputs[:3], noise)


def _backward_drawn(ctx, grad: Tensor | None, grad_noise: Tensor | None) -> tuple:
    return *_gradients(ctx, grad, *ctx.saved_tensors), None, None


differentiate(
    add_noise,
    save=_save_given,
    backward=lambda ctx, grad: _gradients(ctx, grad, *ctx.saved_tensors),
    tangent=lambda ctx, *tangents: _tangent(ctx.saved_tensors, *tangents),
)
differentiate(
    add_drawn_noise,
    save=_save_drawn,
    backward=_backward_drawn,
    tangent=lambda ctx, *tangents: (_tangent(ctx.saved_tensors, *tangents[:3], None), None),
)
