from dalle2_fast.models.prior import PCA

__all__ = ["PCA"]
