"""The criterion of correctness: as close to the float64 truth as plain torch is at the same dtype.

An op on bfloat16 numbers cannot be exact. A fixed tolerance is too tight for one shape, or hides a wrong
formula at another. So three results are compared: `actual` (which is tested), `plain` (ordinary torch at the
test's dtype) and `truth` (the reference in float64). The error of `actual` may be 1.5 times that of `plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_close_to_truth(
    actual: Tensor | Mapping[str, Tensor],
    plain: Tensor | Mapping[str, Tensor],
    truth: Tensor | Mapping[str, Tensor],
    *,
    factor: float = 1.5,
    slack: float = 1e-6,
) -> None:
    """|actual - truth| <= factor |plain - truth| + slack |truth| in norm, and a bound on every element.

    Mappings (of outputs and gradients) are compared entry by entry. A norm hides a single wrong element; the
    bound on every element is 4 times the largest error of `plain` plus one rounding of the largest value.
    """
    if isinstance(truth, Mapping):
        assert set(actual) == set(plain) == set(truth), f"{set(actual)}, {set(plain)}, {set(truth)}"
        for name in truth:
            try:
                assert_close_to_truth(actual[name], plain[name], truth[name], factor=factor, slack=slack)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return

    assert truth.dtype == torch.float64, f"the truth is {truth.dtype}, not float64"
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps
    # On the device of the truth: a CPU takes seconds for the norms of 84 million numbers, a batch of images.
    actual, plain, truth = (value.detach().to(truth.device).double() for value in (actual, plain, truth))
    assert bool(actual.isfinite().all()), "not finite"

    size = truth.norm().item()
    error, plain_error = (actual - truth).norm().item(), (plain - truth).norm().item()
    limit = factor * plain_error + slack * size
    assert error <= limit, f"error {error:.3e} > {limit:.3e} (plain: {plain_error:.3e}, size {size:.3e})"

    largest = truth.abs().max().item()
    worst = (actual - truth).abs().max().item()
    limit = 4 * (plain - truth).abs().max().item() + (rounding + slack) * largest
    assert worst <= limit, f"one element is off by {worst:.3e} > {limit:.3e} (largest value {largest:.3e})"


def outputs_and_gradients(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    *,
    keep_dtype: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """`function(**inputs)` at `dtype` and its gradients, as {"output": ..., "d <input>": ...}.

    Floating-point inputs are cast to dtype, with the same memory layout; those in keep_dtype only if dtype is
    float64. The gradient of the output is fixed random numbers, the same for every dtype.
    """
    leaves = {}
    for name, value in inputs.items():
        if value is not None and value.is_floating_point():
            wanted = value.dtype if name in keep_dtype and dtype != torch.float64 else dtype
            value = value.detach().to(wanted, copy=True).requires_grad_()
        leaves[name] = value
    output = function(**leaves)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    output.backward(weight)
    results = {"output": output.detach()}
    for name, value in leaves.items():
        if isinstance(value, Tensor) and value.grad is not None:
            results[f"d {name}"] = value.grad
    return results
