from dalle2_fast.models.prior import DiffusionPriorNetwork

__all__ = ["DiffusionPriorNetwork"]
