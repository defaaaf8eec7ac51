from dalle2_fast.adapters.diffusers.blocks import CachingPipeline, FusedAttention, FusedResnetBlock2D

__all__ = ["CachingPipeline", "FusedAttention", "FusedResnetBlock2D"]
