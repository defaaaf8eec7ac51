"""The modules have the state_dict of the modules they replace, and the values of the functions they call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dalle2_fast.modules import GroupNormSiLU


def test_group_norm_silu_replaces_group_norm_and_silu():
    torch.manual_seed(0)
    theirs = nn.GroupNorm(4, 12, eps=1e-3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = GroupNormSiLU(4, 12, eps=1e-3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, nn.GroupNorm)
    x, scale, shift = torch.randn(2, 12, 5, 3), torch.randn(2, 12), torch.randn(2, 12)
    torch.testing.assert_close(ours(x), nn.functional.silu(theirs(x)))
    filmed = theirs(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(ours(x, scale, shift), nn.functional.silu(filmed))
    ours.activation = None
    torch.testing.assert_close(ours(x), theirs(x))


def test_group_norm_silu_options():
    plain = GroupNormSiLU(2, 8, affine=False, activation=None, dtype=torch.float64)
    assert plain.state_dict() == {} and "activation=None" in repr(plain)
    assert GroupNormSiLU(2, 8, device="meta").weight.device.type == "meta"
    assert GroupNormSiLU(2, 8, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='impl="fused": '):
        GroupNormSiLU(2, 8, impl="fused")(torch.zeros(1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scale: expected \[N, C\] = \(1, 8\), got \(1, 4\)"):
        GroupNormSiLU(2, 8)(torch.zeros(1, 8), torch.zeros(1, 4))


def test_group_norm_silu_learns():
    module = GroupNormSiLU(2, 8)
    module(torch.randn(3, 8, 4)).sum().backward()
    assert module.weight.grad.abs().sum() > 0 and module.bias.grad.abs().sum() > 0
