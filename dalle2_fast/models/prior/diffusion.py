"""The diffusion prior: from a caption to a CLIP image embedding.

A causal Transformer reads [text encodings, z_t, t, noised z_i, query] and predicts z_i itself at the query:

    loss = | f(z_i^(t), t, caption) - z_i |^2,   z_i^(t) = alpha_t z_i + sigma_t noise.

Source: unCLIP, arXiv 2204.06125, section 2.2 and appendix C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.diffusion.analytic_variance import measure_x0_error
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.progress import Progress
from dalle2_fast.diffusion.schedules import make_schedule
from dalle2_fast.models.inputs import bernoulli
from dalle2_fast.models.prior.base import EmbeddingPrior, EncodedText, best_candidate
from dalle2_fast.models.prior.diffusion_network import DiffusionPriorNetwork
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class DiffusionPrior(EmbeddingPrior):
    """Caption -> CLIP image embedding.

    The defaults are Karlo's prior: 1,022,030,080 numbers, of which 1,536 are embedding statistics (buffers).
    The paper's differs in its 24 layers (net=dict(depth=24)) and the size of its CLIP; 64 strided steps, two
    candidates, a caption dropped in a tenth of the cases, inputs scaled by sqrt(E) and the cosine schedule
    are the defaults.

    net: a DiffusionPriorNetwork, or a dict of its arguments; widths that such a dict (or None) leaves open
        come from `clip` or `image_embed_dim`.
    clip: computes embeddings from `text` and `image`. It is frozen (set to evaluation mode, used without
        gradients) and stays outside: it is not trained, moved or saved with the prior.
    timesteps, schedule: the diffusion; sample_timesteps: strided steps when sampling.
    cond_drop_prob: how often training drops a caption (embedding and encodings together), for guidance.
    embed_scale: embeddings are multiplied by it, so that their entries are of about unit size; the default is
        sqrt(image_embed_dim).
    prediction, weighting: what the network predicts and the loss's weight over time, see GaussianDiffusion.
        The defaults are the paper's: the embedding itself, plain squared error.
    sample_clip: while sampling, bound on each entry of a predicted, scaled embedding; None for no bound.
    analytic_variance: "ddpm" sampling with the optimal variance, from the network's error as `fit_variance`
        finds it in a trained prior (a buffer, x0_error); unCLIP's prior was sampled so.
    unit_norm: embeddings are L2-normalised on the way in and out; False for weights that were trained on raw
        projections (Karlo's, with embed_scale=1).
    """

    def __init__(
        self,
        net: DiffusionPriorNetwork | dict | None = None,
        *,
        clip: CLIP | None = None,
        image_embed_dim: int | None = None,
        timesteps: int = 1000,
        sample_timesteps: int = 64,
        cond_drop_prob: float = 0.1,
        embed_scale: float | None = None,
        schedule: str = "cosine",
        prediction: str = "sample",
        weighting: str = "uniform",
        sample_clip: float | None = 10.0,
        unit_norm: bool = True,
        analytic_variance: bool = False,
    ):
        super().__init__(
            DiffusionPriorNetwork, net, clip, image_embed_dim, cond_drop_prob, embed_scale, unit_norm
        )
        self.config |= dict(
            timesteps=timesteps, sample_timesteps=sample_timesteps, schedule=schedule, prediction=prediction,
            weighting=weighting, sample_clip=sample_clip, analytic_variance=analytic_variance,
        )
        self.sample_timesteps, self.sample_clip = sample_timesteps, sample_clip
        self.diffusion = GaussianDiffusion(
            make_schedule(schedule, timesteps), prediction=prediction, weighting=weighting
        )
        self.register_buffer("clip_mean", torch.zeros(self.image_embed_dim))
        self.register_buffer("clip_std", torch.ones(self.image_embed_dim))
        self.analytic_variance = analytic_variance
        if analytic_variance:
            if self.diffusion.schedule.timesteps is None:
                raise ValueError(f"schedule: analytic_variance needs discrete times, got {schedule!r}")
            self.register_buffer("x0_error", torch.full((timesteps,), -1.0))  # negative: not found yet

    # ------------------------------------------------------------------ embeddings as the network sees them

    @torch.no_grad()
    def fit_statistics(self, image_embed: Tensor) -> None:
        """Standardise each entry by its mean and deviation over image_embed [N, E], N >= 2.

        It helps where CLIP's image embeddings lie in a narrow cone. Call it before training.
        """
        self._check_embed("image_embed", image_embed)
        if len(image_embed) < 2:
            raise ValueError(f"image_embed: expected at least 2 embeddings, got {len(image_embed)}")
        scaled = self.scale_embedding(image_embed)
        self.clip_mean.copy_(scaled.mean(dim=0))
        self.clip_std.copy_(scaled.std(dim=0).clamp(min=1e-4))

    def _standardised(self, embed: Tensor) -> Tensor:
        scaled = self.scale_embedding(embed)
        return (scaled - self.clip_mean.to(scaled.dtype)) / self.clip_std.to(scaled.dtype)

    def _restored(self, x: Tensor) -> Tensor:
        embed = (x * self.clip_std.to(x.dtype) + self.clip_mean.to(x.dtype)) / self.embed_scale
        return F.normalize(embed, dim=-1) if self.unit_norm else embed

    @torch.no_grad()
    def fit_variance(
        self,
        text: Tensor | None = None,
        image: Tensor | None = None,
        *,
        text_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_embed: Tensor | None = None,
        generator: torch.Generator | None = None,
        points: int = 32,
    ) -> None:
        """For analytic_variance: measure the network's squared error at `points` times on these pairs, the
        arguments being those of `forward`. Call it after training, in evaluation mode, with thousands."""
        if not self.analytic_variance:
            raise ValueError("fit_variance: expected a prior with analytic_variance=True")
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        x0 = self._standardised(self._embed_image(image, image_embed, len(caption.embed)))
        prefix = self._encode_prefix(caption)
        error = measure_x0_error(
            self.diffusion, lambda x, t: self.net.denoise(x, t, prefix), x0, points=points,
            clip=self.sample_clip, generator=generator,
        )  # fmt: skip
        self.x0_error.copy_(error)

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
        """The training loss, a scalar: squared error of the embedding, mean over entries and batch."""
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        batch, device = len(caption.embed), caption.embed.device
        x0 = self._standardised(self._embed_image(image, image_embed, batch))
        kept = self._condition(caption, ~bernoulli(batch, self.cond_drop_prob, device, generator))
        losses = self.diffusion.training_loss(
            lambda x, t: self.net(x, t, kept.embed, kept.encodings, kept.mask), x0, generator=generator
        )
        return losses.mean()

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
        steps: int | None = None,
        cond_scale: float | Tensor = 1.0,
        guidance: float | Tensor | None = None,
        sampler: str = "ddpm",
        progress: Progress = None,
        **sampler_options,
    ) -> Tensor:
        """An image embedding [B, E] for each caption: float32 (float64 for such weights), of unit norm.

        Draws num_samples_per_batch candidates a caption and keeps the one with the largest cosine to the text
        embedding; the paper takes two.

        seeds: one a caption; the same seed gives the same embedding in any batch. None draws them from
            `generator`, or from torch's own generator.
        steps: sample_timesteps by default. sampler: "ddpm", "ddim" or "dpm++".
        guidance: = cond_scale (DALLE2-pytorch's name), a number or [B]; 1 is none.
        negative: a caption that guidance leads away from, in place of none at all: that of "" for weights
            that were trained with it where the caption was dropped (Karlo's).
        sampler_options: further keywords of GaussianDiffusion.sample (eta, dynamic_threshold, ...).
        """
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        seeds, guidance, prefix = self._candidates(
            caption, negative, num_samples_per_batch, seeds, generator,
            cond_scale if guidance is None else guidance,
        )  # fmt: skip

        def net(x: Tensor, t: Tensor) -> Tensor:
            if guidance is not None:  # conditional rows, then unconditional ones: one pass
                x, t = torch.cat([x, x]), torch.cat([t, t])
            return self.net.denoise(x, t, prefix).to(x.dtype)

        # The state stays in float32 also for half-precision weights: many small steps drown in rounding.
        dtype = compute_dtype(self.net.proj_in.weight.dtype)
        if self.analytic_variance and sampler == "ddpm":
            if (self.x0_error < 0).any():
                raise RuntimeError("DiffusionPrior: analytic_variance needs fit_variance(...) first")
            sampler_options = {"x0_error": self.x0_error} | sampler_options
        options = dict(
            seeds=seeds, steps=self.sample_timesteps if steps is None else steps, sampler=sampler,
            guidance=guidance, clip=self.sample_clip, progress=progress, device=seeds.device,
            dtype=dtype,
        ) | sampler_options
        x = self.diffusion.sample(net, (len(seeds), self.image_embed_dim), **options)
        return best_candidate(self._restored(x), caption.embed)
