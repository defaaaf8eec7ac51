"""The procedural captioned scenes, the tokenizer, and streams of batches."""

from .captions import compose, draw_phrasing, make_captions, stated
from .negatives import NEGATIVE_KINDS, hard_negatives, sample_negatives
from .render import render
from .scenes import SPLITS, sample_scenes
from .stream import SceneStream
from .tokenizer import WordTokenizer
from .webdata import WebDatasetStream
from .words import scene_words
from .world import World

__all__ = [
    "NEGATIVE_KINDS",
    "SPLITS",
    "SceneStream",
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
]
