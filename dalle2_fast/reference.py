"""The specification of every op: plain, differentiable torch.

A kernel is right when it agrees with the function of the same name in this file, evaluated in float64. The
functions here expect arguments that `functional` has checked. float16 and bfloat16 are widened to float32 for
the maths and rounded once at the end; float32 and float64 are computed as they are.
"""

from __future__ import annotations

from dalle2_fast.ops.contrastive_loss import contrastive_loss_reference as contrastive_loss
from dalle2_fast.ops.cross_attention import cross_attention_reference as cross_attention
from dalle2_fast.ops.diffusion_step import diffusion_step_reference as diffusion_step
from dalle2_fast.ops.diffusion_step import predict_x0
from dalle2_fast.ops.group_norm_silu import group_norm_silu_reference as group_norm_silu
from dalle2_fast.ops.noise import add_noise_reference as add_noise
from dalle2_fast.ops.noise import philox_4x32_10
from dalle2_fast.ops.noise import sample_noise_reference as sample_noise
from dalle2_fast.ops.sigmoid_loss import sigmoid_loss_reference as sigmoid_loss
from dalle2_fast.ops.soft_contrastive_loss import soft_contrastive_loss_reference as soft_contrastive_loss

__all__ = [
    "add_noise",
    "contrastive_loss",
    "cross_attention",
    "diffusion_step",
    "group_norm_silu",
    "philox_4x32_10",
    "predict_x0",
    "sample_noise",
    "sigmoid_loss",
    "soft_contrastive_loss",
]
