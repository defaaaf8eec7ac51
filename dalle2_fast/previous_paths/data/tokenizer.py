from dalle2_fast.data.text.tokenizer import WordTokenizer

__all__ = ["WordTokenizer"]
