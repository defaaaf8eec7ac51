"""The network of the autoregressive prior: size, causality, padding, and its cache."""

from __future__ import annotations

import torch

from dalle2_fast import ARPrior
from tests.support.small_autoregressive_prior import (
    BUCKETS,
    DOTS,
    KEPT,
    caption,
    conditions,
    embeddings,
    small_net,
    small_prior,
    some_codes,
)


def test_paper_size():
    """319 of 768 dimensions, 1024 buckets, 24 layers of 26 heads x 64: 802 million parameters."""
    with torch.device("meta"):
        prior = ARPrior()
    layer = 12 * 1664**2 + 13 * 1664
    tables = (1024 + 1025 + 78 + 319 + 768 + 768 + 1024) * 1664 + 2 * 1664 + 1024 + 2 * 1664
    assert sum(parameter.numel() for parameter in prior.parameters()) == 24 * layer + tables


def test_each_dimension_sees_only_those_before_it():
    """Catches: a shifted sequence, which would learn to copy and sample noise."""
    net, (codes, dots) = small_net(), some_codes()
    logits = net(codes, dots, *conditions(caption()))
    assert logits.shape == (4, KEPT, BUCKETS)
    for place in range(KEPT):
        changed = codes.clone()
        changed[:, place] = (codes[:, place] + 5) % BUCKETS
        difference = (net(changed, dots, *conditions(caption())) - logits).abs().amax(dim=(0, 2))
        assert difference[: place + 1].max() < 1e-5
        assert (difference[place + 1 :] > 1e-3).all()
    other = (net(codes, (dots + 1) % DOTS, *conditions(caption())) - logits).abs().amax(dim=(0, 2))
    assert (other > 1e-3).all()


def test_padding_changes_nothing():
    net, (codes, dots), words = small_net(), some_codes(), caption()
    logits = net(codes, dots, *conditions(words))
    noise = torch.where(words["text_mask"][..., None], words["text_encodings"], 100.0)
    torch.testing.assert_close(net(codes, dots, words["text_embed"], noise, words["text_mask"]), logits)
    for i, length in enumerate(words["text_mask"].sum(dim=1).tolist()):
        row = slice(i, i + 1)
        encodings = words["text_encodings"][row, :length] if length else None
        alone = net(codes[row], dots[row], words["text_embed"][row], encodings)
        torch.testing.assert_close(alone, logits[row], rtol=1e-4, atol=1e-4)


def test_cache_equals_no_cache():
    """Catches: keys at a wrong position, a mask that forgets the grown part."""
    net, (codes, dots), words = small_net().double(), some_codes(), caption()
    words = conditions({k: v if v.dtype == torch.bool else v.double() for k, v in words.items()})
    expected = net(codes, dots, *words)
    prefix = net.encode_prefix(*words)
    for place in range(KEPT):
        logits, prefix = net.extend(dots if place == 0 else codes[:, place - 1], place, prefix)
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter():
    prior = small_prior(cond_drop_prob=0.0)
    prior(**caption(), image_embed=embeddings(4)).backward()
    silent = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
