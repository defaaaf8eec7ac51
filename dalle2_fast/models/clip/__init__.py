"""CLIP: an image tower and a text tower with embeddings that can be compared."""

from dalle2_fast.models.clip.model import CLIP

__all__ = ["CLIP"]
