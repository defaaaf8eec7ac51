from dalle2_fast.data.text.bpe import BPETokenizer

__all__ = ["BPETokenizer"]
