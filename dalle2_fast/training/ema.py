"""average_t = d_t * average_{t-1} + (1 - d_t) * weight_t,   d_t = min(decay, (1 + t) / (10 + t))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dalle2_fast.training.parallel.shards import local


class ExponentialMovingAverage:
    """Average of a model's weights, used for sampling and for the weights that are published.

    The decay warms up, because with a constant 0.999 the average of a run of a few thousand steps would still
    contain its random start. Floating-point buffers are averaged like parameters; integer buffers (counters)
    are copied. Of a sharded model every process averages its shards.

    torch.optim.swa_utils.AveragedModel is not used: its first update copies the weights, its decay does not
    warm up, and its state has other names than those that saved states have. (With this decay in a
    `multi_avg_fn` and `n_averaged` begun at 1 it computes the same numbers.)

    Args:
        model: the model being trained; a copy of its weights is the start.
        decay: the final decay, 0 <= decay < 1.

    Raises:
        ValueError: `decay` is outside its range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = ExponentialMovingAverage(model)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema.update(model)
        >>> ema.average["weight"].item(), ema.current_decay() == 2 / 11
        (0.8999999761581421, True)
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in model.state_dict().items()
        }

    def current_decay(self) -> float:
        """The decay that the next update will use."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def next_weight(self) -> float:
        """The weight of the model's current weights in the next average; it counts an update."""
        weight = 1.0 - self.current_decay()
        self.updates += 1
        return weight

    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's current weights."""
        self.move(model, self.next_weight())

    @torch.no_grad()
    def move(self, model: nn.Module, weight: float | Tensor) -> None:
        """Give the model's current weights this weight in the average: a number, or a scalar tensor."""
        current = model.state_dict()
        averages, values = [], []
        for name, average in self.average.items():
            if average.is_floating_point():
                averages.append(local(average))
                values.append(local(current[name].detach()))
            else:
                average.copy_(current[name])
        if isinstance(weight, Tensor):  # which torch._foreach_lerp_ does not take
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, weight.to(average.dtype))
        else:
            torch._foreach_lerp_(averages, values, weight)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block the model has the averaged weights and is in eval mode; then both are restored."""
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        training = model.training
        model.load_state_dict(self.average)
        model.eval()
        try:
            yield model
        finally:
            model.load_state_dict(weights)
            model.train(training)

    def state_dict(self) -> dict:
        """{"updates": int, "average": tensors by name}, which loads with weights_only=True."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Copy a saved average. ValueError if its names are not exactly the model's."""
        if state["average"].keys() != self.average.keys():
            different = sorted(state["average"].keys() ^ self.average.keys())
            raise ValueError(f"EMA state: names differ from the model's: {', '.join(different[:5])}")
        self.updates = int(state["updates"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
