"""DALL-E 2 (unCLIP) in PyTorch: caption -> CLIP text -> prior -> image embedding -> decoder -> upsampler.

The public names below are imported on first use (PEP 562), so `import dalle2_fast` costs milliseconds and
`dalle2-fast --help` never waits for torch.
"""

from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

__version__ = "0.1.0"
"""The version of the package."""

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.adapters.patch import patch as patch
    from dalle2_fast.adapters.patch import unpatch as unpatch
    from dalle2_fast.losses import (
        ClipLoss as ClipLoss,
    )
    from dalle2_fast.losses import (
        SigLipLoss as SigLipLoss,
    )
    from dalle2_fast.losses import (
        SoftClipLoss as SoftClipLoss,
    )
    from dalle2_fast.memory import keep_freed_memory as keep_freed_memory
    from dalle2_fast.models.clip import CLIP as CLIP
    from dalle2_fast.models.decoder import Decoder as Decoder
    from dalle2_fast.models.prior import (
        ARPrior as ARPrior,
    )
    from dalle2_fast.models.prior import (
        ARPriorNetwork as ARPriorNetwork,
    )
    from dalle2_fast.models.prior import (
        DiffusionPrior as DiffusionPrior,
    )
    from dalle2_fast.models.prior import (
        DiffusionPriorNetwork as DiffusionPriorNetwork,
    )
    from dalle2_fast.models.unet import UNet as UNet
    from dalle2_fast.models.upsampler import Upsampler as Upsampler
    from dalle2_fast.modules import GroupNormSiLU as GroupNormSiLU
    from dalle2_fast.ops._build_info import build_info as build_info
    from dalle2_fast.pipeline import DALLE2 as DALLE2

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.adapters.patch": ["patch", "unpatch"],
        "dalle2_fast.losses": ["ClipLoss", "SigLipLoss", "SoftClipLoss"],
        "dalle2_fast.memory": ["keep_freed_memory"],
        "dalle2_fast.models.clip": ["CLIP"],
        "dalle2_fast.models.decoder": ["Decoder"],
        "dalle2_fast.models.prior": ["ARPrior", "ARPriorNetwork", "DiffusionPrior", "DiffusionPriorNetwork"],
        "dalle2_fast.models.unet": ["UNet"],
        "dalle2_fast.models.upsampler": ["Upsampler"],
        "dalle2_fast.modules": ["GroupNormSiLU"],
        "dalle2_fast.ops._build_info": ["build_info"],
        "dalle2_fast.pipeline": ["DALLE2"],
    },
)
__all__ = ["__version__", *__all__]
