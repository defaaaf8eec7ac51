from dalle2_fast.models.prior import ARPrior

__all__ = ["ARPrior"]
