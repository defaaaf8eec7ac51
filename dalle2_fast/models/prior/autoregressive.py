"""The autoregressive prior: from a caption to a CLIP image embedding, as a sequence of buckets.

    z_i - mean = sum_k v_k c_k (principal components c_k, by falling eigenvalue),   q_k = bucket of v_k
    loss = - mean_k log p(q_k | q_1, ..., q_{k-1}, bucket of z_i . z_t, caption)

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2 and appendix C.
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

    `fit` fills buffers, which are saved with the weights: mean [E], components [K, E] (orthonormal rows),
    eigenvalues [E], low and high [K] (the range that the buckets of a dimension divide evenly), dot_edges
    [num_dot_buckets - 1], and fitted.

    Args:
        net: an ARPriorNetwork, or a dict of its arguments. Widths that the dict (or None) does not contain
            come from `clip` or `image_embed_dim`.
        clip: computes embeddings from `text` and `image`. It is frozen (set to evaluation mode, used without
            gradients), and is not trained, moved or saved with the prior.
        image_embed_dim: width E of the image embeddings; None takes it from `net` or `clip`.
        cond_drop_prob: probability with which training drops a caption (embedding, encodings and dot product
            together), for guidance.
        embed_scale: factor on embeddings, which gives their entries about unit size; None is sqrt(E).
        unit_norm: whether embeddings are L2-normalised when they enter and leave.

    Raises:
        ValueError: the widths do not fit each other, or a probability is not one.

    Example:
        >>> net = dict(dim=16, depth=1, heads=2, text_dim=5, context_length=3, num_components=4,
        ...            num_buckets=7, num_dot_buckets=5)
        >>> prior = ARPrior(net, image_embed_dim=6).eval()
        >>> image_embed, text_embed = torch.randn(20, 6), torch.randn(20, 6)
        >>> prior.fit(image_embed, text_embed)
        >>> prior(text_embed=text_embed, image_embed=image_embed).shape
        torch.Size([])
        >>> prior.sample(text_embed=text_embed[:2], seeds=torch.tensor([0, 1])).shape
        torch.Size([2, 6])
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
        self._is_fitted = False  # the value of `fitted` that the host has read

    # -------------------------------------------------------------------------------- embeddings as buckets

    @torch.no_grad()
    def fit(
        self,
        image_embed: Tensor,  # [N, E], N > num_components
        text_embed: Tensor,  # [N, E], row i belongs to the caption of image i
    ) -> None:
        """Find components, bucket ranges and dot-product buckets from data. Call it before training.

        The components are those of the covariance of the scaled embeddings, computed in float64 on the CPU.
        The num_buckets buckets of a dimension divide the range of its values evenly, so that inside the range
        the error is at most half a bucket; values outside are clamped. The buckets of z_i . z_t have equal
        shares of the data, so that the top half of the buckets is the top half of the distribution.

        Args:
            image_embed: embeddings of the training images, more than num_components.
            text_embed: embeddings of their captions.

        Raises:
            TypeError, ValueError: the embeddings have the wrong dtype or shape, are too few, or not finite.
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
        """The fraction of the variance of the embeddings that the kept components hold, in [0, 1]."""
        return (self.eigenvalues[: self.net.num_components].sum() / self.eigenvalues.sum()).item()

    def quantise(self, image_embed: Tensor) -> Tensor:
        """The buckets int64 [B, K] of embeddings [B, E], 0 .. num_buckets - 1, by falling eigenvalue."""
        self._check_embed("image_embed", image_embed)
        scaled = self.scale_embedding(image_embed)
        values = (scaled - self.mean.to(scaled.dtype)) @ self.components.to(scaled.dtype).T
        low, width = self._buckets(scaled.dtype)
        return ((values - low) / width).floor().clamp(0, self.net.num_buckets - 1).long()

    def restore(self, codes: Tensor) -> Tensor:
        """The embedding [B, E] at the centres of buckets int64 [B, K].

        Returns:
            float32 (float64 for float64 weights), of unit norm if unit_norm.
        """
        dtype = compute_dtype(self.mean.dtype)
        low, width = self._buckets(dtype)
        values = low + (codes.to(dtype) + 0.5) * width
        embed = (values @ self.components.to(dtype) + self.mean.to(dtype)) / self.embed_scale
        return F.normalize(embed, dim=-1) if self.unit_norm else embed

    def _buckets(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The lower end of the first bucket and the width of a bucket, [K] each."""
        low, high = self.low.to(dtype), self.high.to(dtype)
        return low, ((high - low) / self.net.num_buckets).clamp(min=1e-9)

    def _dots(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """z_i . z_t, [B]."""
        product = self.scale_embedding(image_embed) * self.scale_embedding(text_embed)
        return product.sum(dim=-1) / self.embed_scale**2

    def _check_fitted(self) -> None:
        # Once the buffer was read as True it is not read again, because reading it from a GPU would stall
        # every training step.
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

        A network that has learned nothing has the loss log(num_buckets).

        Args:
            text: token ids of the captions.
            image: the images.
            text_embed: CLIP embeddings of the captions.
            text_encodings: CLIP encodings of the captions, with text_embed; None for none.
            text_mask: which positions of the encodings are tokens; None for all.
            image_embed: CLIP embeddings of the images.
            generator: source of the random numbers; None is torch's default generator.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype or shape, is missing, or needs a CLIP.
            RuntimeError: `fit` was not called.
        """
        self._check_fitted()
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        batch, device = len(caption.embed), caption.embed.device
        image_embed = self._embed_image(image, image_embed, batch)
        keep = ~bernoulli(batch, self.cond_drop_prob, device, generator)
        codes, dots = self.quantise(image_embed), self._dots(image_embed, caption.embed)
        dot_codes = torch.bucketize(dots, self.dot_edges.to(dots.dtype), right=True)
        dot_codes = torch.where(keep, dot_codes, self.net.num_dot_buckets)
        kept = self.condition(caption, keep)
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
        """Sample an image embedding for each caption: the best of some candidates.

        It takes num_components passes of one position each.

        Args:
            text: token ids of the captions.
            text_embed: CLIP embeddings of the captions.
            text_encodings: CLIP encodings of the captions, with text_embed; None for none.
            text_mask: which positions of the encodings are tokens; None for all.
            negative: a caption, as CLIP.encode_text returns it, that guidance leads away from in place of no
                caption; its rows have the same dot product.
            num_samples_per_batch: the number of candidates per caption; the one with the largest cosine to
                the text embedding is kept.
            seeds: one per caption; the same seed gives the same embedding in any batch. None draws them from
                `generator`.
            generator: source of the seeds; None is torch's default generator.
            cond_scale: DALLE2-pytorch's name for `guidance`, which is used where guidance is None.
            guidance: guidance weight w, a number or [B], of logits = unconditional + w * (conditional -
                unconditional); 1 is no guidance.
            temperature: the logits are divided by it; 0 takes the most likely bucket of each dimension.
            dot_quantile: z_i . z_t is sampled from above this quantile of its distribution, in [0, 1). The
                paper takes the top half.
            progress: see `GaussianDiffusion.sample`; it counts the dimensions.

        Returns:
            [B, E], float32 (float64 for float64 weights), of unit norm if unit_norm.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or needs a CLIP.
            RuntimeError: `fit` was not called.
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

        # One number in (0, 1) for each choice of each candidate. It depends only on the seed of the candidate
        # and on the position of the choice.
        chances = torch.special.ndtr(sample_noise(seeds, 0, (len(seeds), steps + 1)))
        chances = chances.clamp(max=1 - 2**-24)
        dot_codes = ((dot_quantile + (1 - dot_quantile) * chances[:, 0]) * self.net.num_dot_buckets).long()
        last = dot_codes.clamp(max=self.net.num_dot_buckets - 1)
        unconditional = torch.full_like(last, self.net.num_dot_buckets) if negative is None else last
        codes = []
        for position in with_progress(range(steps), progress):
            if guidance is not None:  # conditional rows, then unconditional ones, in one pass
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
