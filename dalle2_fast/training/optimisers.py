"""How a stage is optimised: settings, learning-rate schedule, groups of parameters, optimisers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dalle2_fast.training.muon import Muon


@dataclass(frozen=True)
class Optimisation:
    """How a stage is optimised, and how often it is logged, validated and saved.

    Args:
        batch_size: samples in each step.
        minutes: length of the training by the clock, unless `steps` is given.
        steps: length of the training in steps.
        optimizer: "adamw", or "muon" (Muon for hidden matrices, AdamW for the rest).
        learning_rate: peak learning rate.
        betas: of AdamW.
        weight_decay: of matrices and convolutions.
        warmup_steps: over which the learning rate rises linearly.
        hold: fraction of the training after which the learning rate begins to fall, 0 <= hold < 1.
        decay: how it falls, "cosine" or "linear".
        final_fraction: of the peak, at the end.
        clip_norm: largest norm of the gradient.
        ema_decay: final decay of the average of the weights.
        log_steps: between two lines of the log.
        save_minutes: between two saved states.
        save_steps: also save the state at multiples of this step.
        first_validation: validate at this step and at each doubling of it, and at the end.
        validation_minutes: also validate this often.

    Raises:
        ValueError: a value is outside its range, or neither `steps` nor `minutes` is given.
    """

    batch_size: int
    minutes: float | None = None
    steps: int | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    hold: float = 0.0
    decay: str = "cosine"
    final_fraction: float = 0.02
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_steps: int = 50
    save_minutes: float = 5.0
    save_steps: int | None = None
    first_validation: int = 256
    validation_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("length of training: expected steps or minutes, got neither")
        for name in ("batch_size", "learning_rate", "clip_norm", "log_steps", "steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        for name, choices in (("optimizer", ("adamw", "muon")), ("decay", ("cosine", "linear"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0.0 <= self.hold < 1.0:
            raise ValueError(f"hold: expected 0 <= hold < 1, got {self.hold}")

    def progress(self, step: int, elapsed: float) -> float:
        """The fraction of the training that is done, in [0, 1]. elapsed: in seconds."""
        done = step / self.steps if self.steps is not None else elapsed / (60.0 * self.minutes)
        return min(1.0, done)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate after `step` steps, with the fraction `progress` of the training done.

        Example:
            >>> options = Optimisation(1, steps=100, warmup_steps=0, decay="linear", final_fraction=0.0)
            >>> [options.rate(step, options.progress(step, 0.0)) for step in (0, 50, 100)]
            [0.001, 0.0005, 0.0]
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fallen = max(0.0, progress - self.hold) / (1.0 - self.hold)
        left = 1.0 - fallen if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * fallen))
        return self.learning_rate * warm * (self.final_fraction + (1.0 - self.final_fraction) * left)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with and without weight decay: norms, biases, scalars and embeddings do not decay."""
    tables = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = (
                parameter.ndim >= 2
                and id(parameter) not in tables
                and "embedding" not in name.rsplit(".", 1)[-1]
            )
            (decayed if plain else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# Modules at the ends of a network: rows or columns of their matrices have different scales. Not for Muon.
ENDS = {"conv_in", "conv_out", "layout", "proj_in", "proj_out", "proj", "text_projection"}


def make_optimizers(model: nn.Module, options: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest."""
    groups = parameter_groups(model, options.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        ends = {id(p) for name, p in model.named_parameters() if ENDS & set(name.split("."))}
        decayed = groups[0]["params"]
        hidden = [p for p in decayed if id(p) not in ends]
        groups[0]["params"] = [p for p in decayed if id(p) in ends]
        optimizers.append(Muon(hidden, lr=options.learning_rate, weight_decay=options.weight_decay))
    groups = [group for group in groups if group["params"]]
    optimizers.append(torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True))
    return optimizers
