"""The two upsamplers of unCLIP, as arguments of `Upsampler`.

Their losses are on crops of a quarter of the side, and their sampler is DDIM. `Upsampler(**UNCLIP_256)` has
700 million parameters, `Upsampler(**UNCLIP_1024)` has 300 million.

Source: Ramesh et al., "unCLIP", 2204.06125, appendix C.
"""

from __future__ import annotations

UNCLIP_256 = dict(
    unet=dict(
        in_channels=6, out_channels=3, channels=(320, 640, 960, 1280), layers_per_block=3,
        attention_levels=(), cross_dim=None, dropout=0.1,
    ),
    image_size=256, low_res_size=64, degradation="blur", schedule="cosine", sample_timesteps=27,
)
"""Arguments of unCLIP's `Upsampler` from 64 to 256 px: 700 million parameters."""
UNCLIP_1024 = dict(
    unet=dict(
        in_channels=6, out_channels=3, channels=(192, 192, 384, 384, 768, 768), layers_per_block=2,
        attention_levels=(), cross_dim=None,
    ),
    image_size=1024, low_res_size=256, degradation="bsr", schedule="linear", sample_timesteps=15,
    sample_tile=512,
)
"""Arguments of unCLIP's `Upsampler` from 256 to 1024 px: 300 million parameters."""
