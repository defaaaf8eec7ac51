"""The upsampler: from a small image to a large one, by diffusion."""

from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.models.upsampler.presets import UNCLIP_256, UNCLIP_1024

__all__ = ["UNCLIP_1024", "UNCLIP_256", "Upsampler"]
