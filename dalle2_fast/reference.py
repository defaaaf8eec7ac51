"""The specification of every op: plain, differentiable torch.

A kernel is correct if it agrees with the reference of the same name, evaluated in float64. References do not
check their arguments; `functional` does. They compute in float32, or float64 for float64 input, and round the
result once at the end. Each reference is in its op's module in `dalle2_fast.ops`.
"""

from __future__ import annotations

from dalle2_fast.ops.contrastive_loss import contrastive_loss_reference as contrastive_loss
from dalle2_fast.ops.conv3x3 import conv3x3_reference as conv3x3
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
    "conv3x3",
    "cross_attention",
    "diffusion_step",
    "group_norm_silu",
    "philox_4x32_10",
    "predict_x0",
    "sample_noise",
    "sigmoid_loss",
    "soft_contrastive_loss",
]
