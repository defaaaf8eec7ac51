"""The networks of unCLIP, each imported on first use."""

from dalle2_fast._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CLIP": "dalle2_fast.models.clip",
        "TextTransformer": "dalle2_fast.models.transformer",
        "DiffusionPrior": "dalle2_fast.models.prior",
        "DiffusionPriorNetwork": "dalle2_fast.models.prior",
        "ARPrior": "dalle2_fast.models.prior",
        "ARPriorNetwork": "dalle2_fast.models.prior",
        "UNet": "dalle2_fast.models.unet",
        "Decoder": "dalle2_fast.models.decoder",
        "Upsampler": "dalle2_fast.models.upsampler",
        "DALLE2": "dalle2_fast.pipeline",
    },
)
