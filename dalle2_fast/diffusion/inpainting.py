"""Known pixels while sampling: x_s = mask x_s + (1 - mask) (alpha_s known + sigma_s noise) after every step.

The mask is 1 (True) where the picture is to be repainted. With resampling, each stretch of `jump` steps is
gone through `resample` times; before it begins again the state is noised back to where the stretch began, so
that the new part can agree with the known one. Lugmayr et al., "RePaint", 2201.09865, algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops._dtypes import compute_dtype

# Counters of the noise of known pixels and of the way back, far from those of the steps.
_KNOWN_NOISE, _RENOISE = 2**30, 2**29


class Inpainting:
    """What is kept in one sampling run. State i is x at times[i]; state `steps` is the data.

    known: the data [B, C, *] in the range that the network works in. mask: bool, or numbers 0 and 1, that
    broadcasts to it.
    """

    def __init__(
        self,
        schedule: Schedule,
        times: Tensor,  # [steps], falling
        known: Tensor,
        mask: Tensor | None,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not isinstance(known, Tensor) or tuple(known.shape) != shape:
            came = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
            raise ValueError(f"known: expected {shape}, got {came}")
        self.known = known.to(device, dtype)
        self.mask = check_mask(mask, shape).to(device)
        # Plain numbers: a tensor filled with one needs no copy to the device, and none is rounded early.
        self._alpha = [*schedule.alpha(times.cpu()).tolist(), 1.0]
        self._sigma = [*schedule.sigma(times.cpu()).tolist(), 0.0]
        self._like = torch.empty(0, device=device, dtype=compute_dtype(dtype))

    def with_known(self, x: Tensor, state: int, seeds: Tensor) -> Tensor:
        """x, which is state `state`, with the known pixels in it as they are at that noise."""
        factors = self._alpha[state], self._sigma[state]
        return torch.where(self.mask, x, self._noised(self.known, *factors, seeds, _KNOWN_NOISE + state))

    def renoise(self, x: Tensor, state: int, to: int, seeds: Tensor) -> Tensor:
        """x, which is state `state`, noised to the earlier state `to` as the forward process does."""
        ratio = self._alpha[to] / self._alpha[state]
        std = math.sqrt(max(self._sigma[to] ** 2 - (ratio * self._sigma[state]) ** 2, 0.0))
        return self._noised(x, ratio, std, seeds, _RENOISE + to)

    def _noised(self, x: Tensor, alpha: float, sigma: float, seeds: Tensor, counter: int) -> Tensor:
        alpha, sigma = (self._like.new_full((len(x),), value) for value in (alpha, sigma))
        return functional.add_noise(x, alpha, sigma, seeds=seeds, step=counter)[0]


def resampling_order(start: int, steps: int, resample: int, jump: int) -> list[tuple[int, int]]:
    """The steps in the order in which they are made, each with the number of its repetition: (step, number).

    0 is the first time; every repetition of every stretch has a number of its own, and so noise of its own.
    """
    for name, value in (("resample", resample), ("jump", jump)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    return [
        (step, 0 if again == 0 else stretch * (resample - 1) + again)
        for stretch, begin in enumerate(range(start, steps, jump))
        for again in range(resample)
        for step in range(begin, min(begin + jump, steps))
    ]


def check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool, True = repaint; ValueError unless it broadcasts to `shape` and is of 0 and 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor with 1 where to repaint, got {type(mask).__name__}")
    sizes = tuple(mask.shape)
    fits = len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))
    if not fits:
        raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {sizes}")
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask: expected 0 (keep) and 1 (repaint) only, got other values")
    return mask.bool()
