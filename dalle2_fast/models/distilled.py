"""What a distilled network knows: a few steps of the sampler "consistency", and guidance as an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.diffusion.names import SAMPLERS
from dalle2_fast.models.time_embedding import sinusoidal_embedding

_EMBEDDING_WIDTH = 128
_TIME_OF_ONE = 100.0  # weights of 1 to 10 become 100 to 1000, the range of the embedding


class GuidanceInput(nn.Module):
    """Guidance weight w -> W2 silu(W1 embedding(w) + b1) + b2, which is added to the embedding of the time.

    W2 and b2 are zero at first: a network that gets this input computes as before until it is trained.

    Args:
        width: width of the result.
        weights: the smallest and the largest weight.

    Raises:
        TypeError, ValueError: see `weight_range`.

    Source: Meng et al., "On Distillation of Guided Diffusion Models", 2210.03142, section 3.1.

    Example:
        >>> guidance = GuidanceInput(4, (1.0, 5.0))
        >>> guidance(guidance.weights("decoder", 3.0, 2, torch.device("cpu")))
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, width: int, weights: Sequence[float]):
        super().__init__()
        self.low, self.high = weight_range("guidance_input", weights)
        self.net = nn.Sequential(nn.Linear(_EMBEDDING_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, weights: Tensor) -> Tensor:  # [B] -> [B, width]
        embedding = sinusoidal_embedding(weights * _TIME_OF_ONE, _EMBEDDING_WIDTH)
        return self.net(embedding.to(self.net[0].weight.dtype))

    def weights(self, part: str, guidance: float | Tensor, batch: int, device: torch.device) -> Tensor:
        """The weights of a batch, float32 [B], from a number or [B].

        Raises:
            ValueError: a weight for which the network `part` was not trained.
        """
        given = torch.as_tensor(guidance, dtype=torch.float32, device=device)
        outside = (given < self.low) | (given > self.high)
        if outside.any():
            came = given[outside].flatten()[0].item() if given.ndim else given.item()
            raise ValueError(
                f"guidance: expected {self.low:g} to {self.high:g}, for which this {part} was distilled, got "
                f"{came:g}"
            )
        return given.expand(batch)


def weight_range(name: str, weights: Sequence[float] | None) -> list[float] | None:
    """The smallest and the largest guidance weight as two floats, as a configuration has them; or None.

    Args:
        name: of the argument, for the message.
        weights: the pair, or None.

    Raises:
        TypeError, ValueError: they are no finite numbers 0 <= low <= high.

    Example:
        >>> weight_range("guidance_input", (1, 5))
        [1.0, 5.0]
    """
    if weights is None:
        return None
    pair = isinstance(weights, (tuple, list)) and len(weights) == 2
    if not pair or not all(type(weight) in (int, float) for weight in weights):
        raise TypeError(f"{name}: expected two numbers (low, high) or None, got {weights!r}")
    low, high = map(float, weights)
    if not (0 <= low <= high and math.isfinite(high)):
        raise ValueError(f"{name}: expected finite numbers 0 <= low <= high, got {weights!r}")
    return [low, high]


def check_consistency_steps(steps: int | None) -> int | None:
    """Return the option consistency_steps; raise ValueError unless it is None or an int of at least 1."""
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"consistency_steps: expected an int of at least 1 or None, got {steps!r}")
    return steps


def known_steps(consistency_steps: int) -> list[int]:
    """The numbers of steps that a network for `consistency_steps` knows: those with only times of its own.

    Example:
        >>> known_steps(4)
        [1, 2, 4]
    """
    return [steps for steps in range(1, consistency_steps + 1) if consistency_steps % steps == 0]


def resolve_sampler(
    network: Any, sampler: str | None, steps: int | None, spacing: str | None = None
) -> tuple[str, int]:
    """The sampler and the number of steps of a network, from those that a caller gave.

    Args:
        network: has part, consistency_steps and sample_timesteps.
        sampler: None is "consistency" for a distilled network and "ddpm" for the others.
        steps: None is sample_timesteps.
        spacing: of the steps; None is the sampler's.

    Raises:
        ValueError: a distilled network does not know this, or "consistency" for one that is not distilled.

    Example:
        >>> from types import SimpleNamespace
        >>> resolve_sampler(SimpleNamespace(consistency_steps=None, sample_timesteps=25), None, None)
        ('ddpm', 25)
    """
    steps = network.sample_timesteps if steps is None else steps
    if network.consistency_steps is None:
        if sampler == "consistency":
            others = ", ".join(name for name in SAMPLERS if name != "consistency")
            raise ValueError(
                f"sampler: expected one of {others}, because this {network.part} was not distilled "
                f"(dalle2-fast distill {network.part}), got 'consistency'"
            )
        return "ddpm" if sampler is None else sampler, steps
    if sampler not in (None, "consistency"):
        raise ValueError(
            f"sampler: expected 'consistency', for which this {network.part} was distilled, got {sampler!r}"
        )
    known = known_steps(network.consistency_steps)
    if steps not in known:
        words = ", ".join(map(str, known[:-1])) + " or " if known[1:] else ""
        raise ValueError(
            f"steps: expected {words}{known[-1]}, for which this {network.part} was distilled, got {steps!r}"
        )
    if spacing not in (None, "trailing"):
        raise ValueError(
            f"spacing: expected 'trailing', for which this {network.part} was distilled, got {spacing!r}"
        )
    return "consistency", steps


def check_no_unconditional_rows(part: str, **given: Any) -> None:
    """ValueError for an option of unconditional rows that is not None: guidance is an input instead.

    Example:
        >>> check_no_unconditional_rows("decoder", negative=None, guidance_interval=None)
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected None, because this {part} takes guidance as an input and has no "
                "unconditional rows"
            )
