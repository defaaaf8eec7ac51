"""DALLE2-pytorch's blocks, patched one by one. Each test names the fault it would catch.

test_patch_unets.py compares its whole U-Net with the unpatched one.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.adapters.patch import patch, unpatch


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("dalle2_pytorch", reason="DALLE2-pytorch is not installed")
    import dalle2_pytorch.dalle2_pytorch as package

    return package


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_patched_agrees(module: torch.nn.Module, *args, **kwargs) -> None:
    """Output and all gradients, also of the inputs."""
    ours = copy.deepcopy(module)
    report = patch(ours)
    assert report.swapped and not report.skipped
    found = []
    for one in (module, ours):
        leaves = [value.clone().requires_grad_() for value in args]
        out = one(*leaves, **kwargs)
        out.backward(randn(*out.shape, seed=9))
        found.append([out.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in one.parameters())])
    for actual, expected in zip(*reversed(found), strict=True):
        assert expected is not None
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


MASKS = {
    "none": None,
    "some": torch.tensor([[True, True, False, False, True], [True] * 5]),
    "all": torch.tensor([[False] * 5, [True] * 5]),  # only the null key is left
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_agrees(theirs, mask):
    """Catches: an error in the scale that theirs applies twice, the null key, or the one head of keys."""
    torch.manual_seed(0)
    attention = theirs.Attention(12, dim_head=8, heads=3, cosine_sim=False)
    assert_patched_agrees(attention, randn(2, 5, 12), mask=MASKS[mask])


@pytest.mark.parametrize("norm_context", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_cross_attention_agrees(theirs, mask, norm_context):
    """Catches: a mask on the null key, or not on the context's; a context that is not normalised."""
    torch.manual_seed(0)
    options = dict(context_dim=10, dim_head=8, heads=3, norm_context=norm_context)
    attention = theirs.CrossAttention(12, **options)
    assert_patched_agrees(attention, randn(2, 7, 12), randn(2, 5, 10, seed=1), mask=MASKS[mask])


@pytest.mark.parametrize("standardised", [False, True])
def test_residual_block_agrees(theirs, standardised, monkeypatch):
    """Catches: scale and shift exchanged, a SiLU missing; a norm that does not run fused."""
    torch.manual_seed(0)
    block = theirs.ResnetBlock(8, 16, cond_dim=10, time_cond_dim=6, groups=4,
                               weight_standardization=standardised)  # fmt: skip
    assert_patched_agrees(block, randn(2, 8, 4, 4), randn(2, 6, seed=1), randn(2, 5, 10, seed=2))
    assert_patched_agrees(theirs.Block(8, 16, groups=4), randn(2, 8, 4, 4))
    patch(block)
    calls, plain = [], functional.group_norm_silu
    monkeypatch.setattr(functional, "group_norm_silu", lambda *args: calls.append(args[-1]) or plain(*args))
    block(randn(2, 8, 4, 4), randn(2, 6), randn(2, 5, 10))
    assert calls == ["silu", "silu"]


def test_what_is_left_alone_and_why(theirs):
    """Catches: an option that the op does not have and that is ignored."""
    blocks = torch.nn.ModuleDict(dict(
        cosine=theirs.Attention(8, cosine_sim=True),
        cosine_cross=theirs.CrossAttention(8, cosine_sim=True),
        causal=theirs.Attention(8, cosine_sim=False, causal=True),
        rotary=theirs.Attention(8, cosine_sim=False, rotary_emb=theirs.RotaryEmbedding(8)),
        plain=theirs.Attention(8, cosine_sim=False, dropout=0.5),
    ))  # fmt: skip
    report = patch(blocks)
    assert list(report.swapped) == ["plain"]
    assert {name: reason.split(":")[0] for name, reason in report.skipped.items()} == {
        "cosine": "cosine_sim=True", "cosine_cross": "cosine_sim=True", "causal": "causal=True",
        "rotary": "rotary_emb",
    }  # fmt: skip
    x, attention = randn(2, 5, 8), blocks["plain"].train()
    torch.manual_seed(3)
    dropped = attention(x)
    bias = randn(8, 5, 6)
    biased = attention.eval()(x, attn_bias=bias)
    unpatch(blocks)
    torch.manual_seed(3)
    assert torch.equal(attention.train()(x), dropped)
    assert torch.equal(attention.eval()(x, attn_bias=bias), biased)


def test_their_decoder_trains_and_samples_patched(theirs):
    """Catches: a patched U-Net that fails in its Decoder, in checkpointing, EMA copies or pickles."""
    torch.manual_seed(0)
    unet = theirs.Unet(dim=16, image_embed_dim=12, cond_dim=16, dim_mults=(1, 2), attn_heads=2,
                       attn_dim_head=8, checkpoint_during_training=True)  # fmt: skip
    decoder = theirs.Decoder(unet=unet, image_size=16, timesteps=10, sample_timesteps=2,
                             learned_variance=False)  # fmt: skip
    report = patch(decoder)
    assert len(report.swapped) > 30 and all(name.startswith("unets.0.") for name in report.swapped)
    steps = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    images, embed = randn(4, 3, 16, 16).sigmoid(), randn(4, 12)
    losses = []
    for _ in range(8):
        steps.zero_grad()
        loss = decoder(images, image_embed=embed, unet_number=1)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    again = pickle.loads(pickle.dumps(decoder.unets[0].mid_block1))
    assert type(again) is theirs.ResnetBlock and type(again.block1) is type(
        decoder.unets[0].mid_block1.block1
    )
    assert decoder.sample(image_embed=embed).shape == (4, 3, 16, 16)
    assert unpatch(copy.deepcopy(decoder)) == len(report.swapped)
