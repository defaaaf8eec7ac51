"""The U-Net of the decoder and the upsamplers."""

from dalle2_fast.models.unet.model import UNet

__all__ = ["UNet"]
