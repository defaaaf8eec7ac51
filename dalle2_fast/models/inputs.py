"""What users hand to the image models: images, seeds, random draws. Checked here once, in the same words."""

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


def coin(
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


def cat_padded(
    above: Tensor,  # [B, L, *] or [B, D]
    below: Tensor,  # [C, M, *] or [C, D]
) -> Tensor:  # [B + C, max(L, M), *]
    """Rows below rows, the shorter ones with zeros (False) behind them."""
    longest = max(above.shape[1], below.shape[1])
    rows = []
    for x in (above, below):
        rest = x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])
        rows.append(torch.cat([x, rest], dim=1))
    return torch.cat(rows)
