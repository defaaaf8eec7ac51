"""The procedural captioned scenes, the tokenizers, and streams of batches."""

from dalle2_fast.data.bpe import BPETokenizer
from dalle2_fast.data.captions import compose, draw_phrasing, make_captions, stated
from dalle2_fast.data.negatives import NEGATIVE_KINDS, hard_negatives, sample_negatives
from dalle2_fast.data.render import render
from dalle2_fast.data.scenes import SPLITS, sample_scenes
from dalle2_fast.data.stream import SceneStream
from dalle2_fast.data.tokenizer import Tokenizer, WordTokenizer, tokenizer_from_config
from dalle2_fast.data.webdata import WebDatasetStream
from dalle2_fast.data.words import scene_words
from dalle2_fast.data.world import World

__all__ = [
    "BPETokenizer",
    "NEGATIVE_KINDS",
    "SPLITS",
    "SceneStream",
    "Tokenizer",
    "WebDatasetStream",
    "WordTokenizer",
    "World",
    "compose",
    "draw_phrasing",
    "hard_negatives",
    "make_captions",
    "render",
    "sample_negatives",
    "sample_scenes",
    "scene_words",
    "stated",
    "tokenizer_from_config",
]
