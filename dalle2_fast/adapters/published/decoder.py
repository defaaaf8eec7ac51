"""DALLE2-pytorch's decoder: CLIP image embedding and caption -> image, by a cascade of U-Nets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.adapters.published.noise import schedule_of
from dalle2_fast.adapters.published.sampling import sampling_inputs, to_unit_range
from dalle2_fast.adapters.published.unet import Dalle2PytorchUnet
from dalle2_fast.checkpoints import CheckpointError, Pretrained
from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import Stored, read_stored
from dalle2_fast.checkpoints.formats.dalle2_pytorch.unet import unet_of
from dalle2_fast.checkpoints.weights import build
from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.models.inputs import check_features
from dalle2_fast.seeds import derived_seeds


class Dalle2PytorchDecoder(Pretrained, nn.Module):
    """The U-Nets of a decoder of DALLE2-pytorch. `load_dalle2_pytorch_decoder` makes it from a file.

    Args:
        stages: of each U-Net, in order, a dict of `unet` (the arguments of `Dalle2PytorchUnet`), image_size,
            low_res_size (None for the first of a cascade), schedule, timesteps, prediction, variance, and
            sample_timesteps.

    Raises:
        ValueError: there is no stage, or one does not begin where the stage before it ends.

    Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1; DALLE2-pytorch.

    Example:
        >>> unet = dict(dim=8, widths=[8, 8, 16], blocks=[1, 1], attention=[None, "self"], groups=[4, 4],
        ...             cond_dim=6, image_embed_dim=5, heads=2, dim_head=4, channels_out=6)
        >>> stage = dict(unet=unet, image_size=8, variance="learned_range")
        >>> decoder = Dalle2PytorchDecoder([stage])
        >>> decoder.sample(torch.randn(2, 5), seeds=torch.tensor([0, 1]), steps=2, guidance=2.0).shape
        torch.Size([2, 3, 8, 8])
    """

    part = "decoder"

    def __init__(self, stages: Sequence[Mapping[str, Any]]):
        super().__init__()
        if not stages:
            raise ValueError("stages: expected at least one")
        defaults = dict(
            low_res_size=None, schedule="cosine", timesteps=1000, prediction="epsilon",
            variance="fixed_small", sample_timesteps=None,
        )  # fmt: skip
        self.stages = [defaults | dict(stage) for stage in stages]
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            if stage["low_res_size"] != before["image_size"]:
                came, expected = stage["low_res_size"], before["image_size"]
                raise ValueError(f"stages: expected a low_res_size of {expected}, got {came}")
        self.unets = nn.ModuleList(Dalle2PytorchUnet(**stage["unet"]) for stage in self.stages)
        for stage, unet in zip(self.stages, self.unets, strict=True):
            stage["unet"] = unet.config
        self.config = dict(stages=self.stages)
        self.diffusions = [
            GaussianDiffusion(
                make_schedule(stage["schedule"], stage["timesteps"]), prediction=stage["prediction"],
                variance=stage["variance"],
            )
            for stage in self.stages
        ]  # fmt: skip

    @torch.no_grad()
    def sample(
        self,
        image_embed: Tensor,  # [B, E]
        *,
        text_encodings: Tensor | None = None,  # [B, L, D]
        text_mask: Tensor | None = None,  # bool [B, L]
        image: Tensor | None = None,  # [B, 3, h, w] in [0, 1]
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | Sequence[int] | None = None,
        cond_scale: float = 1.0,
        guidance: float | None = None,
        sampler: str = "ddpm",
        **sampler_options: Any,
    ) -> Tensor:  # [B, 3, H, W] in [0, 1]
        """Sample images through all stages.

        Args:
            image_embed: CLIP image embeddings of unit norm, from a prior or of images.
            text_encodings: CLIP encodings of the captions, for a decoder that takes them.
            text_mask: which of their positions are tokens; None: those that are not all zero.
            image: images to enlarge, where the first stage is an upsampler.
            seeds: one per image; the same seed gives the same image in any batch. None draws them.
            generator: source of the seeds; None is torch's default generator.
            steps: the number of steps, one or one per stage; None is that of the stage, else 64.
            cond_scale: DALLE2-pytorch's name for `guidance`, which is used where guidance is None.
            guidance: guidance weight of the first stage; upsamplers have none.
            sampler: "ddpm", "ddim" or "dpm++".
            sampler_options: more keywords of `GaussianDiffusion.sample`.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or is missing.
        """
        first, widths = self.stages[0], [unet.image_embed_dim for unet in self.unets]
        check_features("image_embed", image_embed, "B, E", ("B", widths[0] if widths[0] else "E"))
        if any(unet.text_embed_dim for unet in self.unets) != (text_encodings is not None):
            needs = "expected" if text_encodings is None else "expected None, because this decoder takes no"
            raise ValueError(f"text_encodings: {needs} encodings of captions")
        if (image is None) != (first["low_res_size"] is None):
            raise ValueError("image: expected exactly where the first stage is an upsampler")
        if image is not None:
            check_images("image", image, 3, batch=len(image_embed))
        seeds, place = sampling_inputs(self.unets[0].to_out.weight, len(image_embed), seeds, generator)
        counts = list(steps) if isinstance(steps, Sequence) else [steps] * len(self.stages)
        if len(counts) != len(self.stages):
            raise ValueError(f"steps: expected one number or {len(self.stages)}, got {len(counts)}")
        guidance = cond_scale if guidance is None else guidance
        conditions = [
            None if x is None else x.to(place["device"]) for x in (image_embed, text_encodings, text_mask)
        ]
        for number, (stage, count) in enumerate(zip(self.stages, counts, strict=True)):
            condition = None
            if stage["low_res_size"] is not None:
                # The nearest pixels, as in training.
                small = F.interpolate(image.to(**place), (stage["low_res_size"],) * 2)
                condition, guidance = F.interpolate(small, (stage["image_size"],) * 2) * 2 - 1, 1.0
            image = self._sample_stage(
                number, conditions, condition, derived_seeds(seeds, number) if number else seeds,
                count or stage["sample_timesteps"] or 64, guidance, sampler=sampler, **place,
                **sampler_options,
            )  # fmt: skip
        return image

    def _sample_stage(
        self, number: int, conditions: list[Tensor | None], low_res: Tensor | None, seeds: Tensor, steps: int,
        guidance: float, **options: Any,
    ) -> Tensor:  # fmt: skip
        unet, size, batch = self.unets[number], self.stages[number]["image_size"], len(seeds)
        weight = unet.to_out.weight

        def net(repeats: int):
            keep = torch.arange(repeats * batch, device=weight.device) < batch
            given = [None if x is None else torch.cat([x] * repeats) for x in (*conditions, low_res)]
            given = [x if x is None or x.dtype == torch.bool else x.to(weight.dtype) for x in given]

            def denoise(x: Tensor, t: Tensor) -> Tensor:
                doubled = torch.cat([x] * repeats).to(weight.dtype)
                return unet(doubled, torch.cat([t] * repeats), *given, keep).to(x.dtype)

            return denoise

        images = self.diffusions[number].sample(
            net(1 if guidance == 1.0 else 2), (batch, 3, size, size), seeds=seeds, steps=steps,
            guidance=None if guidance == 1.0 else guidance, conditional_net=net(1), **options,
        )  # fmt: skip
        return to_unit_range(images)


def load_dalle2_pytorch_decoder(
    path: str | PathLike,
    config: Mapping[str, Any] | str | PathLike | None = None,
    *,
    unets: Sequence[int] | None = None,
    version: str | None = None,
    ema: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dalle2PytorchDecoder:
    """Load a decoder that DALLE2-pytorch trained, such as LAION's decoder/v1.0.2/latest.pth.

    The U-Nets follow from the tensors, and the noise from its betas, which are in the file. Nothing in the
    file is run, also where it holds the trainer's objects.

    Args:
        path: the file of a DecoderTrainer, or a state_dict.
        config: decoder_config.json, or its content; None takes that in the file, or the one next to it. It
            says what the tensors do not, at least image_size or image_sizes.
        unets: numbers of the U-Nets that are loaded, from 1, next to each other; None is all. Files of
            upsamplers hold a first U-Net that was never trained.
        version: of DALLE2-pytorch; None takes that in the file. Needed from 0.23.
        ema: whether the averages over the steps are loaded; None: if the file has them.
        device: of the decoder.
        dtype: of the weights, regardless of that of the file.

    Returns:
        The decoder, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or has options that are not there. The message names tensors that
            are missing, left over or of another shape.

    Example:
        `decoder = load_dalle2_pytorch_decoder("latest.pth", "decoder_config.json")`, then
        `decoder.sample(image_embed, text_encodings=encodings, guidance=2.0)`.

        >>> load_dalle2_pytorch_decoder("missing.pth")
        Traceback (most recent call last):
        FileNotFoundError: missing.pth: no such file
    """
    stored = read_stored(path, "decoder", config, version, ema)
    options, file = stored.config, stored.file
    others = [x for x in stored.tensors if not x.startswith(("unets.", "noise_schedulers.", "lowres_conds."))]
    if others:
        raise CheckpointError(f"{file}: the weights do not fit: left over {', '.join(others[:5])}")
    for name in ("learned_variance_constrain_frac", "use_dynamic_thres", "use_noise_for_lowres_cond", "vae"):
        if options.get(name):
            raise CheckpointError(f"{file}: {name}: this library has no such option, got {options[name]!r}")
    total = len({name.split(".")[1] for name in stored.tensors if name.startswith("unets.")})
    sizes = options.get("image_sizes") or [options.get("image_size")]
    if len(sizes) != total or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(
            f"{file}: image_sizes: expected a config with one side of images per U-Net ({total}), got {sizes}"
        )
    numbers = list(range(1, total + 1)) if unets is None else list(unets)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))) or not (
        1 <= numbers[0] and numbers[-1] <= total
    ):
        raise ValueError(f"unets: expected numbers next to each other from 1 to {total}, got {numbers}")
    stages, tensors = [], {}
    for place, number in enumerate(numbers):
        stage, weights = _stage(stored, number - 1, sorted(sizes))
        stages.append(stage)
        tensors |= {f"decoder.unets.{place}.{name}": tensor for name, tensor in weights.items()}
    arguments = {Dalle2PytorchDecoder.part: {"stages": stages}}
    return build(Dalle2PytorchDecoder, arguments, tensors, "decoder", file, device, dtype)


def _stage(stored: Stored, index: int, sizes: list[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a stage, and the weights of its U-Net."""
    options = stored.config

    def of_stage(name: str, default: Any) -> Any:
        value = options.get(name, default)
        if not isinstance(value, (list, tuple)):
            return value
        return value[index] if index < len(value) else default

    configs = options.get("unets", [])
    config = configs[index] if isinstance(configs, list) and index < len(configs) else {}
    unet, weights = unet_of(stored, index, config if isinstance(config, Mapping) else {})
    last_of_many = index == len(sizes) - 1 and index > 0
    default = "linear" if last_of_many else "cosine"
    predicts = "sample" if of_stage("predict_x_start", False) else "epsilon"
    return {
        "unet": unet, "image_size": sizes[index], "low_res_size": sizes[index - 1] if index else None,
        "prediction": "v_prediction" if of_stage("predict_v", False) else predicts,
        "variance": "learned_range" if unet["channels_out"] == 6 else "fixed_small",
        "sample_timesteps": of_stage("sample_timesteps", None),
        **schedule_of(
            stored, f"noise_schedulers.{index}.", of_stage("beta_schedule", None) or default,
            options.get("timesteps", 1000),
        ),
    }, weights  # fmt: skip
