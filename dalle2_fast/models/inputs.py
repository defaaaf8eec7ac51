"""What users hand to the models: embeddings, seeds, probabilities. All models check them here."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.draws import draw


def resolve_seeds(
    seeds: Tensor | None,  # int64 [B]
    batch: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Check the seeds, or draw them where there are none.

    Args:
        seeds: one per sample; None draws them from `generator`.
        batch: the number of samples.
        device: where the seeds are wanted.
        generator: source of the seeds; None is torch's default generator.

    Returns:
        int64 [B] on `device`.

    Raises:
        ValueError: seeds are not int64 [B].

    Example:
        >>> resolve_seeds(torch.tensor([3, 4]), 2, torch.device("cpu"), None)
        tensor([3, 4])
    """
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
    """Draw bool [B], True with `probability`: never for 0, always for 1.

    Example:
        >>> bernoulli(3, 1.0, torch.device("cpu"), None)
        tensor([True, True, True])
    """
    # A generator can only draw on its device, which need not be the device of the data.
    drawn_on = generator.device if generator is not None else device
    return draw(torch.rand, (batch,), generator, device=drawn_on).to(device) < probability


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")


def check_features(name: str, value: Tensor, letters: str, expected: tuple[int | str, ...]) -> None:
    """Raise unless `value` is a floating-point tensor of the expected shape.

    Args:
        name: the name of the argument, for the message.
        value: the argument.
        letters: the letters of the shape, for the message.
        expected: the size of each dimension; a string stands for any size.

    Raises:
        TypeError: the value is not a floating-point tensor.
        ValueError: the value has another shape.

    Example:
        >>> check_features("image_embed", torch.zeros(2, 8), "B, E", ("B", 8))
    """
    wanted = f"[{letters}] = ({', '.join(map(str, expected))})"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating-point tensor {wanted}, got {came}")
    sizes = zip(expected, value.shape, strict=False)
    fits = all(isinstance(size, str) or size == came for size, came in sizes)
    if value.ndim != len(expected) or not fits:
        raise ValueError(f"{name}: expected {wanted}, got {tuple(value.shape)}")
