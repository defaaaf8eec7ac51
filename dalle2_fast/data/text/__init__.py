"""Tokenizers: one token per word, or the byte pairs of CLIP."""
