"""The factor on the loss that keeps gradients in the range of float16.

    scale <- 2 scale after 2000 steps without overflow,   scale <- scale / 2 after one with,

and a step whose gradient overflows changes no weight. Rule and numbers are of torch.amp.GradScaler, which
decides for each optimiser by the gradients that it finds on its process. Here the norm of the whole gradient
decides, which is the same on all processes also where each has a shard.

Source: Micikevicius et al., "Mixed Precision Training", 1710.03740, section 3.2.
"""

from __future__ import annotations

GROWTH_STEPS = 2000


class LossScale:
    """Scale of the loss, and the number of steps since it changed.

    Example:
        >>> scale = LossScale()
        >>> scale.update(finite=False)
        >>> scale.value
        32768.0
    """

    def __init__(self) -> None:
        self.value = 2.0**16
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Count a step whose gradient was finite, or overflowed."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = 2 * self.value, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        self.value, self.good_steps = float(saved["value"]), int(saved["good_steps"])
