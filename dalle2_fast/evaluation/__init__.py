"""Scores of a checkpoint: CLIP tests, captions read back from the pixels, and baselines to compare with."""
