"""SceneStream: endless batches of rendered, captioned scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .captions import compose, draw_phrasing
from .negatives import sample_negatives
from .render import render
from .scenes import sample_scenes
from .tokenizer import WordTokenizer
from .world import World


class SceneStream:
    """Batches of a world as a pure function of (seed, step): whoever resumes at a step sees the same batches.

    resolutions: of the pictures, all of the same scenes. split: see `sample_scenes`.
    negatives: how many hard-negative captions per picture (True: 3, False: none). canonical, drop: see
    `make_captions`. The same seed gives different batches on different kinds of devices.
    """

    def __init__(
        self,
        world: World | None = None,
        batch_size: int = 64,
        resolutions: Sequence[int] = (64,),
        seed: int = 0,
        split: str = "train",
        device: torch.device | str = "cpu",
        *,
        negatives: int | bool = False,
        canonical: bool = False,
        drop: float = 1.0,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        self.world, self.batch_size = world or World(), batch_size
        self.resolutions, self.seed, self.split = tuple(resolutions), seed, split
        self.device = torch.device(device)
        self.negatives = 3 if negatives is True else int(negatives)
        self.canonical, self.drop = canonical, drop
        self.tokenizer = WordTokenizer.scenes(self.world)

    def batch(self, step: int) -> dict:
        """images {resolution: float32 [B, 3, R, R] in [0, 1]}, tokens int64 [B, 36], scenes (see scenes.py);
        with negatives also negatives int64 [B, K, 36] and negative_mask bool [B, K], False: do not use.
        """
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, step))
        scenes = sample_scenes(self.batch_size, generator, self.split, self.world, self.device)
        phrasing = draw_phrasing(
            self.batch_size, generator, self.device, drop=self.drop, canonical=self.canonical
        )
        batch = dict(
            images={resolution: render(scenes, resolution) for resolution in self.resolutions},
            tokens=compose(scenes, phrasing),
            scenes=scenes,
        )
        if self.negatives:
            batch["negatives"], batch["negative_mask"], _ = sample_negatives(
                scenes, phrasing, generator, count=self.negatives, split=self.split, world=self.world
            )
        return batch


def mix_seed(seed: int, step: int) -> int:
    """A 63-bit seed from two integers: SplitMix64's finaliser after each, so that neighbours differ."""
    mask, state = (1 << 64) - 1, 0
    for value in (seed, step):
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
