"""The diffusion prior: from a caption to a CLIP image embedding.

A causal Transformer over [text encodings, z_t, t, noised z_i, query] predicts z_i itself at the query:

    loss = | f(z_i^(t), t, caption) - z_i |^2,   z_i^(t) = alpha_t z_i + sigma_t noise.

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.diffusion.analytic_variance import measure_x0_error
from dalle2_fast.diffusion.graphs.plan import ConditionedNet
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.progress import Progress
from dalle2_fast.diffusion.schedules import make_schedule
from dalle2_fast.models.distilled import (
    GuidanceInput,
    check_consistency_steps,
    check_no_unconditional_rows,
    resolve_sampler,
    weight_range,
)
from dalle2_fast.models.inputs import bernoulli
from dalle2_fast.models.prior.base import EmbeddingPrior, EncodedText, best_candidate
from dalle2_fast.models.prior.caption_prefix import PrefixCache
from dalle2_fast.models.prior.diffusion_network import DiffusionPriorNetwork
from dalle2_fast.ops._dtypes import compute_dtype

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP


class DiffusionPrior(EmbeddingPrior):
    """Caption -> CLIP image embedding, by diffusion.

    The defaults are Karlo's prior: 1,022,030,080 numbers, of which 1,536 are embedding statistics (buffers).
    The paper's prior differs in its 24 layers (net=dict(depth=24)) and in the size of its CLIP; its 64
    strided steps, two candidates, captions dropped in a tenth of the cases, inputs scaled by sqrt(E) and
    cosine schedule are the defaults.

    Args:
        net: a DiffusionPriorNetwork, or a dict of its arguments. Widths that the dict (or None) does not
            contain come from `clip` or `image_embed_dim`.
        clip: computes embeddings from `text` and `image`. It is frozen (set to evaluation mode, used without
            gradients), and is not trained, moved or saved with the prior.
        image_embed_dim: width E of the image embeddings; None takes it from `net` or `clip`.
        timesteps: the number of discrete times of the diffusion.
        sample_timesteps: strided steps when sampling.
        cond_drop_prob: probability with which training drops a caption (embedding and encodings together),
            for guidance.
        embed_scale: factor on embeddings, which gives their entries about unit size; None is sqrt(E).
        schedule: the name of the noise schedule, see `make_schedule`.
        prediction: what the network predicts, see `GaussianDiffusion`; "sample" (the embedding itself) is the
            paper's choice.
        weighting: weighting of the loss over time, see `GaussianDiffusion`; "uniform" (the plain squared
            error) is the paper's choice.
        sigma_data: standard deviation of the scaled embeddings, for the prediction "edm".
        sample_clip: while sampling, bound on each entry of a predicted, scaled embedding; None for no bound.
        unit_norm: whether embeddings are L2-normalised when they enter and leave; False for weights that were
            trained on raw projections (Karlo's, with embed_scale=1).
        analytic_variance: whether "ddpm" samples with the optimal variance, as unCLIP's prior did. It follows
            from the error of the trained network, which `fit_variance` measures into the buffer x0_error.
        guidance_input: the smallest and the largest guidance weight of a network that takes the weight as an
            input, see `GuidanceInput`, and so samples with B rows in place of 2 B. None: guidance takes
            unconditional rows.
        consistency_steps: the number of steps for which the network was distilled: it then has the sampler
            "consistency" alone, with this number of steps or a divisor of it. None: not distilled.

    Raises:
        TypeError, ValueError: an option has the wrong type or value.

    Example:
        >>> net = dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=5, context_length=3)
        >>> prior = DiffusionPrior(net, image_embed_dim=6, timesteps=10).eval()
        >>> text_embed = torch.randn(2, 6)
        >>> prior(text_embed=text_embed, image_embed=torch.randn(2, 6)).shape
        torch.Size([])
        >>> prior.sample(text_embed=text_embed, seeds=torch.tensor([0, 1]), steps=2).shape
        torch.Size([2, 6])
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
        sigma_data: float = 1.0,
        sample_clip: float | None = 10.0,
        unit_norm: bool = True,
        analytic_variance: bool = False,
        guidance_input: Sequence[float] | None = None,
        consistency_steps: int | None = None,
    ):
        super().__init__(
            DiffusionPriorNetwork, net, clip, image_embed_dim, cond_drop_prob, embed_scale, unit_norm
        )
        self.config |= dict(
            timesteps=timesteps, sample_timesteps=sample_timesteps, schedule=schedule, prediction=prediction,
            weighting=weighting, sigma_data=sigma_data, sample_clip=sample_clip,
            analytic_variance=analytic_variance,
            guidance_input=weight_range("guidance_input", guidance_input),
            consistency_steps=check_consistency_steps(consistency_steps),
        )
        self.sample_timesteps, self.sample_clip = sample_timesteps, sample_clip
        self.consistency_steps = consistency_steps
        if guidance_input is not None:
            self.guidance_input = GuidanceInput(self.net.dim, guidance_input)
        self.diffusion = GaussianDiffusion(
            make_schedule(schedule, timesteps), prediction=prediction, weighting=weighting,
            sigma_data=sigma_data,
        )
        self.register_buffer("clip_mean", torch.zeros(self.image_embed_dim))
        self.register_buffer("clip_std", torch.ones(self.image_embed_dim))
        self.analytic_variance = analytic_variance
        if analytic_variance:
            if self.diffusion.schedule.timesteps is None:
                raise ValueError(f"schedule: analytic_variance needs discrete times, got {schedule!r}")
            self.register_buffer("x0_error", torch.full((timesteps,), -1.0))  # negative: not measured yet

    # -------------------------------------------------------------- embeddings as the network receives them

    @torch.no_grad()
    def fit_statistics(self, image_embed: Tensor) -> None:
        """Standardise each entry of an embedding by its mean and standard deviation. Call it before training.

        It helps where the image embeddings of CLIP lie in a narrow cone.

        Args:
            image_embed: embeddings [N, E] of the training data, N >= 2.

        Raises:
            TypeError, ValueError: the embeddings have the wrong dtype or shape.
        """
        self._check_embed("image_embed", image_embed)
        if len(image_embed) < 2:
            raise ValueError(f"image_embed: expected at least 2 embeddings, got {len(image_embed)}")
        scaled = self.scale_embedding(image_embed)
        self.clip_mean.copy_(scaled.mean(dim=0))
        self.clip_std.copy_(scaled.std(dim=0).clamp(min=1e-4))

    def standardised(self, embed: Tensor) -> Tensor:
        """Image embeddings [B, E] -> what the diffusion makes, with mean 0 and deviation 1 per entry."""
        scaled = self.scale_embedding(embed)
        return (scaled - self.clip_mean.to(scaled.dtype)) / self.clip_std.to(scaled.dtype)

    def restore(self, x: Tensor) -> Tensor:
        """What the network predicts, and so a sample of the diffusion -> image embeddings [B, E]."""
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
        """Measure the error of the network for analytic_variance.

        Call it after training, in evaluation mode, with thousands of pairs.

        Args:
            text: as in `forward`.
            image: as in `forward`.
            text_embed: as in `forward`.
            text_encodings: as in `forward`.
            text_mask: as in `forward`.
            image_embed: as in `forward`.
            generator: source of the noise; None is torch's default generator.
            points: the number of times at which the error is measured, see `measure_x0_error`.

        Raises:
            ValueError: the prior has analytic_variance=False.
        """
        if not self.analytic_variance:
            raise ValueError("fit_variance: expected a prior with analytic_variance=True")
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        x0 = self.standardised(self._embed_image(image, image_embed, len(caption.embed)))
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
        """The training loss, a scalar: squared error of the embedding, mean over entries and batch.

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
        """
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        batch, device = len(caption.embed), caption.embed.device
        x0 = self.standardised(self._embed_image(image, image_embed, batch))
        kept = self.condition(caption, ~bernoulli(batch, self.cond_drop_prob, device, generator))
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
        guidance_interval: Sequence[float] | None = None,  # (low, high) in log-SNR
        sampler: str | None = None,
        progress: Progress = None,
        **sampler_options: Any,
    ) -> Tensor:
        """Sample an image embedding for each caption: the best of some candidates.

        Args:
            text: token ids of the captions.
            text_embed: CLIP embeddings of the captions.
            text_encodings: CLIP encodings of the captions, with text_embed; None for none.
            text_mask: which positions of the encodings are tokens; None for all.
            negative: a caption, as CLIP.encode_text returns it, that guidance leads away from in place of no
                caption: that of "" for weights that were trained with it where the caption was dropped
                (Karlo's).
            num_samples_per_batch: the number of candidates per caption; the one with the largest cosine to
                the text embedding is kept. The paper takes two.
            seeds: one per caption; the same seed gives the same embedding in any batch. None draws them from
                `generator`.
            generator: source of the seeds; None is torch's default generator.
            steps: the number of steps; None is sample_timesteps.
            cond_scale: DALLE2-pytorch's name for `guidance`, which is used where guidance is None.
            guidance: guidance weight, a number or [B]; 1 is no guidance.
            guidance_interval: (low, high) in log-SNR: only steps at low <= log-SNR < high have guidance, see
                `GaussianDiffusion.sample`. None: all steps.
            sampler: "ddpm", "ddim", "dpm++", or "consistency" for a distilled prior, whose default it is;
                None is "ddpm" for the others.
            progress: see `GaussianDiffusion.sample`.
            sampler_options: more keywords of `GaussianDiffusion.sample` (eta, dynamic_threshold, ...).

        Returns:
            [B, E], float32 (float64 for float64 weights), of unit norm if unit_norm.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or needs a CLIP.
            RuntimeError: analytic_variance with "ddpm" before `fit_variance`.
        """
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        sampler, steps = resolve_sampler(self, sampler, steps, sampler_options.get("spacing"))
        guidance, offset = cond_scale if guidance is None else guidance, ()
        if self.guidance_input is not None:
            check_no_unconditional_rows(self.part, negative=negative, guidance_interval=guidance_interval)
            batch, device = len(caption.embed), caption.embed.device
            weights = self.guidance_input.weights(self.part, guidance, batch, device)
            offset = (self.guidance_input(weights).repeat_interleave(num_samples_per_batch, 0),)
            guidance = 1.0
        seeds, guidance, prefix = self._candidates(
            caption, negative, num_samples_per_batch, seeds, generator, guidance
        )

        def denoiser(prefix: PrefixCache) -> ConditionedNet:
            return ConditionedNet(_denoise, (self.net,), (prefix.keys_values, prefix.valid, *offset))

        conditional_net = denoiser(prefix.first(len(seeds)))
        # The state stays in float32 also for half-precision weights, whose rounding would swamp small steps.
        dtype = compute_dtype(self.net.proj_in.weight.dtype)
        if self.analytic_variance and sampler == "ddpm":
            if (self.x0_error < 0).any():
                raise RuntimeError("DiffusionPrior: analytic_variance needs fit_variance(...) first")
            sampler_options = {"x0_error": self.x0_error} | sampler_options
        options = dict(
            seeds=seeds, steps=steps, sampler=sampler,
            guidance=guidance, guidance_interval=guidance_interval, conditional_net=conditional_net,
            clip=self.sample_clip, progress=progress, device=seeds.device,
            dtype=dtype,
        ) | sampler_options
        net = conditional_net if guidance is None else denoiser(prefix)
        x = self.diffusion.sample(net, (len(seeds), self.image_embed_dim), **options)
        return best_candidate(self.restore(x), caption.embed)


def _denoise(
    net: DiffusionPriorNetwork,
    x: Tensor,  # [B, E]
    t: Tensor,  # [B]
    keys_values: list[tuple[Tensor, Tensor]],
    valid: Tensor,  # bool [B or 2B, P]
    *time_offset: Tensor,  # [B, dim], where guidance is an input
) -> Tensor:
    """The output for each caption: with twice as many, conditional ones first, x counts twice."""
    dtype = x.dtype
    if len(valid) > len(x):
        x, t = torch.cat([x, x]), torch.cat([t, t])
    return net.denoise(x, t, PrefixCache(keys_values, valid), *time_offset).to(dtype)
