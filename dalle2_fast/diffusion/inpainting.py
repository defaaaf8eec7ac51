"""Known pixels while sampling: x_s = mask x_s + (1 - mask) (alpha_s known + sigma_s noise) after every step.

The mask is 1 (True) where the image is repainted. With resampling, the sampler repeats every segment of
`jump` steps `resample` times; before each repetition it noises the state back to the start of the segment, so
that the new part can adapt to the known part.

Source: Lugmayr et al., "RePaint", 2201.09865, algorithm 1.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from dalle2_fast import functional
from dalle2_fast.diffusion.schedules import Schedule
from dalle2_fast.ops._dtypes import compute_dtype

# Philox counters for the noise of the known pixels and for noising back, far from the counters of the steps.
_KNOWN_NOISE, _RENOISE = 2**30, 2**29


class Inpainting:
    """The known data of one sampling run. State i is x at times[i]; state `steps` is the data.

    Args:
        schedule: the noise schedule of the process.
        times: the times of the steps, falling, [steps].
        known: the data [B, C, *] in the range in which the network works.
        mask: bool, or numbers 0 and 1, that broadcasts to `known`; 1 = repaint.
        shape: the shape of x.
        device: the device of x.
        dtype: the dtype of x.

    Raises:
        TypeError, ValueError: `known` does not have `shape`, or the mask is not one.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule, step_times
        >>> schedule, known = make_schedule("cosine"), torch.ones(1, 1, 2, 2)
        >>> mask = torch.tensor([[[[True, False], [True, False]]]])
        >>> times = step_times(schedule, 4)
        >>> run = Inpainting(schedule, times, known, mask, (1, 1, 2, 2), torch.device("cpu"), torch.float32)
        >>> run.with_known(torch.zeros(1, 1, 2, 2), state=4, seeds=torch.tensor([0]))
        tensor([[[[0., 1.],
                  [0., 1.]]]])
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
        # Python numbers: filling a tensor with one needs no copy to the device and does not round early.
        self._alpha = [*schedule.alpha(times.cpu()).tolist(), 1.0]
        self._sigma = [*schedule.sigma(times.cpu()).tolist(), 0.0]
        levels = torch.tensor([self._alpha, self._sigma], dtype=torch.float64)
        self.levels = levels.to(compute_dtype(dtype)).to(device)  # [2, steps + 1]: alpha, sigma of each state

    def with_known(self, x: Tensor, state: int | Tensor, seeds: Tensor) -> Tensor:
        """Return x at `state` with the known pixels inserted at the noise level of that state.

        state: an int, or an int64 scalar tensor on the device of x, for which nothing waits.
        """
        if isinstance(state, Tensor):
            level = self.levels.index_select(1, state.reshape(1))
        else:
            level = self.levels[:, state : state + 1]
        alpha, sigma = level.expand(2, len(x)).unbind()
        noised = functional.add_noise(self.known, alpha, sigma, seeds=seeds, step=_KNOWN_NOISE + state)[0]
        return torch.where(self.mask, x, noised)

    def renoise(self, x: Tensor, state: int, to: int, seeds: Tensor) -> Tensor:
        """Return x, which is at `state`, noised to the earlier state `to` by the forward process."""
        ratio = self._alpha[to] / self._alpha[state]
        std = math.sqrt(max(self._sigma[to] ** 2 - (ratio * self._sigma[state]) ** 2, 0.0))
        ratio, std = (self.levels.new_full((len(x),), value) for value in (ratio, std))
        return functional.add_noise(x, ratio, std, seeds=seeds, step=_RENOISE + to)[0]

    def on_buffers(self, states: int) -> Inpainting:
        """The same kind of run on uninitialised tensors, for up to `states` states; `copy_` fills them."""
        buffers = copy.copy(self)
        buffers.known, buffers.mask = torch.empty_like(self.known), torch.empty_like(self.mask)
        buffers.levels = self.levels.new_empty(2, states)
        return buffers

    def copy_(self, other: Inpainting) -> None:
        """Take the known data of another run, without new tensors."""
        self.known.copy_(other.known)
        self.mask.copy_(other.mask)
        self.levels[:, : other.levels.shape[1]].copy_(other.levels)


def resampling_order(start: int, steps: int, resample: int, jump: int) -> list[tuple[int, int]]:
    """The order in which the sampler makes its steps, as pairs (step, repetition).

    Args:
        start: the first step.
        steps: the number of steps; the last one is steps - 1.
        resample: how often each segment is made, >= 1.
        jump: the number of steps in a segment, >= 1.

    Returns:
        The steps in order. Repetition 0 is the first pass of every segment. Every later pass of every segment
        has a number that no other pass has, and therefore different noise.

    Raises:
        ValueError: resample or jump is not an int of at least 1.

    Example:
        >>> resampling_order(0, 3, resample=2, jump=2)
        [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 2)]
    """
    for name, value in (("resample", resample), ("jump", jump)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    return [
        (step, 0 if again == 0 else segment * (resample - 1) + again)
        for segment, begin in enumerate(range(start, steps, jump))
        for again in range(resample)
        for step in range(begin, min(begin + jump, steps))
    ]


def check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the mask as bool, True = repaint.

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: the mask does not broadcast to `shape`, or has values other than 0 and 1.

    Example:
        >>> check_mask(torch.tensor([[0.0, 1.0]]), (3, 2))
        tensor([[False,  True]])
    """
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
