"""SceneStream: endless batches of rendered, captioned scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dalle2_fast.data.synthetic.captions import compose, draw_phrasing
from dalle2_fast.data.synthetic.negatives import sample_negatives
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import sample_scenes
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer
from dalle2_fast.seeds import mix_seed


class SceneStream:
    """Batches of a world, a pure function of (seed, step): a resumed run sees the same batches.

    The same seed gives other batches on another kind of device, and with another `at_once`. A process of many
    gets its rows of the same batches: it samples all of their scenes, and renders and captions its own.

    Args:
        world: what scenes may show; None takes the whole world.
        batch_size: scenes per batch, at least 1.
        resolutions: sides of the images in pixels, all of the same scenes.
        seed: of scenes, captions and negatives.
        split: see `sample_scenes`.
        device: of the batches.
        negatives: hard-negative captions per image; True means 3, False none.
        canonical: use no synonyms in captions.
        drop: 1 leaves attributes out of captions at random, 0 states all of them.
        at_once: consecutive batches that are made together. A batch takes about a thousand kernel launches
            regardless of its size, and a GPU should not wait for them at every step.
        rank: the number of this process, 0 <= rank < world_size.
        world_size: the number of processes, which divides batch_size. `batch` returns the rows of this
            process: batch_size / world_size, from the row rank * batch_size / world_size.

    Raises:
        ValueError: batch_size or at_once is no int >= 1, or rank or world_size is out of range.

    Example:
        >>> batch = SceneStream(batch_size=2, resolutions=(8, 16)).batch(0)
        >>> batch["images"][16].shape, batch["tokens"].shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 36]))
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
        at_once: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("at_once", at_once)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if not isinstance(world_size, int) or world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"world_size: expected an int >= 1 that divides batch_size = {batch_size}, got {world_size!r}"
            )
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(f"rank: expected an int, 0 <= rank < {world_size}, got {rank!r}")
        self.world, self.batch_size = world or World(), batch_size
        self.rank, self.world_size = rank, world_size
        self.resolutions, self.seed, self.split = tuple(resolutions), seed, split
        self.device = torch.device(device)
        self.negatives = 3 if negatives is True else int(negatives)
        self.canonical, self.drop = canonical, drop
        self.tokenizer = WordTokenizer.scenes(self.world)
        self.at_once = at_once
        self._block: tuple[int, dict] | None = None  # the number of the last block of batches, and the block

    def batch(self, step: int) -> dict:
        """The batch of a step, which is an int from 0; of many processes, the B rows of this one.

        Returns:
            images: {resolution: float32 [B, 3, R, R] in [0, 1]}.
            tokens: int64 [B, 36].
            scenes: see scenes.py.
            negatives: int64 [B, K, 36], if the stream has them.
            negative_mask: bool [B, K], if the stream has negatives; False: do not use.

        Raises:
            ValueError: the world has no scene in the split.
        """
        number, position = divmod(step, self.at_once)
        if self.at_once == 1:
            return self._make(number)
        if self._block is None or self._block[0] != number:
            self._block = None  # frees its memory before the next block is made
            self._block = number, self._make(number)
        length = self.batch_size // self.world_size
        rows = slice(position * length, (position + 1) * length)

        def part(value):
            if isinstance(value, dict):
                return {key: part(each) for key, each in value.items()}
            return value[rows]

        return part(self._block[1])

    def _make(self, number: int) -> dict:
        """The rows of this process of the batches of a block, batch after batch."""
        size = self.at_once * self.batch_size
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, number))
        scenes = sample_scenes(size, generator, self.split, self.world, self.device)
        phrasing = draw_phrasing(size, generator, self.device, drop=self.drop, canonical=self.canonical)
        negatives = None
        if self.negatives:
            negatives = sample_negatives(
                scenes, phrasing, generator, count=self.negatives, split=self.split, world=self.world
            )
        if self.world_size > 1:
            rows = torch.arange(size, device=self.device).view(self.at_once, self.world_size, -1)
            rows = rows[:, self.rank].flatten()
            scenes = {key: value[rows] for key, value in scenes.items()}
            phrasing = phrasing.rows(rows)
            negatives = negatives and [value[rows] for value in negatives]
        batch = dict(
            images={resolution: render(scenes, resolution) for resolution in self.resolutions},
            tokens=compose(scenes, phrasing),
            scenes=scenes,
        )
        if negatives:
            batch["negatives"], batch["negative_mask"], _ = negatives
        return batch
