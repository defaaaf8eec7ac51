"""Scores of a checkpoint: CLIP tests, captions read back from the pixels, baselines beside them."""
