"""The stages in order: caption -> prior -> decoder -> upsamplers, and what can be made of a given picture."""

from dalle2_fast._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DALLE2": "dalle2_fast.pipeline.dalle2",
    },
)
