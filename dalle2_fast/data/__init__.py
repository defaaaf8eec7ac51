"""The synthetic captioned scenes, the tokenizers, and streams of batches; each imported on first use."""

from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

# Modules that have moved are still found by their old names, which pickles hold.
__path__.append(str(Path(__file__).parents[1] / "previous_paths" / __name__.rpartition(".")[2]))

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.data.shards import WebDatasetStream as WebDatasetStream
    from dalle2_fast.data.stream import PairStream as PairStream
    from dalle2_fast.data.synthetic.captions import (
        compose as compose,
    )
    from dalle2_fast.data.synthetic.captions import (
        draw_phrasing as draw_phrasing,
    )
    from dalle2_fast.data.synthetic.captions import (
        make_captions as make_captions,
    )
    from dalle2_fast.data.synthetic.captions import (
        stated as stated,
    )
    from dalle2_fast.data.synthetic.negatives import (
        NEGATIVE_KINDS as NEGATIVE_KINDS,
    )
    from dalle2_fast.data.synthetic.negatives import (
        hard_negatives as hard_negatives,
    )
    from dalle2_fast.data.synthetic.negatives import (
        sample_negatives as sample_negatives,
    )
    from dalle2_fast.data.synthetic.rendering import render as render
    from dalle2_fast.data.synthetic.scenes import SPLITS as SPLITS
    from dalle2_fast.data.synthetic.scenes import sample_scenes as sample_scenes
    from dalle2_fast.data.synthetic.stream import SceneStream as SceneStream
    from dalle2_fast.data.synthetic.words import scene_words as scene_words
    from dalle2_fast.data.synthetic.world import World as World
    from dalle2_fast.data.text.bpe import BPETokenizer as BPETokenizer
    from dalle2_fast.data.text.tokenizer import (
        Tokenizer as Tokenizer,
    )
    from dalle2_fast.data.text.tokenizer import (
        WordTokenizer as WordTokenizer,
    )
    from dalle2_fast.data.text.tokenizer import (
        tokenizer_from_config as tokenizer_from_config,
    )

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.data.shards": ["WebDatasetStream"],
        "dalle2_fast.data.stream": ["PairStream"],
        "dalle2_fast.data.synthetic.captions": ["compose", "draw_phrasing", "make_captions", "stated"],
        "dalle2_fast.data.synthetic.negatives": ["NEGATIVE_KINDS", "hard_negatives", "sample_negatives"],
        "dalle2_fast.data.synthetic.rendering": ["render"],
        "dalle2_fast.data.synthetic.scenes": ["SPLITS", "sample_scenes"],
        "dalle2_fast.data.synthetic.stream": ["SceneStream"],
        "dalle2_fast.data.synthetic.words": ["scene_words"],
        "dalle2_fast.data.synthetic.world": ["World"],
        "dalle2_fast.data.text.bpe": ["BPETokenizer"],
        "dalle2_fast.data.text.tokenizer": ["Tokenizer", "WordTokenizer", "tokenizer_from_config"],
    },
)
