"""The diffusion prior: from a caption to a CLIP image embedding.

A causal Transformer reads [text encodings, z_t, t, noised z_i, query] and predicts z_i itself at the query:

    loss = | f(z_i^(t), t, caption) - z_i |^2,   z_i^(t) = alpha_t z_i + sigma_t noise.

Source: unCLIP, arXiv 2204.06125, section 2.2 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.schedules import make_schedule
from dalle2_fast.models.clip import CLIP
from dalle2_fast.models.inputs import check_probability, coin, resolve_seeds
from dalle2_fast.models.prior_network import DiffusionPriorNetwork, Prefix

Caption = tuple[Tensor, Tensor | None, Tensor | None]  # embedding, encodings, mask


class DiffusionPrior(nn.Module):
    """Caption -> CLIP image embedding.

    The defaults are Karlo's prior: 1,022,030,080 numbers, of which 1,536 are embedding statistics (buffers).

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
    ):
        super().__init__()
        if not isinstance(net, DiffusionPriorNetwork):
            widths = {}
            if clip is not None:
                widths = {"embed_dim": clip.dim_latent, "text_dim": clip.config["dim_text"],
                          "context_length": clip.context_length}
            elif image_embed_dim is not None:
                widths = {"embed_dim": image_embed_dim}
            net = DiffusionPriorNetwork(**(widths | (net or {})))
        for name, width in (("image_embed_dim", image_embed_dim), ("clip", clip and clip.dim_latent)):
            if width is not None and width != net.embed_dim:
                raise ValueError(f"{name}: expected width net.embed_dim = {net.embed_dim}, got {width}")
        check_probability("cond_drop_prob", cond_drop_prob)
        if embed_scale is None:
            embed_scale = math.sqrt(net.embed_dim)
        self.config = dict(
            net=net.config, image_embed_dim=net.embed_dim, timesteps=timesteps,
            sample_timesteps=sample_timesteps, cond_drop_prob=cond_drop_prob, embed_scale=embed_scale,
            schedule=schedule, prediction=prediction, weighting=weighting, sample_clip=sample_clip,
            unit_norm=unit_norm,
        )
        self.net = net
        self.image_embed_dim = net.embed_dim
        self.sample_timesteps, self.cond_drop_prob = sample_timesteps, cond_drop_prob
        self.embed_scale, self.sample_clip, self.unit_norm = float(embed_scale), sample_clip, unit_norm
        self.diffusion = GaussianDiffusion(
            make_schedule(schedule, timesteps), prediction=prediction, weighting=weighting
        )
        self.register_buffer("clip_mean", torch.zeros(net.embed_dim))
        self.register_buffer("clip_std", torch.ones(net.embed_dim))
        # In a tuple, so that it is no submodule: a checkpoint holds its weights once, under "clip.".
        self._clip = (None if clip is None else clip.eval(),)

    @property
    def clip(self) -> CLIP | None:
        return self._clip[0]

    # ------------------------------------------------------------------ embeddings as the network sees them

    @torch.no_grad()
    def fit_statistics(self, image_embed: Tensor) -> None:
        """Standardise each entry by its mean and deviation over image_embed [N, E], N >= 2.

        It helps where CLIP's image embeddings lie in a narrow cone. Call it before training.
        """
        self._check_embed("image_embed", image_embed)
        if len(image_embed) < 2:
            raise ValueError(f"image_embed: expected at least 2 embeddings, got {len(image_embed)}")
        scaled = self._scaled(image_embed)
        self.clip_mean.copy_(scaled.mean(dim=0))
        self.clip_std.copy_(scaled.std(dim=0).clamp(min=1e-4))

    def _scaled(self, embed: Tensor) -> Tensor:
        embed = embed if embed.dtype == torch.float64 else embed.float()
        return (F.normalize(embed, dim=-1) if self.unit_norm else embed) * self.embed_scale

    def _standardised(self, embed: Tensor) -> Tensor:
        scaled = self._scaled(embed)
        return (scaled - self.clip_mean.to(scaled.dtype)) / self.clip_std.to(scaled.dtype)

    def _restored(self, x: Tensor) -> Tensor:
        embed = (x * self.clip_std.to(x.dtype) + self.clip_mean.to(x.dtype)) / self.embed_scale
        return F.normalize(embed, dim=-1) if self.unit_norm else embed

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
        if (image is None) == (image_embed is None):
            raise ValueError("image, image_embed: expected exactly one of the two")
        if image is not None:
            with torch.no_grad():
                image_embed = self._need_clip("image").encode_image(image, normalize=self.unit_norm)
        batch, device = len(caption[0]), caption[0].device
        self._check_embed("image_embed", image_embed, batch)
        condition = self._condition(caption, ~coin(batch, self.cond_drop_prob, device, generator))
        losses = self.diffusion.training_loss(
            lambda x, t: self.net(x, t, *condition), self._standardised(image_embed), generator=generator
        )
        return losses.mean()

    def _condition(self, caption: Caption, keep: Tensor) -> Caption:
        """What the network is told: scaled embedding, encodings, mask. Where keep [B] is False it is told
        nothing: a zero embedding (the projection's bias speaks for it) and no text positions."""
        text_embed, text_encodings, text_mask = caption
        weights = self.net.proj_in.weight.dtype
        embed = torch.where(keep[:, None], self._scaled(text_embed), 0.0).to(weights)
        if text_encodings is None:
            return embed, None, None
        if text_mask is None:
            text_mask = torch.ones(text_encodings.shape[:2], dtype=torch.bool, device=embed.device)
        return embed, text_encodings.to(weights), text_mask & keep[:, None]

    # ------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        text: Tensor | None = None,  # int64 [B, L], needs clip
        *,
        text_embed: Tensor | None = None,  # [B, E], instead of text
        text_encodings: Tensor | None = None,  # [B, L, text_dim]
        text_mask: Tensor | None = None,  # bool [B, L]
        num_samples_per_batch: int = 2,
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        cond_scale: float | Tensor = 1.0,
        guidance: float | Tensor | None = None,
        sampler: str = "ddpm",
        progress: Callable | bool | None = None,
        **sampler_options,
    ) -> Tensor:
        """An image embedding [B, E] for each caption: float32 (float64 for such weights), of unit norm.

        Draws num_samples_per_batch candidates a caption and keeps the one with the largest cosine to the text
        embedding; the paper takes two.

        seeds: one a caption; the same seed gives the same embedding in any batch. None draws them from
            `generator`, or from torch's own generator.
        steps: sample_timesteps by default. sampler: "ddpm", "ddim" or "dpm++".
        guidance: = cond_scale (DALLE2-pytorch's name), a number or [B]; 1 is none.
        sampler_options: further keywords of GaussianDiffusion.sample (eta, dynamic_threshold, ...).
        """
        caption = self._caption(text, text_embed, text_encodings, text_mask)
        batch, device = len(caption[0]), caption[0].device
        count = num_samples_per_batch
        if count < 1:
            raise ValueError(f"num_samples_per_batch: expected at least 1, got {count}")
        seeds = _candidate_seeds(resolve_seeds(seeds, batch, device, generator), count)
        guidance = cond_scale if guidance is None else guidance
        if isinstance(guidance, Tensor):
            guidance = guidance.to(device).expand(batch).repeat_interleave(count)
        elif guidance == 1.0:
            guidance = None
        prefix = self._remember(caption, count, guided=guidance is not None)

        def net(x: Tensor, t: Tensor) -> Tensor:
            if guidance is not None:  # conditional rows, then unconditional ones: one pass
                x, t = torch.cat([x, x]), torch.cat([t, t])
            return self.net.denoise(x, t, prefix).to(x.dtype)

        # The state stays in float32 also for half-precision weights: many small steps drown in rounding.
        double = self.net.proj_in.weight.dtype == torch.float64
        options = dict(
            seeds=seeds, steps=self.sample_timesteps if steps is None else steps, sampler=sampler,
            guidance=guidance, clip=self.sample_clip, progress=progress, device=device,
            dtype=torch.float64 if double else torch.float32,
        ) | sampler_options
        x = self.diffusion.sample(net, (batch * count, self.image_embed_dim), **options)
        candidates = self._restored(x).unflatten(0, (batch, count))
        text_unit = F.normalize(caption[0].to(candidates.dtype), dim=-1)
        cosine = (F.normalize(candidates, dim=-1) * text_unit[:, None]).sum(dim=-1)
        return candidates[torch.arange(batch, device=device), cosine.argmax(dim=1)]

    def _remember(self, caption: Caption, count: int, guided: bool) -> Prefix:
        """The captions' part of the network, computed once for all steps and all `count` candidates."""
        keep = torch.ones(len(caption[0]), dtype=torch.bool, device=caption[0].device)
        condition = self._condition(caption, keep)
        if guided:
            nothing = self._condition(caption, ~keep)
            pairs = zip(condition, nothing, strict=True)
            condition = tuple(None if a is None else torch.cat([a, b]) for a, b in pairs)
        return self.net.remember(*condition).repeat_interleave(count)

    # --------------------------------------------------------------------------------------------- inputs

    def _need_clip(self, what: str) -> CLIP:
        if self.clip is None:
            raise ValueError(f"{what}: needs a prior built with clip=...; without one pass {what}_embed")
        return self.clip

    def _caption(
        self,
        text: Tensor | None,
        text_embed: Tensor | None,
        text_encodings: Tensor | None,
        text_mask: Tensor | None,
    ) -> Caption:
        if (text is None) == (text_embed is None):
            raise ValueError("text, text_embed: expected exactly one of the two")
        if text is not None:
            if text_encodings is not None or text_mask is not None:
                raise ValueError("text_encodings, text_mask: expected with text_embed only, not with text")
            with torch.no_grad():
                return self._need_clip("text").encode_text(text, normalize=self.unit_norm)
        self._check_embed("text_embed", text_embed)
        if text_encodings is None:
            if text_mask is not None:
                raise ValueError("text_mask: expected together with text_encodings only")
            return text_embed, None, None
        batch, limit, width = len(text_embed), self.net.context_length, self.net.text_dim
        shape = tuple(text_encodings.shape)
        if len(shape) != 3 or shape[0] != batch or shape[1] > limit or shape[2] != width:
            expected = f"[B, L, D] = ({batch}, L <= {limit}, {width})"
            raise ValueError(f"text_encodings: expected {expected}, got {shape}")
        if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != shape[:2]):
            came = f"{text_mask.dtype} {tuple(text_mask.shape)}"
            raise ValueError(f"text_mask: expected bool [B, L] = {shape[:2]}, got {came}")
        return text_embed, text_encodings, text_mask

    def _check_embed(self, name: str, embed: Tensor, batch: int | None = None) -> None:
        width = self.image_embed_dim
        if not isinstance(embed, Tensor) or not embed.is_floating_point():
            came = embed.dtype if isinstance(embed, Tensor) else type(embed).__name__
            raise TypeError(f"{name}: expected a floating-point tensor [B, {width}], got {came}")
        if embed.ndim != 2 or embed.shape[1] != width or batch not in (None, len(embed)):
            expected = f"({'B' if batch is None else batch}, {width})"
            raise ValueError(f"{name}: expected [B, E] = {expected}, got {tuple(embed.shape)}")


def _candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """[B] -> [B * count], the candidates of one caption side by side, each with noise of its own.

    Candidate k gets seed xor (k + 1) * (2^64 / golden ratio). None keeps the plain seed: a decoder that is
    given the same one would start from the same numbers as the prior.
    """
    golden = 0x9E3779B97F4A7C15 - 2**64  # as a signed integer; the product wraps, as intended
    offsets = torch.arange(1, count + 1, device=seeds.device) * golden
    return (seeds[:, None] ^ offsets).flatten()
