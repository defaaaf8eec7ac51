"""Buckets of the principal components of embeddings: fitting them to data, and sampling one."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.models.prior.pca import PCA


def fit_buckets(
    embeddings: Tensor,  # [N, E]
    dots: Tensor,  # [N], dot products of image and text embeddings
    num_components: int,
    num_dot_buckets: int,
) -> dict[str, Tensor]:
    """Find the components of embeddings, and the ranges of the buckets.

    Args:
        embeddings: the embeddings as the network sees them, scaled.
        dots: dot products of image and text embeddings.
        num_components: K, the number of components to keep.
        num_dot_buckets: the number of buckets of the dot product.

    Returns:
        float64 on the CPU: mean [E]; components [K, E]; eigenvalues [E]; low and high [K], the range of the
        values of each component; dot_edges [num_dot_buckets - 1], quantiles of the dot products, so that
        each bucket has an equal share of the data.

    Example:
        >>> fit_buckets(torch.randn(20, 6), torch.randn(20), num_components=4, num_dot_buckets=8)["low"].shape
        torch.Size([4])
    """
    embeddings, dots = embeddings.to("cpu", torch.float64), dots.to("cpu", torch.float64)
    pca = PCA.fit(embeddings)
    components = pca.components[:num_components]
    values = (embeddings - pca.mean) @ components.T
    quantiles = torch.arange(1, num_dot_buckets, dtype=torch.float64) / num_dot_buckets
    return dict(
        mean=pca.mean, components=components, eigenvalues=pca.variances, low=values.amin(dim=0),
        high=values.amax(dim=0), dot_edges=torch.quantile(dots, quantiles),
    )


def sample_bucket(logits: Tensor, chance: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample one bucket per row, by the inverse of the distribution function.

    The buckets are ordered. A difference in the last digit between two batches (matrix products round
    depending on their shape) can therefore at worst choose the neighbouring bucket; the maximum of N
    perturbed logits could jump to any bucket.

    Args:
        logits: unnormalised log probabilities of the N buckets, [B, N].
        chance: a uniform random number in [0, 1) per row, [B].
        temperature: the logits are divided by it; 0 takes the most likely bucket.

    Returns:
        int64 [B].

    Example:
        >>> sample_bucket(torch.zeros(2, 4), torch.tensor([0.1, 0.9]))
        tensor([0, 3])
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(dim=-1)
    target = chance[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
