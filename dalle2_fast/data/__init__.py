"""The synthetic captioned scenes, the tokenizers, and streams of batches; each imported on first use."""

from dalle2_fast._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BPETokenizer": "dalle2_fast.data.text.bpe",
        "NEGATIVE_KINDS": "dalle2_fast.data.synthetic.negatives",
        "SPLITS": "dalle2_fast.data.synthetic.scenes",
        "SceneStream": "dalle2_fast.data.synthetic.stream",
        "Tokenizer": "dalle2_fast.data.text.tokenizer",
        "WebDatasetStream": "dalle2_fast.data.shards",
        "WordTokenizer": "dalle2_fast.data.text.tokenizer",
        "World": "dalle2_fast.data.synthetic.world",
        "compose": "dalle2_fast.data.synthetic.captions",
        "draw_phrasing": "dalle2_fast.data.synthetic.captions",
        "hard_negatives": "dalle2_fast.data.synthetic.negatives",
        "make_captions": "dalle2_fast.data.synthetic.captions",
        "render": "dalle2_fast.data.synthetic.rendering",
        "sample_negatives": "dalle2_fast.data.synthetic.negatives",
        "sample_scenes": "dalle2_fast.data.synthetic.scenes",
        "scene_words": "dalle2_fast.data.synthetic.words",
        "stated": "dalle2_fast.data.synthetic.captions",
        "tokenizer_from_config": "dalle2_fast.data.text.tokenizer",
    },
)
