"""The upsampler, from a small image to a large one, and the degradations that it is trained on."""

from dalle2_fast.models.upsampler.model import Upsampler

__all__ = ["Upsampler"]
