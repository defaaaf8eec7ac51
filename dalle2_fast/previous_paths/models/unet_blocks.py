from dalle2_fast.models.unet.blocks import AttentionBlock, FineLevel, Layout, ResBlock

__all__ = ["AttentionBlock", "FineLevel", "Layout", "ResBlock"]
