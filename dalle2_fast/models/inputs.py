"""What users hand to the models: embeddings, seeds, probabilities. Checked here once, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor


def resolve_seeds(
    seeds: Tensor | None,  # int64 [B]
    batch: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """The seeds as they are, or, when None, drawn from `generator` (torch's own when that is None, too)."""
    if seeds is None:
        drawn_on = generator.device if generator is not None else "cpu"
        seeds = torch.randint(2**62, (batch,), generator=generator, device=drawn_on)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or tuple(seeds.shape) != (batch,):
        came = f"{seeds.dtype} {tuple(seeds.shape)}" if isinstance(seeds, Tensor) else repr(seeds)
        raise ValueError(f"seeds: expected int64 [B] = ({batch},), got {came}")
    return seeds.to(device)


def bernoulli(
    batch: int,
    probability: float,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """bool [B], True with `probability` (exactly never for 0, exactly always for 1)."""
    # A generator draws on its own device, which may not be the data's.
    drawn_on = generator.device if generator is not None else device
    return torch.rand(batch, generator=generator, device=drawn_on).to(device) < probability


def check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def check_features(name: str, value: Tensor, letters: str, expected: tuple[int | str, ...]) -> None:
    """TypeError unless `value` is a floating-point tensor, ValueError unless its shape is `expected`, in
    which a string stands for any size."""
    wanted = f"[{letters}] = ({', '.join(map(str, expected))})"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor {wanted}, got {came}")
    sizes = zip(expected, value.shape, strict=False)
    fits = all(isinstance(size, str) or size == came for size, came in sizes)
    if value.ndim != len(expected) or not fits:
        raise ValueError(f"{name}: expected {wanted}, got {tuple(value.shape)}")
