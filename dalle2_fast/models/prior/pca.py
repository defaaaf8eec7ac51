"""Principal components of image embeddings: z_k = mean + sum over i <= k of ((z - mean) . v_i) v_i.

Source: Ramesh et al., "unCLIP", 2204.06125, section 4, which shows what the components hold of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PCA:
    """All D components of a set of embeddings, by falling variance; float64 on the CPU.

    Args:
        mean: the mean embedding, [D].
        components: one component per row, orthonormal, [D, D].
        variances: the variance along each component, falling, [D].
        unit_norm: whether truncated embeddings are normalised to unit length.

    Example:
        >>> embeddings = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
        >>> pca = PCA.fit(embeddings, unit_norm=False)
        >>> pca.explained(1), pca.truncate(embeddings[:1], 0)
        (1.0, tensor([[2., 0.]]))
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    unit_norm: bool

    @classmethod
    def fit(cls, embeddings: Tensor, *, unit_norm: bool = True) -> PCA:
        """Find the components of embeddings.

        Args:
            embeddings: floating-point tensor [N, D], N >= 2. With N <= D the last components are arbitrary.
            unit_norm: whether truncated embeddings are normalised to unit length.

        Raises:
            ValueError: the embeddings have the wrong shape or dtype, or are not finite.
        """
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point() or embeddings.ndim != 2:
            came = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"embeddings: expected a floating-point tensor [N, D], got {came}")
        if len(embeddings) < 2 or not embeddings.isfinite().all():
            raise ValueError(f"embeddings: expected at least 2 finite ones, got {tuple(embeddings.shape)}")
        x = embeddings.to("cpu", torch.float64)
        mean = x.mean(dim=0)
        variances, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / (len(x) - 1))
        components = vectors.flip(1).T
        # The solver returns eigenvectors of arbitrary sign; here the largest entry is positive.
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        return cls(mean, components * largest.sign(), variances.flip(0).clamp(min=0), unit_norm)

    def truncate(self, embeddings: Tensor, dims: int) -> Tensor:
        """Keep the first `dims` components of embeddings [B, D], from 0 (the mean) to D (the embedding).

        Raises:
            ValueError: dims is not an int in 0 .. D, or the embeddings have another width.
        """
        width = len(self.mean)
        if isinstance(dims, bool) or not isinstance(dims, int) or not 0 <= dims <= width:
            raise ValueError(f"dims: expected whole numbers in 0 ... {width}, got {dims!r}")
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise ValueError(f"embeddings: expected [B, {width}], got {tuple(embeddings.shape)}")
        if dims == width:
            return embeddings.clone()
        kept = self.components[:dims]
        z = self.mean + (embeddings.to("cpu", torch.float64) - self.mean) @ kept.T @ kept
        return (F.normalize(z, dim=-1) if self.unit_norm else z).to(embeddings)

    def explained(self, dims: int) -> float:
        """The fraction of the variance that the first `dims` components hold, in [0, 1]."""
        return (self.variances[:dims].sum() / self.variances.sum()).item()
