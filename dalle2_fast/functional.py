"""The ops of dalle2_fast as functions: each checks its arguments, chooses an implementation and calls it.

Every function but `sample_noise` has the argument `impl`: "auto" (the fused kernel where one can run,
otherwise the reference), "reference" or "fused" (raises where no kernel can run; there is no silent
fall-back). Each function is defined in its op's module in `dalle2_fast.ops`.
"""

from __future__ import annotations

from dalle2_fast.ops.contrastive_loss import contrastive_loss
from dalle2_fast.ops.conv3x3 import conv3x3
from dalle2_fast.ops.cross_attention import cross_attention
from dalle2_fast.ops.diffusion_step import diffusion_step
from dalle2_fast.ops.group_norm_silu import group_norm_silu
from dalle2_fast.ops.noise import add_noise, sample_noise
from dalle2_fast.ops.sigmoid_loss import sigmoid_loss
from dalle2_fast.ops.soft_contrastive_loss import soft_contrastive_loss

__all__ = [
    "add_noise",
    "contrastive_loss",
    "conv3x3",
    "cross_attention",
    "diffusion_step",
    "group_norm_silu",
    "sample_noise",
    "sigmoid_loss",
    "soft_contrastive_loss",
]
