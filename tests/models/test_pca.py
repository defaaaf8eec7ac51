"""Principal components of image embeddings."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.models.prior.pca import PCA


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_pca_truncates_to_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5])
    x = 1 + scales * torch.randn(5000, 4, generator=generator)
    pca = PCA.fit(x, unit_norm=False)
    close(pca.variances.float(), scales**2, 0.4)
    z = x[:7]
    assert torch.equal(pca.truncate(z, 4), z)
    close(pca.truncate(z, 0), x.mean(0).expand(7, -1))
    errors = [(pca.truncate(z, count) - z).norm() for count in range(5)]
    assert errors == sorted(errors, reverse=True) and errors[3] > 0
    close(torch.tensor(pca.explained(2)), torch.tensor(13 / 14.25), 0.02)
    close(PCA.fit(x).truncate(z, 2).norm(dim=1), torch.ones(7))
    with pytest.raises(ValueError, match=r"dims: expected whole numbers in 0 ... 4, got 5"):
        pca.truncate(z, 5)
    with pytest.raises(ValueError, match="embeddings: expected at least 2"):
        PCA.fit(x[:1])
