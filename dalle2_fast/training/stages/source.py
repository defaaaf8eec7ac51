"""Where the batches of a run come from: rendered scenes, or shards of the user's image-caption pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dalle2_fast.data import PairStream, SceneStream, Tokenizer, World
from dalle2_fast.data.sources.base import HELD_OUT
from dalle2_fast.embeddings.folder import EmbeddingFolder
from dalle2_fast.training.parallel.execution import PLAIN, Execution
from dalle2_fast.training.parallel.processes import ALONE, Processes

# Scenes that a GPU makes together: 0.8 GB of images. When each step made its scenes, a step of 384 of the
# decoder of scenes-gpu took 135 ms on an H200, and one of 1024 of its prior, a tenth of the work, 70 ms.
SCENES_AT_ONCE, PIXELS_AT_ONCE = 8192, 2**26


@dataclass(frozen=True)
class Source:
    """The data of a run, from which each of its stages opens streams.

    Args:
        world: of the rendered scenes.
        tokenizer: of the captions; it sizes the text towers.
        shards: data of the user to read instead of rendering scenes, see `PairStream`, or None.
        seed: of the run.
        device: where batches are made, and where models are trained.
        val_shards: shards of the held-out pairs. None holds out a part of `shards`.
        processes: of the training; each gets its rows of every batch for training.
        execution: says how data are read.
    """

    world: World
    tokenizer: Tokenizer
    shards: str | None
    seed: int
    device: torch.device
    val_shards: str | None = None
    processes: Processes = ALONE
    execution: Execution = PLAIN

    def held_out(
        self, number: int, batch_size: int, resolutions: tuple[int, ...], negatives: int
    ) -> dict | None:
        """A batch that is not trained on.

        Args:
            number, resolutions, negatives: as of `stream`.
            batch_size: the largest number of scenes, or pairs.

        Returns:
            The batch. None, and a line says so, if no pair of the shards is held out; None on all processes
            but the first, which measures alone.
        """
        if not self.processes.is_first:
            return None
        if self.shards is None:
            return self.stream(number, batch_size, resolutions, negatives, split="iid").batch(0)
        shards, split = (self.val_shards, None) if self.val_shards else (self.shards, "held_out")
        stream = PairStream(
            shards, batch_size, resolutions, device=self.device, tokenizer=self.tokenizer, split=split,
            allow_pipe=self.execution.allow_pipe,
        )  # fmt: skip
        batch = stream.first(batch_size)
        if batch is None:
            advice = "" if self.val_shards else f" (a hash holds out one in {HELD_OUT}): give --val-data"
            print(f"no metrics: {shards} has no held-out sample{advice}")
        return batch

    def stream(
        self,
        number: int,
        batch_size: int,
        resolutions: tuple[int, ...],
        negatives: int,
        *,
        split: str,
        factors: dict | None = None,
        embeddings: EmbeddingFolder | None = None,
    ) -> SceneStream | PairStream:
        """A stream whose `batch(step)` depends on the run's seed, on `number` and on the step.

        Args:
            number: of the stream, 0 to 15. Streams with different numbers have different scenes; those of
                shards have the same pairs in another order.
            batch_size: scenes, or pairs, in each batch.
            resolutions: of the images; the same scenes are rendered at each of them.
            negatives: hard-negative captions for each image.
            split: of the scenes, "train" or "iid" (held out).
            factors: on how often scenes have which names, see `World.reweighted`; shards have none.
            embeddings: of the images of the shards, which batches then have.
        """
        seed, ranks = seed_of(self.seed, number), {}
        if self.processes.world_size > 1 and split == "train":
            ranks = dict(rank=self.processes.rank, world_size=self.processes.world_size)
        if self.shards is not None:
            return PairStream(
                self.shards, batch_size, resolutions, seed, self.device, tokenizer=self.tokenizer,
                split=None if self.val_shards else "train", workers=self.execution.workers,
                allow_pipe=self.execution.allow_pipe, embeddings=embeddings, **ranks,
            )  # fmt: skip
        at_once = 1
        if self.device.type != "cpu" and split == "train":
            scenes = min(SCENES_AT_ONCE, PIXELS_AT_ONCE // max(resolutions) ** 2)
            at_once = max(1, scenes // batch_size)
        return SceneStream(
            self.world.reweighted(factors or {}),
            batch_size,
            resolutions,
            seed,
            split,
            self.device,
            negatives=negatives,
            at_once=at_once,
            **ranks,
        )


def seed_of(seed: int, number: int) -> int:
    """The seed of stream `number` (0 to 15), and of its stage's initial weights, in the run with `seed`.

    Different pairs (seed, number) have different seeds: with one seed for all stages, they would see the same
    images in the same order.
    """
    return seed * 16 + number
