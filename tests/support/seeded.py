"""Seeded generators, and digests of what they give, for tests that pin values."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digest(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of the bytes of all tensors."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]
