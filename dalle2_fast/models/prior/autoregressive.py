"""The autoregressive prior: from a caption to a CLIP image embedding, spelt in buckets.

    z_i - mean = sum_k v_k c_k (principal components c_k, by falling eigenvalue),   q_k = bucket of v_k
    loss = - mean_k log p(q_k | q_1, ..., q_{k-1}, bucket of z_i . z_t, caption)

Source: unCLIP, arXiv 2204.06125, section 2.2 and appendix C.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.diffusion.progress import Progress, with_progress
from dalle2_fast.functional import sample_noise
from dalle2_fast.models.inputs import bernoulli
from dalle2_fast.models.prior.autoregressive_network import ARPriorNetwork
from dalle2_fast.models.prior.base import EmbeddingPrior, EncodedText, best_candidate
from dalle2_fast.models.prior.buckets import fit_buckets, sample_bucket
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class ARPrior(EmbeddingPrior):
    """Caption -> CLIP image embedding, by an autoregressive Transformer. Call `fit` before training.

    net: an ARPriorNetwork, or a dict of its arguments; widths that such a dict (or None) leaves open come
        from `clip` or `image_embed_dim`.
    clip, cond_drop_prob, embed_scale, unit_norm: as for DiffusionPrior. A dropped caption takes its dot
        product with it.

    What `fit` finds are buffers, saved with the weights: mean [E], components [K, E] (orthonormal rows),
    eigenvalues [E], low and high [K] (the range that a dimension's buckets divide evenly), dot_edges
    [num_dot_buckets - 1], fitted.
    """

    diffuses = False

    def __init__(
        self,
        net: ARPriorNetwork | dict | None = None,
        *,
        clip: CLIP | None = None,
        image_embed_dim: int | None = None,
        cond_drop_prob: float = 0.1,
        embed_scale: float | None = None,
        unit_norm: bool = True,
    ):
        super().__init__(ARPriorNetwork, net, clip, image_embed_dim, cond_drop_prob, embed_scale, unit_norm)
        width, kept = self.net.embed_dim, self.net.num_components
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.eye(kept, width))
        self.register_buffer("eigenvalues", torch.ones(width))
        self.register_buffer("low", -torch.ones(kept))
        self.register_buffer("high", torch.ones(kept))
        self.register_buffer("dot_edges", torch.zeros(self.net.num_dot_buckets - 1))
        self.register_buffer("fitted", torch.tensor(False))
        self._is_fitted = False  # what the host knows of `fitted`

    # -------------------------------------------------------------------------------- embeddings as buckets

    @torch.no_grad()
    def fit(
        self,
        image_embed: Tensor,  # [N, E], N > num_components
        text_embed: Tensor,  # [N, E], row i is of the caption of image i
    ) -> None:
        """Find components, bucket ranges and dot-product buckets from data. Call it before training.

        Components are those of the covariance of the scaled embeddings, computed in float64 on the CPU. A
        dimension's num_buckets buckets divide the range of its values evenly, so that inside the range an
        error is at most half a bucket; what lies outside later is clamped. Those of z_i . z_t have equal
        shares of the data, so that the top half of the buckets is the top half of the distribution.
        """
        self._check_embed("image_embed", image_embed)
        self._check_embed("text_embed", text_embed, len(image_embed))
        kept = self.net.num_components
        if len(image_embed) <= kept:
            raise ValueError(
                f"image_embed: expected more than num_components = {kept} embeddings, got {len(image_embed)}"
            )
        if not (image_embed.isfinite().all() and text_embed.isfinite().all()):
            raise ValueError("image_embed, text_embed: expected finite embeddings, got NaN or infinity")
        found = fit_buckets(
            self.scale_embedding(image_embed), self._dots(image_embed, text_embed), kept,
            self.net.num_dot_buckets,
        )  # fmt: skip
        for name, value in found.items():
            getattr(self, name).copy_(value)
        self.fitted.fill_(True)

    @property
    def explained_variance(self) -> float:
        """The share of the embeddings' variance that the kept components hold, in [0, 1]."""
        return (self.eigenvalues[: self.net.num_components].sum() / self.eigenvalues.sum()).item()

    def quantise(self, image_embed: Tensor) -> Tensor:
        """[B, E] -> buckets int64 [B, K], 0 .. num_buckets - 1, by falling eigenvalue."""
        self._check_embed("image_embed", image_embed)
        scaled = self.scale_embedding(image_embed)
        values = (scaled - self.mean.to(scaled.dtype)) @ self.components.to(scaled.dtype).T
        low, width = self._buckets(scaled.dtype)
        return ((values - low) / width).floor().clamp(0, self.net.num_buckets - 1).long()

    def restore(self, codes: Tensor) -> Tensor:
        """Buckets int64 [B, K] -> the embedding [B, E] at their centres, float32 (float64 for such weights),
        of unit norm if unit_norm."""
        dtype = compute_dtype(self.mean.dtype)
        low, width = self._buckets(dtype)
        values = low + (codes.to(dtype) + 0.5) * width
        embed = (values @ self.components.to(dtype) + self.mean.to(dtype)) / self.embed_scale
        return F.normalize(embed, dim=-1) if self.unit_norm else embed

    def _buckets(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Lower end of the first bucket and width of every bucket, [K] each."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        return low, ((high - low) / self.net.num_buckets).clamp(min=1e-9)

    def _dots(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """z_i . z_t, [B]."""
        product = self.scale_embedding(image_embed) * self.scale_embedding(text_embed)
        return product.sum(dim=-1) / self.embed_scale**2

    def _check_fitted(self) -> None:
        # Looked at once: asking a GPU would stall every training step.
        if torch.compiler.is_compiling():
            return
        if not self._is_fitted and not self.fitted.item():
            raise RuntimeError("ARPrior: call fit(image_embed, text_embed) first, or load trained weights")
        self._is_fitted = True

    # ------------------------------------------------------------------------------------------- training

    def forward(
        self,
        text: Tensor | None = None,  # int64 [B, L], needs clip
        image: Tensor | None = None,  # [B, 3, S, S] in [0, 1], needs clip
        *,
        text_embed: Tensor | None = None,  # [B, E], instead of text
        text_encodings: Tensor | None = None,  # [B, L, text_dim]
        text_mask: Tensor | None = None,  # bool [B, L], True = a token
        image_embed: Tensor | None = None,  # [B, E], instead of image
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The training loss, a scalar: cross-entropy in nats, mean over dimensions and batch.

        A net that knows nothing has log(num_buckets). Raises RuntimeError before `fit`.
        """
        self._check_fitted()
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        batch, device = len(caption.embed), caption.embed.device
        image_embed = self._embed_image(image, image_embed, batch)
        keep = ~bernoulli(batch, self.cond_drop_prob, device, generator)
        codes, dots = self.quantise(image_embed), self._dots(image_embed, caption.embed)
        dot_codes = torch.bucketize(dots, self.dot_edges.to(dots.dtype), right=True)
        dot_codes = torch.where(keep, dot_codes, self.net.num_dot_buckets)
        kept = self._condition(caption, keep)
        logits = self.net(codes, dot_codes, kept.embed, kept.encodings, kept.mask)
        return F.cross_entropy(logits.to(compute_dtype(logits.dtype)).flatten(0, 1), codes.flatten())

    # ------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        text: Tensor | None = None,  # int64 [B, L], needs clip
        *,
        text_embed: Tensor | None = None,  # [B, E], instead of text
        text_encodings: Tensor | None = None,  # [B, L, text_dim]
        text_mask: Tensor | None = None,  # bool [B, L]
        negative: EncodedText | None = None,  # (embed [1 or B, E], encodings, mask)
        num_samples_per_batch: int = 2,
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        cond_scale: float | Tensor = 1.0,
        guidance: float | Tensor | None = None,
        temperature: float = 1.0,
        dot_quantile: float = 0.5,
        progress: Progress = None,
    ) -> Tensor:
        """An image embedding [B, E] for each caption: float32 (float64 for such weights), of unit norm.

        Draws num_samples_per_batch candidates a caption, num_components passes of one position each, and
        keeps the candidate with the largest cosine to the text embedding.

        seeds: one a caption; the same seed gives the same embedding in any batch. None draws them from
            `generator`, or from torch's own generator.
        guidance: = cond_scale (DALLE2-pytorch's name), a number or [B]: logits = unconditional + guidance *
            (conditional - unconditional); 1 is none. negative: a caption that guidance leads away from, in
            place of none at all; it is told the same dot product.
        temperature: the logits are divided by it; 0 takes the likeliest bucket of each dimension.
        dot_quantile: z_i . z_t is drawn from above this quantile of its distribution, in [0, 1); the paper
            takes the top half.
        progress: True for a tqdm bar, or a function of (iterable, total=...) that gives the iterable back.

        Raises RuntimeError before `fit`.
        """
        self._check_fitted()
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        steps = self.net.num_components
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
        if not 0.0 <= dot_quantile < 1.0:
            raise ValueError(f"dot_quantile: expected a number in [0, 1), got {dot_quantile}")
        seeds, guidance, prefix = self._candidates(
            caption, negative, num_samples_per_batch, seeds, generator,
            cond_scale if guidance is None else guidance,
        )  # fmt: skip

        # One number in (0, 1) for each choice of each candidate, by its seed and the choice's place alone.
        chances = torch.special.ndtr(sample_noise(seeds, 0, (len(seeds), steps + 1)))
        chances = chances.clamp(max=1 - 2**-24)
        dot_codes = ((dot_quantile + (1 - dot_quantile) * chances[:, 0]) * self.net.num_dot_buckets).long()
        last = dot_codes.clamp(max=self.net.num_dot_buckets - 1)
        unconditional = torch.full_like(last, self.net.num_dot_buckets) if negative is None else last
        codes = []
        for position in with_progress(range(steps), progress):
            if guidance is not None:  # conditional rows, then unconditional ones: one pass
                last = torch.cat([last, unconditional if position == 0 else last])
            logits, prefix = self.net.extend(last, position, prefix)
            logits = logits.to(compute_dtype(logits.dtype))
            if guidance is not None:
                with_caption, without = logits.chunk(2)
                scale = guidance[:, None] if isinstance(guidance, Tensor) else guidance
                logits = without + scale * (with_caption - without)
            last = sample_bucket(logits, chances[:, position + 1], temperature)
            codes.append(last)
        return best_candidate(self.restore(torch.stack(codes, dim=1)), caption.embed)
