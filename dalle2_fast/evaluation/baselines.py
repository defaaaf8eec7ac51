"""What the scores of generated images have to be compared with.

renders: the true images. Their scores are the ceiling, because the reader makes mistakes on them too.
shuffled: the generated images, each scored with the caption of another one: what a model that ignores its
caption achieves.
nearest: the training image with the most similar caption: what memory alone achieves.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic import vocabulary
from dalle2_fast.data.synthetic.captions import make_captions
from dalle2_fast.data.synthetic.scenes import Scenes, sample_scenes
from dalle2_fast.data.synthetic.vocabulary import WORD_TO_ID, WORDS
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.table import Reading


def shuffle_images(reading: Reading, kind: Tensor) -> Reading:
    """The reading with images exchanged within each kind of scene: each moves on to the next caption.

    They stay within their kind, because an image with another number of objects would be wrong for a trivial
    reason.

    Args:
        reading: of n images.
        kind: int64 [n], the kinds of the scenes.
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
    """For each caption the training scene whose caption is the most similar bag of concepts.

    Synonyms are one concept, filler words are none. Similarity is the cosine of the vectors that say which
    concepts are present. The first of equally similar scenes wins.

    Args:
        tokens: the captions.
        world: of the training scenes.
        generator: samples the training scenes and their captions.
        pool: number of training scenes.

    Returns:
        n scenes.
    """
    scenes = sample_scenes(pool, generator, "train", world)
    known, asked = (F.normalize(_bag(rows), dim=1) for rows in (make_captions(scenes, generator)[0], tokens))
    nearest = torch.cat([(part @ known.T).argmax(1) for part in asked.split(256)])
    return {key: value[nearest] for key, value in scenes.items()}


def _bag(tokens: Tensor) -> Tensor:
    """float [n, words]: 1 for every concept of a caption, at its canonical word."""
    bag = torch.zeros(len(tokens), len(WORDS)).scatter_(1, _concepts()[tokens], 1.0)
    bag[:, vocabulary.PAD] = 0
    return bag


@functools.cache
def _concepts() -> Tensor:
    """int64 [words]: the canonical word of each; 0 for words that say nothing about the image."""
    groups = (vocabulary.SHAPES, vocabulary.COLORS, vocabulary.FILLS, vocabulary.SIZES)
    groups += (vocabulary.BACKGROUNDS, vocabulary.TEXTURES, vocabulary.COUNTS, vocabulary.RELATIONS)
    names = {name: name for group in groups for name in group}
    names |= {word: word for word in ("top", "bottom", "center")}  # with left and right: words of positions
    for table in (vocabulary.SHAPE_SYNONYMS, vocabulary.COLOR_SYNONYMS, vocabulary.SIZE_SYNONYMS,
                  vocabulary.FILL_SYNONYMS):  # fmt: skip
        names |= {word: name for name, words in table.items() for word in words if word not in names}
    names |= {noun: name for name, noun in vocabulary.FILL_NOUNS.items()}
    singular = dict(zip(vocabulary.PLURALS, vocabulary.SHAPES, strict=True))
    names |= singular
    names |= {word: singular[name] for name, words in vocabulary.PLURAL_SYNONYMS.items() for word in words}
    names |= dict(upper="top", lower="bottom", middle="center", over="above", under="below", beneath="below",
                  within="inside")  # fmt: skip
    return torch.tensor([WORD_TO_ID[names[word]] if word in names else vocabulary.PAD for word in WORDS])
