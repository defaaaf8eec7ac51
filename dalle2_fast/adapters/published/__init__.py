"""Weights that others published for networks that are no part of a DALLE2: loaders, and the networks.

    from dalle2_fast.adapters.published import load_guided_diffusion

    model = load_guided_diffusion("256x256_diffusion_uncond.pt", device="cuda", dtype=torch.float16)
    images = model.sample(batch_size=4, steps=100)

Each name is imported on first use. The files are read without running anything in them, and tensors that are
missing, left over or of another shape are named. docs/weights.md lists the files.
"""

from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.adapters.published.decoder import Dalle2PytorchDecoder as Dalle2PytorchDecoder
    from dalle2_fast.adapters.published.decoder import (
        load_dalle2_pytorch_decoder as load_dalle2_pytorch_decoder,
    )
    from dalle2_fast.adapters.published.glide import Glide as Glide
    from dalle2_fast.adapters.published.glide import load_glide as load_glide
    from dalle2_fast.adapters.published.guided_diffusion import GuidedDiffusion as GuidedDiffusion
    from dalle2_fast.adapters.published.guided_diffusion import load_guided_diffusion as load_guided_diffusion
    from dalle2_fast.adapters.published.prior import Dalle2PytorchPrior as Dalle2PytorchPrior
    from dalle2_fast.adapters.published.prior import load_dalle2_pytorch_prior as load_dalle2_pytorch_prior

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.adapters.published.decoder": ["Dalle2PytorchDecoder", "load_dalle2_pytorch_decoder"],
        "dalle2_fast.adapters.published.glide": ["Glide", "load_glide"],
        "dalle2_fast.adapters.published.guided_diffusion": ["GuidedDiffusion", "load_guided_diffusion"],
        "dalle2_fast.adapters.published.prior": ["Dalle2PytorchPrior", "load_dalle2_pytorch_prior"],
    },
)
