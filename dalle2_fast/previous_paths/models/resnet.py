from dalle2_fast.models.clip.resnet import AttentionPool, Bottleneck, ModifiedResNet

__all__ = ["AttentionPool", "Bottleneck", "ModifiedResNet"]
