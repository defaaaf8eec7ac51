from dalle2_fast.pipeline.editing import Inversion

__all__ = ["Inversion"]
