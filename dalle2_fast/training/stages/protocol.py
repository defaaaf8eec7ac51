"""What the training loop needs to know about a stage."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Validation(NamedTuple):
    """What a model achieves on held-out data: numbers for the log, and images to look at."""

    metrics: dict[str, float]
    images: Tensor | None = None  # float [N, 3, H, W] in [0, 1]
    columns: int = 1  # images in each row of their grid


class Stage(Protocol):
    """A model and what it is trained for.

    Attributes:
        name: of the stage, and of its folder.
        model: is trained in place.
        config: JSON-able; it rebuilds the model.
    """

    name: str
    model: nn.Module
    config: dict

    def batch(self, step: int) -> dict:
        """The training data of step `step`; it depends on the stage's seed and `step` only."""

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        """The scalar to minimise. generator: for everything random, on the model's device."""

    def validate(self) -> Validation:
        """Metrics and images of the model's current weights; called in eval mode and without gradients."""

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's weights that the file of a finished stage has."""
