from dalle2_fast.pipeline.inversion import Inversion

__all__ = ["Inversion"]
