"""DALL-E 2 (unCLIP) in PyTorch: caption -> CLIP text -> prior -> image embedding -> decoder -> upsampler.

The public names below are imported on first use (PEP 562), so `import dalle2_fast` costs milliseconds and
`dalle2-fast --help` never waits for torch.
"""

from dalle2_fast._lazy import attach

__version__ = "0.1.0"

_HOMES = {
    "CLIP": "dalle2_fast.models.clip",
    "DiffusionPrior": "dalle2_fast.models.prior",
    "DiffusionPriorNetwork": "dalle2_fast.models.prior",
    "ARPrior": "dalle2_fast.models.prior",
    "ARPriorNetwork": "dalle2_fast.models.prior",
    "UNet": "dalle2_fast.models.unet",
    "Decoder": "dalle2_fast.models.decoder",
    "Upsampler": "dalle2_fast.models.upsampler",
    "DALLE2": "dalle2_fast.pipeline",
    "ClipLoss": "dalle2_fast.losses",
    "SigLipLoss": "dalle2_fast.losses",
    "SoftClipLoss": "dalle2_fast.losses",
    "GroupNormSiLU": "dalle2_fast.modules",
    "build_info": "dalle2_fast.ops._dispatch",
    "patch": "dalle2_fast.adapters.patch",
    "unpatch": "dalle2_fast.adapters.patch",
}

__getattr__, __dir__, __all__ = attach(__name__, _HOMES)
__all__ = ["__version__", *__all__]
