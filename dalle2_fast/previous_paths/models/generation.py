from dalle2_fast.pipeline.context import Generation

__all__ = ["Generation"]
