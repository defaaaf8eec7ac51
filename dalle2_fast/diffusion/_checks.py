"""Checks of the data and of the shapes that a diffusion process receives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_data(x0: Tensor) -> None:
    """Raise TypeError or ValueError unless x0 is a floating-point tensor [B, C, ...]."""
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        came = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"x0: expected a floating-point tensor [B, C, ...], got {came}")
    if x0.dim() < 2:
        raise ValueError(f"x0: expected [B, C, ...] with at least 2 dimensions, got {tuple(x0.shape)}")


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape as a tuple of ints; raise ValueError unless it is (B, C, ...) with sizes >= 0."""
    shape = tuple(int(size) for size in shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape: expected (B, C, ...) of sizes >= 0, got {shape}")
    return shape
