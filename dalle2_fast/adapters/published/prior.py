"""DALLE2-pytorch's diffusion prior: caption -> CLIP image embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.adapters.published.noise import schedule_of
from dalle2_fast.adapters.published.prior_network import PriorNetwork
from dalle2_fast.adapters.published.sampling import sampling_inputs
from dalle2_fast.checkpoints import CheckpointError, Pretrained
from dalle2_fast.checkpoints.formats.dalle2_pytorch.prior import prior_network
from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import read_stored
from dalle2_fast.checkpoints.weights import build_alone
from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.models.inputs import check_features
from dalle2_fast.models.prior.base import best_candidate, candidate_seeds


class Dalle2PytorchPrior(Pretrained, nn.Module):
    """A prior of DALLE2-pytorch. `load_dalle2_pytorch_prior` makes it from a file.

    Its `sample` has the arguments of our `DiffusionPrior`, and samples with our samplers: each embedding
    depends on its seed alone.

    Args:
        net: the arguments of `PriorNetwork`.
        schedule: the noise schedule, "cosine" or "linear".
        timesteps: the number of discrete times.
        prediction: what the network predicts: "sample", "epsilon" or "v_prediction".
        embed_scale: factor on image embeddings; None is the root of their width.
        sample_timesteps: the default number of steps of `sample`.
        unit_norm: whether sampled embeddings are L2-normalised.

    Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2; DALLE2-pytorch.

    Example:
        >>> net = dict(dim=8, depth=1, heads=2, dim_head=4, ff_inner=16, max_text_len=5)
        >>> prior = Dalle2PytorchPrior(net)
        >>> embed, encodings = torch.randn(2, 8), torch.randn(2, 3, 8)
        >>> prior.sample(text_embed=embed, text_encodings=encodings, steps=2).shape
        torch.Size([2, 8])
    """

    part = "prior"
    diffuses = True

    def __init__(
        self,
        net: dict[str, Any],
        *,
        schedule: str = "cosine",
        timesteps: int = 1000,
        prediction: str = "sample",
        embed_scale: float | None = None,
        sample_timesteps: int = 64,
        unit_norm: bool = False,
    ):
        super().__init__()
        self.net = PriorNetwork(**net)
        self.config = dict(
            net=self.net.config, schedule=schedule, timesteps=timesteps, prediction=prediction,
            embed_scale=embed_scale, sample_timesteps=sample_timesteps, unit_norm=unit_norm,
        )  # fmt: skip
        self.image_embed_dim = self.net.dim
        self.embed_scale = math.sqrt(self.net.dim) if embed_scale is None else float(embed_scale)
        self.sample_timesteps, self.unit_norm = sample_timesteps, unit_norm
        self.diffusion = GaussianDiffusion(
            make_schedule(schedule, timesteps), prediction=prediction, weighting="uniform"
        )

    @torch.no_grad()
    def sample(
        self,
        *,
        text_embed: Tensor,  # [B, E]
        text_encodings: Tensor | None = None,  # [B, L, E]
        text_mask: Tensor | None = None,  # bool [B, L]
        num_samples_per_batch: int = 2,
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        cond_scale: float = 1.0,
        guidance: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        sampler: str | None = None,
        **sampler_options: Any,
    ) -> Tensor:  # [B, E]
        """Sample an image embedding for each caption: of some candidates the one nearest to the caption.

        Args:
            text_embed: CLIP embeddings of the captions, of unit norm.
            text_encodings: CLIP encodings of the captions.
            text_mask: which positions of the encodings are tokens; None: those that are not all zero.
            num_samples_per_batch: the number of candidates.
            seeds: one per caption. None draws them.
            generator: source of the seeds; None is torch's default generator.
            steps: the number of steps; None is sample_timesteps.
            cond_scale: DALLE2-pytorch's name for `guidance`, which is used where guidance is None.
            guidance: guidance weight; 1 is none.
            guidance_interval: as in `GaussianDiffusion.sample`.
            sampler: "ddpm" (None), "ddim" or "dpm++".
            sampler_options: more keywords of `GaussianDiffusion.sample`.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or there is no guidance.
        """
        check_features("text_embed", text_embed, "B, E", ("B", self.image_embed_dim))
        if text_encodings is not None:
            expected = (len(text_embed), "L", self.image_embed_dim)
            check_features("text_encodings", text_encodings, "B, L, E", expected)
        guidance = cond_scale if guidance is None else guidance
        if guidance != 1.0 and self.net.padding == "text":
            raise ValueError(
                "guidance: expected 1, because this version of DALLE2-pytorch dropped no caption in training"
            )
        if num_samples_per_batch < 1:
            raise ValueError(f"num_samples_per_batch: expected at least 1, got {num_samples_per_batch}")
        weight = self.net.learned_query
        count = num_samples_per_batch
        seeds, place = sampling_inputs(weight, len(text_embed), seeds, generator)
        seeds = candidate_seeds(seeds, count)
        caption = [
            None if x is None else x.to(weight.device).repeat_interleave(count, dim=0)
            for x in (text_embed, text_encodings, text_mask)
        ]
        nets = [self._denoiser(caption, with_null) for with_null in (False, guidance != 1.0)]
        # As DALLE2-pytorch does it: predictions of x0 are not bounded, those that follow from noise are.
        options = dict(clip=1.0 if self.diffusion.prediction == "epsilon" else None) | sampler_options
        x = self.diffusion.sample(
            nets[1], (len(seeds), self.image_embed_dim), seeds=seeds, sampler=sampler or "ddpm",
            steps=self.sample_timesteps if steps is None else steps, conditional_net=nets[0],
            guidance=None if guidance == 1.0 else guidance, guidance_interval=guidance_interval,
            **place, **options,
        )  # fmt: skip
        embeds = x / self.embed_scale
        embeds = F.normalize(embeds, dim=-1) if self.unit_norm else embeds
        return best_candidate(embeds, text_embed.to(embeds.device))

    def _denoiser(self, caption: list[Tensor | None], with_null: bool):
        """net(x, time) of the captions, and of as many dropped captions after them."""
        keep = torch.ones(len(caption[0]), dtype=torch.bool, device=caption[0].device)
        if with_null:
            caption = [None if x is None else torch.cat([x, x]) for x in caption]
            keep = torch.cat([keep, ~keep])
        prefix = self.net.encode_prefix(*caption, keep)
        repeats = 2 if with_null else 1
        return lambda x, t: self.net.denoise(x.repeat(repeats, 1), t.repeat(repeats), prefix).to(x.dtype)


def load_dalle2_pytorch_prior(
    path: str | PathLike,
    config: Mapping[str, Any] | str | PathLike | None = None,
    *,
    version: str | None = None,
    ema: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dalle2PytorchPrior:
    """Load a prior that DALLE2-pytorch trained, such as LAION's prior/latest.pth or prior_aes_finetune.pth.

    The network follows from the tensors. The noise schedule follows from its betas, which are in the file.
    Nothing in the file is run, also where it holds the trainer's objects.

    Args:
        path: the file of a DiffusionPriorTrainer, or a state_dict.
        config: prior_config.json, or its content; None takes that in the file, or the one next to it. It says
            what the tensors do not: what the network predicts, and the scale of the embeddings.
        version: of DALLE2-pytorch; None takes that in the file. Needed from 0.23 to 1.10.
        ema: whether the average over the steps is loaded; None: if the file has one.
        device: of the prior.
        dtype: of the weights, regardless of that of the file.

    Returns:
        The prior, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or has options that are not there. The message names tensors that
            are missing, left over or of another shape.

    Example:
        `prior = load_dalle2_pytorch_prior("prior/latest.pth")`, then
        `prior.sample(text_embed=embed, text_encodings=encodings)` with those of CLIP's ViT-L/14.

        >>> load_dalle2_pytorch_prior("missing.pth")
        Traceback (most recent call last):
        FileNotFoundError: missing.pth: no such file
    """
    stored = read_stored(path, "prior", config, version, ema)
    options, given = stored.config, stored.config.get("net", {})
    for name in ("self_cond", "init_image_embed_l2norm", "sampling_clamp_l2norm"):
        if options.get(name) or (isinstance(given, Mapping) and given.get(name)):
            raise CheckpointError(f"{stored.file}: {name}: this library has no such option, got True")
    net, tensors = prior_network(stored)
    prediction = "sample" if options.get("predict_x_start", True) else "epsilon"
    arguments = {
        "net": net, "prediction": "v_prediction" if options.get("predict_v") else prediction,
        "embed_scale": options.get("image_embed_scale"),
        "sample_timesteps": options.get("sample_timesteps") or 64,
        "unit_norm": bool(options.get("sampling_final_clamp_l2norm", False)),
        **schedule_of(stored, "noise_scheduler.", options.get("beta_schedule"), net["num_timesteps"]),
    }  # fmt: skip
    arguments["sample_timesteps"] = min(arguments["sample_timesteps"], arguments["timesteps"])
    return build_alone(Dalle2PytorchPrior, arguments, tensors, stored.file, device, dtype)
