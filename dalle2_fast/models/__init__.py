"""The networks of unCLIP, each imported on first use."""

from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

# Modules that have moved are still found by their old names, which pickles hold.
__path__.append(str(Path(__file__).parents[1] / "previous_paths" / __name__.rpartition(".")[2]))

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
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
    from dalle2_fast.models.transformer import TextTransformer as TextTransformer
    from dalle2_fast.models.unet import UNet as UNet
    from dalle2_fast.models.upsampler import Upsampler as Upsampler

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.models.clip": ["CLIP"],
        "dalle2_fast.models.decoder": ["Decoder"],
        "dalle2_fast.models.prior": ["ARPrior", "ARPriorNetwork", "DiffusionPrior", "DiffusionPriorNetwork"],
        "dalle2_fast.models.transformer": ["TextTransformer"],
        "dalle2_fast.models.unet": ["UNet"],
        "dalle2_fast.models.upsampler": ["Upsampler"],
        "dalle2_fast.pipeline": ["DALLE2"],  # importable from here since before there was a pipeline package
    },
)
