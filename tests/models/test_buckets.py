"""Embeddings as buckets of their principal components: the PCA, the buckets, the dot product's shares."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from dalle2_fast import ARPrior
from dalle2_fast.models.prior.buckets import sample_bucket
from tests.support.small_autoregressive_prior import (
    BUCKETS,
    DOTS,
    EMBED,
    KEPT,
    caption,
    embeddings,
    small_net,
    small_prior,
)


def test_pca_is_numpys():
    """Catches: an uncentred covariance, rising order, columns for rows."""
    prior, x = small_prior(), embeddings().double().numpy() * math.sqrt(EMBED)
    _, sizes, rows = numpy.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = torch.tensor(sizes**2 / (len(x) - 1)).float()
    torch.testing.assert_close(prior.eigenvalues, expected, rtol=1e-4, atol=1e-5)
    cosines = (prior.components.double() * torch.tensor(rows[:KEPT])).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(KEPT, dtype=torch.float64), rtol=0, atol=1e-5)
    share = (sizes[:KEPT] ** 2).sum() / (sizes**2).sum()
    assert prior.explained_variance == pytest.approx(share, rel=1e-5)
    torch.testing.assert_close(prior.components @ prior.components.T, torch.eye(KEPT), rtol=0, atol=1e-5)


def test_round_trip_is_within_half_a_bucket():
    """Catches: edges taken for centres, an index off by one, a range that excludes fitted data."""
    prior, x = small_prior(unit_norm=False, embed_scale=3.0), embeddings()
    codes = prior.quantise(x)
    assert codes.shape == (400, KEPT) and codes.dtype == torch.int64
    assert codes.amin(dim=0).eq(0).all() and codes.amax(dim=0).eq(BUCKETS - 1).all()
    error = ((prior.restore(codes) - x) * 3.0) @ prior.components.T
    half = (prior.high - prior.low) / BUCKETS / 2
    assert (error.abs() <= half * (1 + 1e-4)).all()
    assert (error.abs().amax(dim=0) > 0.8 * half).all()  # the bound is tight: the buckets are not finer
    assert torch.equal(prior.quantise(prior.restore(codes)), codes)


def test_all_components_and_many_buckets_lose_nothing():
    prior = ARPrior(small_net(num_components=EMBED, num_buckets=4096))
    prior.fit(embeddings(), embeddings(seed=2))
    back = prior.restore(prior.quantise(embeddings()))
    torch.testing.assert_close(back, embeddings(), rtol=0, atol=2e-3)
    torch.testing.assert_close(back.norm(dim=-1), torch.ones(400))
    assert prior.explained_variance == pytest.approx(1.0)


def test_what_lies_outside_is_clamped():
    prior = small_prior(unit_norm=False)
    far = 50 * prior.components[0]
    codes = prior.quantise(torch.stack([far, -far]))
    assert codes[:, 0].tolist() == [BUCKETS - 1, 0]


def test_dot_buckets_have_equal_shares():
    """Catches: even steps of the dot product, whose top half would be another half."""
    prior = small_prior()
    dots = (embeddings() * embeddings(seed=2)).sum(dim=-1)
    counts = torch.bucketize(dots, prior.dot_edges, right=True).bincount(minlength=DOTS)
    assert counts.sum() == 400 and (counts - 400 / DOTS).abs().max() <= 2


def test_fit_needs_enough_pairs_and_use_needs_fit():
    prior = small_prior(fitted=False)
    with pytest.raises(RuntimeError, match="ARPrior: call fit"):
        prior(**caption(), image_embed=embeddings(4))
    with pytest.raises(RuntimeError, match="ARPrior: call fit"):
        prior.sample(**caption())
    with pytest.raises(ValueError, match="image_embed: expected more than num_components = 6 .* got 6"):
        prior.fit(embeddings(6), embeddings(6))
    with pytest.raises(ValueError, match=r"text_embed: expected \[B, E\] = \(400, 24\), got \(5, 24\)"):
        prior.fit(embeddings(), embeddings(5))
    with pytest.raises(ValueError, match="expected finite embeddings"):
        prior.fit(embeddings() * float("nan"), embeddings())
    assert not prior.fitted  # a failed fit leaves nothing half done
    prior.fit(embeddings(), embeddings(seed=2))
    assert prior.sample(**caption()).shape == (4, EMBED)


def test_samples_follow_the_distribution():
    """Even chances give the frequencies of the softmax; temperature sharpens, 0 takes the likeliest."""
    logits = torch.tensor([[1.0, -float("inf"), 3.0, 2.0]])
    chance = (torch.arange(40_000) + 0.5) / 40_000
    for temperature in (1.0, 0.5):
        counts = sample_bucket(logits.expand(40_000, -1), chance, temperature).bincount(minlength=4) / 40_000
        torch.testing.assert_close(counts, (logits[0] / temperature).softmax(-1), rtol=0, atol=1e-3)
    assert sample_bucket(logits, chance[:1], 0).item() == 2
    assert sample_bucket(logits, torch.zeros(1)).item() == 0
    assert sample_bucket(logits, torch.full((1,), 1 - 2**-24)).item() == 3
