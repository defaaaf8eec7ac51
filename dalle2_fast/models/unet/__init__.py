"""The U-Net of the decoder and the upsamplers."""

from dalle2_fast.models.unet.context import ContextCache
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.unet.model import _Layer as _Layer  # pickles of version 0.1.0 name it here

__all__ = ["ContextCache", "UNet"]
