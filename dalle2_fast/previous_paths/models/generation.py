from dalle2_fast.pipeline.generation import Generation

__all__ = ["Generation"]
