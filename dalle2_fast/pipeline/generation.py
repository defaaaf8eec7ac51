"""One run of the chain: a seed for every image, batch after batch, the clock, and what was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.pipeline.progress import StageWatch
from dalle2_fast.seeds import sample_seed

STAGES = ("text", "prior", "decoder", "upsampler", "upsampler2")
Progress = bool | Callable[[str, Iterable, int | None], Iterable]


@dataclass
class Generation:
    """What `DALLE2.generate` made, P prompts times N images, prompt after prompt (B = P * N rows)."""

    images: Tensor  # float32 [B, 3, size, size] in [0, 1]
    low_res: Tensor  # float32 [B, 3, S, S] in [0, 1], the decoder's output
    image_embed: Tensor  # [B, D], the prior's output, or what the decoder was given
    seed: int
    sample_seeds: Tensor  # int64 [B]
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds


class Run:
    """Runs stages of `pipe` for one image a seed, at most batch_size at a time.

    `with run.evaluating(): run.sample("decoder", steps=25, image_embed=z)` gives all rows of that stage.
    """

    def __init__(
        self,
        pipe: nn.Module,
        seed: int,
        sample_seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        progress: Progress = False,
    ) -> None:
        self.pipe, self.seed, self.sample_seeds = pipe, seed, list(sample_seeds)
        self.batch_size = batch_size if batch_size is None else at_least_one("batch_size", batch_size)
        self.watch = StageWatch(progress, pipe.device)

    @property
    def batches(self) -> list[slice]:
        rows = len(self.sample_seeds)
        step = self.batch_size or max(1, rows)
        return [slice(start, start + step) for start in range(0, rows, step)]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.sample_seeds = [self.sample_seeds[row] for row in rows.tolist()]

    def evaluating(self):
        return evaluating(self.pipe)

    def sample(self, stage: str, **options) -> Tensor:
        """One stage's `sample`, batch after batch; tensors among the options have a row for each image."""
        # With the same seed in every stage they would all start from the same noise.
        own = [sample_seed(seed, STAGES.index(stage)) for seed in self.sample_seeds]
        seeds = torch.tensor(own, device=self.pipe.device)
        return self.batched(stage, getattr(self.pipe, stage).sample, seeds=seeds, **options)

    def batched(self, stage: str, function: Callable[..., Tensor], **options) -> Tensor:
        """function(**options, progress=...), timed as `stage`, batch after batch."""
        results = []
        with self.watch(stage, len(self.batches)) as track:
            for part in self.batches:
                inputs = {k: v[part] if isinstance(v, Tensor) else v for k, v in options.items()}
                results.append(function(**inputs, progress=track))
            return torch.cat(results)

    def made(self, images: Tensor, low_res: Tensor, image_embed: Tensor) -> Generation:
        """The outcome; FloatingPointError if it is not finite."""
        if not torch.isfinite(images).all():
            dtype = self.pipe.dtype
            raise FloatingPointError(f"the images are not finite in {dtype}: use float32 or bfloat16")
        return Generation(
            images=images.float(),
            low_res=low_res.float(),
            image_embed=image_embed,
            seed=self.seed,
            sample_seeds=torch.tensor(self.sample_seeds),
            seconds=self.watch.seconds,
        )


def candidate_seeds(seed: int, count: int) -> list[int]:
    """The seeds of an image's candidates: its own, then others. More candidates never change the first ones,
    and at negative positions they meet no seed of a stage."""
    return [seed, *(sample_seed(seed, -candidate) for candidate in range(1, count))]


def choose_seed(seed: int | None, generator: torch.Generator | None = None) -> int:
    """The seed itself, or one drawn from `generator`, or else from torch's own."""
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**32, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed, generator: expected at most one of the two")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 ... 2^63 - 1, got {seed}")
    return seed


def at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule as it was (a trainer may be drawing samples)."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
