"""The models of unCLIP, each imported on first use."""

from importlib import import_module

_HOMES = {
    "CLIP": "clip",
    "TextTransformer": "transformer",
    "DiffusionPrior": "prior",
    "DiffusionPriorNetwork": "prior",
    "ARPrior": "prior",
    "ARPriorNetwork": "prior",
    "UNet": "unet",
    "Decoder": "decoder",
    "Upsampler": "upsampler",
    "DALLE2": "dalle2",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle2_fast.models' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
