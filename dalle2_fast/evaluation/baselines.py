"""What the scores of generated pictures have to be compared with.

renders: the true pictures; what the reader misses on them nobody can reach.
shuffled: the generated pictures under one another's captions; what can be had without reading the caption.
nearest: the training picture whose caption shares most words; what memory alone achieves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.data.captions import make_captions
from dalle2_fast.data.scenes import Scenes, sample_scenes
from dalle2_fast.data.vocabulary import EOS, WORDS
from dalle2_fast.data.world import World

from .reader import Reading


def shuffle_pictures(reading: Reading, kind: Tensor) -> Reading:
    """The reading with pictures exchanged within each kind of scene: each moves on to the next caption.

    kind: int64 [n]. Within a kind, because a picture with another number of objects would be wrong for a bad
    reason.
    """
    order = torch.arange(len(kind))
    for value in kind.unique():
        rows = (kind == value).nonzero()[:, 0]
        order[rows] = rows.roll(1)
    return Reading(*(column[order] for column in reading))


def nearest_training_scenes(
    tokens: Tensor,  # int64 [n, 36], captions as scene tokens
    world: World,
    generator: torch.Generator,
    *,
    pool: int = 20_000,
) -> Scenes:
    """For each caption the scene, of `pool` training scenes, whose caption is the most similar bag of words.

    Similarity is the cosine of word-presence vectors, weighted by log(pool / captions with the word); the
    first of equals wins.
    """
    scenes = sample_scenes(pool, generator, "train", world)
    known, asked = _bag(make_captions(scenes, generator)[0]), _bag(tokens)
    rarity = (pool / known.sum(0).clamp_min(1)).log()
    known, asked = (torch.nn.functional.normalize(bag * rarity, dim=1) for bag in (known, asked))
    nearest = torch.cat([(part @ known.T).argmax(1) for part in asked.split(256)])
    return {key: value[nearest] for key, value in scenes.items()}


def _bag(tokens: Tensor) -> Tensor:
    """float [n, words]: 1 for every word of a caption."""
    bag = torch.zeros(len(tokens), len(WORDS)).scatter_(1, tokens, 1.0)
    bag[:, : EOS + 1] = 0
    return bag
