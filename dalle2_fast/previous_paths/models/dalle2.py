from dalle2_fast.pipeline.dalle2 import DALLE2

__all__ = ["DALLE2"]
