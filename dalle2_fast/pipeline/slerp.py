"""slerp(a, b, theta) = [sin((1 - theta) w) a + sin(theta w) b] / sin w,  w the angle between a and b.

The lengths are interpolated linearly, so that noise keeps the length of noise and unit vectors stay unit
vectors. Source: Shoemake 1985, "Animating rotation with quaternion curves".
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.ops._dtypes import compute_dtype


def slerp(
    a: Tensor,  # [B, *]
    b: Tensor,  # [B, *]
    theta: float | Tensor,  # number or [B]
) -> Tensor:  # [B, *]
    """From a (theta 0) to b (theta 1) on the great circle through both, row by row.

    Args:
        a: [B, *], floating point; each row, of any shape, is one vector.
        b: of the same shape.
        theta: a number, or one per row [B]; at 0 and 1 the result equals a and b bit for bit.

    Returns:
        [B, *], float32, or float64 for such input.

    Raises:
        ValueError: other shapes, a zero vector, or opposite vectors, between which no great circle is the
            shortest.

    Example:
        >>> x, y = torch.eye(2)[:, None]
        >>> [round(value, 3) for value in slerp(x, y, 1 / 3)[0].tolist()]
        [0.866, 0.5]
    """
    if a.shape != b.shape or a.ndim < 2:
        came = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a, b: expected two tensors [B, ...] of one shape, got {came}")
    dtype = compute_dtype(a.dtype)
    first, second = a.flatten(1).to(dtype), b.flatten(1).to(dtype)
    theta = torch.as_tensor(theta, dtype=dtype, device=a.device).expand(len(a))[:, None]
    length_a, length_b = _length(first), _length(second)
    if (length_a == 0).any() or (length_b == 0).any():
        raise ValueError("a, b: expected vectors that have a direction, got a zero vector")
    unit_a, unit_b = first / length_a, second / length_b
    # Not acos of the cosine, which loses half of the digits where the angle is small.
    angle = 2 * torch.atan2(_length(unit_a - unit_b), _length(unit_a + unit_b))
    if (angle > torch.pi - 1e-4).any():
        raise ValueError("a, b: expected vectors that are not opposite, because no path is then the shortest")
    near = angle < 1e-4  # the circle is a line there, and sin w / sin w would be 0 / 0
    sine = torch.where(near, 1.0, angle.sin())
    from_a = torch.where(near, 1 - theta, ((1 - theta) * angle).sin() / sine)
    from_b = torch.where(near, theta, (theta * angle).sin() / sine)
    mixed = (from_a * unit_a + from_b * unit_b) * torch.lerp(length_a, length_b, theta)
    mixed = torch.where(theta == 0, first, torch.where(theta == 1, second, mixed))
    return mixed.reshape(a.shape)


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)
