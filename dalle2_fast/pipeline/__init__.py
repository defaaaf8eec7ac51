"""The stages in order: caption -> prior -> decoder -> upsamplers, and what can be made of a given image."""

from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.pipeline.dalle2 import DALLE2 as DALLE2

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.pipeline.dalle2": ["DALLE2"],
    },
)
