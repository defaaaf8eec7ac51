"""guided-diffusion's models: class -> image, and class and small image -> large image, by diffusion."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.adapters.published.adm import AdmUNet
from dalle2_fast.adapters.published.sampling import (
    check_low_res,
    enlarged_to,
    sampling_inputs,
    to_unit_range,
)
from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.checkpoints.formats.guided_diffusion import read_guided_diffusion
from dalle2_fast.checkpoints.weights import build_alone
from dalle2_fast.diffusion import GaussianDiffusion, make_schedule


class GuidedDiffusion(Pretrained, nn.Module):
    """A diffusion model of guided-diffusion: images of a class, or of no class, or enlarged images.

    `load_guided_diffusion` makes it from a file. It has no text, so that it is no part of a DALLE2.

    Args:
        unet: the arguments of `AdmUNet`.
        image_size: side of the images.
        low_res_size: side of the images that it enlarges; None for a network that does not.
        schedule: the noise schedule, "linear" or "cosine".
        timesteps: the number of discrete times.
        prediction: what the network predicts, "epsilon" or "sample".
        variance: "learned_range" for 6 output channels, else "fixed_large" or "fixed_small".
        sample_timesteps: the default number of steps of `sample`; guided-diffusion's README takes 250.

    Raises:
        ValueError: a size does not fit.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2105.05233.

    Example:
        >>> unet = dict(num_classes=10, in_channels=3, out_channels=6, channels=(8, 16), layers_per_block=1,
        ...             attention_levels=(1,), head_dim=8, cross_dim=None, num_groups=4)
        >>> model = GuidedDiffusion(unet, image_size=8)
        >>> model.sample(torch.tensor([3, 7]), seeds=torch.tensor([0, 1]), steps=2).shape
        torch.Size([2, 3, 8, 8])
    """

    part = "guided_diffusion"

    def __init__(
        self,
        unet: dict[str, Any],
        *,
        image_size: int,
        low_res_size: int | None = None,
        schedule: str = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        sample_timesteps: int = 250,
    ):
        super().__init__()
        self.unet = AdmUNet(**unet)
        if image_size % self.unet.size_multiple:
            multiple = self.unet.size_multiple
            raise ValueError(f"image_size: expected a multiple of {multiple}, got {image_size}")
        self.config = dict(
            unet=self.unet.config, image_size=image_size, low_res_size=low_res_size, schedule=schedule,
            timesteps=timesteps, prediction=prediction, variance=variance, sample_timesteps=sample_timesteps,
        )  # fmt: skip
        self.image_size, self.low_res_size, self.sample_timesteps = image_size, low_res_size, sample_timesteps
        self.diffusion = GaussianDiffusion(
            make_schedule(schedule, timesteps), prediction=prediction, variance=variance
        )

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
        timestep: Tensor,  # [B], 0..1000
        labels: Tensor | None = None,  # int64 [B]
        low_res: Tensor | None = None,  # [B, 3, h, w] in [-1, 1]
    ) -> Tensor:  # [B, 3 or 6, H, W]
        """The prediction of the network, as guided-diffusion's models return it.

        Args:
            x: noisy images.
            timestep: times.
            labels: the classes, for a network with classes.
            low_res: small images, for a network that enlarges.

        Raises:
            TypeError, ValueError: an argument has another dtype or shape, or is missing.
        """
        if low_res is not None:
            x = torch.cat([x, enlarged_to(low_res, *x.shape[2:]).to(x.dtype)], dim=1)
        return self.unet(x, timestep, class_labels=labels)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | None = None,  # int64 [B]
        *,
        low_res: Tensor | None = None,  # [B, 3, h, w] in [0, 1]
        batch_size: int | None = None,
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        sampler: str = "ddpm",
        **sampler_options: Any,
    ) -> Tensor:  # [B, 3, image_size, image_size] in [0, 1]
        """Sample images. Classifier guidance is not there: its classifiers are not loaded.

        Args:
            labels: the classes, for a network with classes.
            low_res: small images, for a network that enlarges.
            batch_size: the number of images, where neither of them says it.
            seeds: one per image; the same seed gives the same image in any batch. None draws them.
            generator: source of the seeds; None is torch's default generator.
            steps: the number of steps; None is sample_timesteps.
            sampler: "ddpm", "ddim" or "dpm++".
            sampler_options: more keywords of `GaussianDiffusion.sample` (eta, spacing, progress, ...).

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or is missing.
        """
        check_low_res(low_res, self.low_res_size)
        given = next((x for x in (labels, low_res) if x is not None), None)
        if given is None and batch_size is None:
            raise ValueError("batch_size: expected a number, because there are no labels and no low_res")
        batch = len(given) if given is not None else batch_size
        weight = self.unet.conv_in.weight
        seeds, place = sampling_inputs(weight, batch, seeds, generator)
        labels = None if labels is None else labels.to(weight.device)
        condition = None if low_res is None else low_res.to(**place) * 2 - 1
        x = self.diffusion.sample(
            lambda x, t: self(x, t, labels, condition), (batch, 3, self.image_size, self.image_size),
            seeds=seeds, steps=self.sample_timesteps if steps is None else steps, sampler=sampler,
            **place, **sampler_options,
        )  # fmt: skip
        return to_unit_range(x)


def load_guided_diffusion(
    path: str | PathLike,
    *,
    image_size: int | None = None,
    small_size: int | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    noise_schedule: str | None = None,
    diffusion_steps: int | None = None,
    use_new_attention_order: bool | None = None,
    predict_xstart: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GuidedDiffusion:
    """Load a diffusion model of guided-diffusion, such as 256x256_diffusion.pt or 64_256_upsampler.pt.

    The flags of the published files are known by their names. For any other file pass those with which it was
    trained; they have guided-diffusion's names. Widths, levels, classes and the kind of conditioning follow
    from the tensors. Nothing in the file is run.

    Args:
        path: the file.
        image_size: side of its images (large_size of an upsampler).
        small_size: of an upsampler, side of the images that it enlarges.
        num_heads: the number of attention heads.
        num_head_channels: width of an attention head, instead of num_heads.
        noise_schedule: "linear" (guided-diffusion's default) or "cosine".
        diffusion_steps: the number of times of the schedule; the default is 1000.
        use_new_attention_order: whether the rows of qkv are [3, heads, width] instead of [heads, 3, width].
        predict_xstart: whether the network predicts x0.
        device: of the model.
        dtype: of the weights, regardless of that of the file.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds another network (a classifier, a U-Net without
            resblock_updown), or a flag is missing. The message names tensors that are missing, left over or
            of another shape.

    Example:
        `model = load_guided_diffusion("64x64_diffusion.pt", device="cuda")`, then
        `model.sample(torch.tensor([1, 7]))` for images of the classes 1 and 7.

        >>> load_guided_diffusion("missing.pt")
        Traceback (most recent call last):
        FileNotFoundError: missing.pt: no such file
    """
    config, tensors = read_guided_diffusion(
        path, image_size=image_size, small_size=small_size, num_heads=num_heads,
        num_head_channels=num_head_channels, noise_schedule=noise_schedule, diffusion_steps=diffusion_steps,
        use_new_attention_order=use_new_attention_order, predict_xstart=predict_xstart,
    )  # fmt: skip
    return build_alone(GuidedDiffusion, config, tensors, path, device, dtype)
