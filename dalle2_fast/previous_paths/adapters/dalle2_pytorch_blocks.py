from dalle2_fast.adapters.dalle2_pytorch.blocks import FusedBlock, FusedCrossAttention, FusedSelfAttention

__all__ = ["FusedBlock", "FusedCrossAttention", "FusedSelfAttention"]
