"""Principal components of image embeddings: z_k = mean + sum of the first k (z - mean) . v_i v_i.

Source: unCLIP, arXiv 2204.06125, section 4: which parts of a picture CLIP holds in which directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PCA:
    """All D components of a set of embeddings, by falling variance; float64 on the CPU."""

    mean: Tensor  # [D]
    components: Tensor  # [D, D], a component a row, orthonormal
    variances: Tensor  # [D], falling
    unit_norm: bool  # whether truncated embeddings are brought back to unit length

    @classmethod
    def fit(cls, embeddings: Tensor, *, unit_norm: bool = True) -> PCA:
        """embeddings: floating point [N, D], N >= 2. Fewer than D + 1 leave the last components arbitrary."""
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point() or embeddings.ndim != 2:
            came = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"embeddings: expected a floating-point tensor [N, D], got {came}")
        if len(embeddings) < 2 or not embeddings.isfinite().all():
            raise ValueError(f"embeddings: expected at least 2 finite ones, got {tuple(embeddings.shape)}")
        x = embeddings.to("cpu", torch.float64)
        mean = x.mean(dim=0)
        variances, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / (len(x) - 1))
        components = vectors.flip(1).T
        # An eigenvector's sign is the solver's whim: the largest entry decides.
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        return cls(mean, components * largest.sign(), variances.flip(0).clamp(min=0), unit_norm)

    def truncate(self, embeddings: Tensor, dims: int) -> Tensor:
        """[B, D] -> [B, D], of which `dims` components are left: 0 (the mean) ... D (all of it)."""
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
        """The share of the variance in the first `dims` components, in [0, 1]."""
        return (self.variances[:dims].sum() / self.variances.sum()).item()
