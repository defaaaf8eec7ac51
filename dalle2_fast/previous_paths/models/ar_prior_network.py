from dalle2_fast.models.prior import ARPriorNetwork

__all__ = ["ARPriorNetwork"]
