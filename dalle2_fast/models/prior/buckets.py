"""Embeddings as buckets of their principal components: which buckets there are, and which one is drawn."""

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
    """Components, bucket ranges and edges of the dot product's buckets, float64 on the CPU.

    mean [E], components [K, E], eigenvalues [E], low and high [K] (the range of each component's values),
    dot_edges [num_dot_buckets - 1] (quantiles, so that each bucket has an equal share of the data).
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
    """logits [B, N], chance [B] in [0, 1) -> a bucket of each row, int64 [B], by the inverse distribution.

    Buckets are ordered, so a last digit that differs between two batches (matrix products round by their
    shape) can at worst move a choice to the bucket beside it; a maximum of N perturbed logits would jump.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(dim=-1)
    target = chance[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
