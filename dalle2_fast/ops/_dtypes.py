"""The dtype of the arithmetic: every op and every sampler computes in it and rounds once at the end."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating-point dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
