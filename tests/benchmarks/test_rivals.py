"""Rivals that need a GPU, with stand-ins for their packages: the calls have the signatures of the sources."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import group_norm_silu as norms
from benchmarks.cases import registry, rival_losses
from benchmarks.timing.agreement import check

CASES = registry.load(("group_norm_silu", "contrastive"))


def install(monkeypatch, module: str, **contents) -> None:
    """A module of this dotted name with these contents, and its parents."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    vars(sys.modules[module]).update(contents)


def fused_group_norm_silu(x, weight, bias, num_groups: int = 32, eps: float = 1e-6):  # of vLLM-Omni
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def fused_adaptive_group_norm_silu(x, weight, bias, scale, shift, num_groups: int, eps: float = 1e-6):
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normed * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def group_norm_silu_4d(x, weight, bias, num_groups: int, eps: float, apply_silu: bool = True):  # of SGLang
    assert x.is_contiguous(memory_format=torch.channels_last) and apply_silu and not torch.is_grad_enabled()
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def apply_group_norm_silu(x, norm: nn.Module, activation: nn.Module):
    assert isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU) and not torch.is_grad_enabled()
    return activation(norm(x))


class ApexGroupNorm(nn.GroupNorm):
    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        assert act == "silu"

    def forward(self, x):
        return F.silu(super().forward(x))


@pytest.mark.parametrize("name, rival", [
    ("norm silu forward", norms.norm_sglang),
    ("norm silu forward, one sample", norms.norm_vllm_omni),
    ("norm film silu forward", norms.norm_vllm_omni),
    ("norm silu forward, one sample, channels_last", norms.norm_sglang_nhwc),
    ("norm silu forward channels_last", norms.norm_apex),
])  # fmt: skip
def test_the_norms_of_other_packages_get_the_right_arguments(name, rival, monkeypatch):
    """Catches arguments in another order, another epsilon, and scale without the one that is added to it."""
    ops = "vllm_omni.model_executor.models.common.ops"
    install(monkeypatch, f"{ops}.fused_group_norm_silu", fused_group_norm_silu=fused_group_norm_silu)
    install(monkeypatch, f"{ops}.fused_adaptive_group_norm_silu",
            fused_adaptive_group_norm_silu=fused_adaptive_group_norm_silu)  # fmt: skip
    install(monkeypatch, f"{ops}.fused_group_norm_silu", fused_group_norm_silu=fused_group_norm_silu)
    install(monkeypatch, "sglang.kernels.ops.diffusion", apply_group_norm_silu=apply_group_norm_silu,
            group_norm_silu_4d=group_norm_silu_4d)  # fmt: skip
    install(monkeypatch, "apex.contrib.group_norm", GroupNorm=ApexGroupNorm)
    norms.apex_module.cache_clear()
    case = CASES[name]
    check(case, "rival", rival, case.make("cpu", torch.float32, True))


class LinearCrossEntropy:  # Liger's for Hopper
    @staticmethod
    def apply(input, weight, target, ignore_index=-100, reduction="mean"):
        return F.cross_entropy(input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


class SigLipLoss:
    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0):
        assert chunk_size == 512

    def __call__(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        return rival_losses.sigmoid_eager(image_features, text_features, logit_scale, logit_bias)


def test_the_losses_of_other_packages_get_the_right_arguments(monkeypatch):
    """Catches one direction counted twice, a scale without gradient, and features in another order."""
    module = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    install(monkeypatch, module, LigerFusedLinearCrossEntropySM90Function=LinearCrossEntropy)
    install(monkeypatch, "open_clip.loss", SigLipLoss=SigLipLoss)
    for name, rival in (("contrastive loss, N = 32768, D = 512", rival_losses.liger_hopper),
                        ("sigmoid loss, N = 32768, D = 512", rival_losses.open_clip_chunked)):  # fmt: skip
        case = CASES[name]
        check(case, "rival", rival, case.make("cpu", torch.float32, True))


def test_an_older_open_clip_has_no_chunks(monkeypatch):
    """Catches a row that times the loss without chunks under the name of that with them."""
    install(monkeypatch, "open_clip.loss", SigLipLoss=type("SigLipLoss", (), {}))
    with pytest.raises(RuntimeError, match="no chunk_size"):
        rival_losses.open_clip_chunked()
