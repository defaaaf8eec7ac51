"""Precomputed embeddings of CLIP: a folder in the layout of clip-retrieval, written once, read in training.

    folder        the layout, its record, and the rows of a sample
    compute       a shard of pairs -> its part of the folder
    fingerprint   which CLIP it was
"""
