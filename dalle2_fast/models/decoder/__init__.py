"""The decoder: from an image embedding and a caption to an image, by diffusion."""

from dalle2_fast.models.decoder.model import Decoder

__all__ = ["Decoder"]
