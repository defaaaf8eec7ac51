"""The procedural captioned scenes, the tokenizers, and streams of batches."""

from .bpe import BPETokenizer
from .captions import compose, draw_phrasing, make_captions, stated
from .negatives import NEGATIVE_KINDS, hard_negatives, sample_negatives
from .render import render
from .scenes import SPLITS, sample_scenes
from .stream import SceneStream
from .tokenizer import Tokenizer, WordTokenizer, tokenizer_from_config
from .webdata import WebDatasetStream
from .words import scene_words
from .world import World

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
