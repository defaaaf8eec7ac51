"""CLIP: an image tower and a text tower with embeddings that can be compared."""

from dalle2_fast.models.clip.model import CLIP, OPENAI_MEAN, OPENAI_STD
from dalle2_fast.models.clip.vision_transformer import VisionTransformer

__all__ = ["CLIP", "OPENAI_MEAN", "OPENAI_STD", "VisionTransformer"]
