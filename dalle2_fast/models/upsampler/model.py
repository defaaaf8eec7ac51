"""The upsampler of unCLIP: a small image -> a large one, by diffusion on convolutions only.

    prediction = unet([x_t, resize(degrade(low_res))], t)

Source: unCLIP, arXiv 2204.06125, section 2.1; SR3, arXiv 2104.07636. The defaults are Karlo's net:
691,579,523 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.data.images import check_images
from dalle2_fast.models.diffusion_options import diffusion_of
from dalle2_fast.models.inputs import bernoulli, check_probability
from dalle2_fast.models.time_embedding import sinusoidal_embedding
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler import sampling
from dalle2_fast.models.upsampler.condition import enlarged, noised
from dalle2_fast.models.upsampler.crops import random_crops
from dalle2_fast.models.upsampler.degradation import DEGRADATIONS
from dalle2_fast.models.upsampler.tiles import tiles_for


class Upsampler(Pretrained, nn.Module):
    """low_res [B, C, h, w] -> [B, C, f h, f w], f = image_size / low_res_size, any h and w that the U-Net can
    halve.

    unet: a UNet with 2 C input channels (noisy image, resized condition), or its config; None builds the
        default.
    last_unet: a second net of the same channels, or its config, for the last step of `sample` alone: Karlo's
        is trained apart to finish the picture. The loss of `forward` is that of `unet`.
    degradation: of the condition while training: "blur" (Gaussian, 3 x 3, sigma 0.6), "bsr" (blur,
        resampling, noise, JPEG) or None; degradation_prob: how often.
    max_noise_level: 0 = off; otherwise the condition gets noise of a level drawn from [0, max_noise_level],
        at most 1, of which the U-Net is told: it needs a class_embed_dim (even).
    resize: filter that enlarges the condition, "bilinear" or "bicubic".
    schedule, timesteps, prediction, variance, weighting, min_snr_gamma, log_snr_focus, vlb_weight,
        max_weight, stratified: see GaussianDiffusion. sample_timesteps, sample_tile: steps and tile of
        `sample` by default.
    residual: the U-Net's output is added to the enlarged condition, so that an untrained model already
        returns that; for prediction "sample".
    """

    part = "upsampler"

    def __init__(
        self,
        unet: UNet | dict | None = None,
        *,
        last_unet: UNet | dict | None = None,
        image_size: int = 256,
        low_res_size: int = 64,
        degradation: str | None = "blur",
        degradation_prob: float = 0.5,
        max_noise_level: float = 0.0,
        resize: str = "bilinear",
        schedule: str | dict = "cosine",
        timesteps: int | None = 1000,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        weighting: str = "simple",
        min_snr_gamma: float = 5.0,
        log_snr_focus: Sequence[float] | None = None,
        vlb_weight: float | None = None,
        max_weight: float = 100.0,
        stratified: bool = False,
        residual: bool = False,
        sample_timesteps: int = 7,
        sample_tile: int | None = None,
    ):
        super().__init__()
        if unet is None:
            unet = dict(
                in_channels=6,
                out_channels=6 if variance == "learned_range" else 3,
                attention_levels=(),
                cross_dim=None,
                film=False,
                class_embed_dim=320 if max_noise_level > 0 else None,
            )
        unet = UNet(**unet) if isinstance(unet, dict) else unet
        channels = unet.in_channels // 2
        expected = channels * (2 if variance == "learned_range" else 1)
        if unet.in_channels % 2 or unet.out_channels != expected:
            raise ValueError(
                f"unet: expected in_channels = 2 C and out_channels = {expected} for variance={variance!r}, "
                f"got {unet.in_channels} and {unet.out_channels}"
            )
        last_unet = UNet(**last_unet) if isinstance(last_unet, dict) else last_unet
        if last_unet is not None:
            for name in ("in_channels", "out_channels", "class_embed_dim", "size_multiple"):
                wanted, came = getattr(unet, name), getattr(last_unet, name)
                if came != wanted:
                    raise ValueError(f"last_unet: expected {name} = {wanted}, as the unet has it, got {came}")
        if low_res_size < 1 or image_size % low_res_size or image_size % unet.size_multiple:
            raise ValueError(
                f"image_size: expected a multiple of low_res_size = {low_res_size} and of the unet's "
                f"{unet.size_multiple}, got {image_size}"
            )
        if degradation is not None and degradation not in DEGRADATIONS:
            raise ValueError(
                f"degradation: expected one of {', '.join(DEGRADATIONS)} or None, got {degradation!r}"
            )
        if resize not in ("bilinear", "bicubic"):
            raise ValueError(f'resize: expected "bilinear" or "bicubic", got {resize!r}')
        check_probability("degradation_prob", degradation_prob)
        if not 0.0 <= max_noise_level <= 1.0:
            raise ValueError(f"max_noise_level: expected a number in [0, 1], got {max_noise_level}")
        wants_level = max_noise_level > 0
        if wants_level != (unet.class_embed_dim is not None):
            raise ValueError(
                "max_noise_level: expected a unet with a class_embed_dim exactly if the level is not 0, got "
                f"max_noise_level={max_noise_level}, class_embed_dim={unet.class_embed_dim}"
            )
        if residual and (prediction != "sample" or variance == "learned_range"):
            raise ValueError(
                'residual: expected prediction="sample" and a fixed variance, got '
                f"prediction={prediction!r}, variance={variance!r}"
            )
        self.config = dict(
            unet=unet.config, last_unet=None if last_unet is None else last_unet.config,
            image_size=image_size, low_res_size=low_res_size, degradation=degradation,
            degradation_prob=degradation_prob, max_noise_level=max_noise_level, resize=resize,
            schedule=schedule, timesteps=timesteps, prediction=prediction, variance=variance,
            weighting=weighting, min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else list(log_snr_focus), vlb_weight=vlb_weight,
            max_weight=max_weight, stratified=stratified, residual=residual,
            sample_timesteps=sample_timesteps, sample_tile=sample_tile,
        )
        self.image_size, self.low_res_size, self.factor = image_size, low_res_size, image_size // low_res_size
        self.channels, self.resize = channels, resize
        self.sample_timesteps, self.sample_tile = sample_timesteps, sample_tile
        self.degradation, self.degradation_prob = degradation, degradation_prob
        self.max_noise_level = max_noise_level
        self.residual = residual
        self.unet = unet
        self.last_unet = last_unet
        tiles_for(unet, image_size, image_size, sample_tile, None)  # an impossible one is found now
        self.diffusion = diffusion_of(self.config)

    # -- training --------------------------------------------------------------------------------------------

    def forward(
        self,
        image: Tensor,  # [B, C, H, W] in [0, 1]
        low_res: Tensor | None = None,  # [B, C, H / factor, W / factor] in [0, 1]; None = image, made smaller
        *,
        crop: int | float | None = None,
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # [B, 1, H, W], weight of the squared error
        check_range: bool = True,
    ) -> Tensor:
        """The training loss, a scalar. H and W may be any size that the U-Net can halve: whole images or
        crops.

        crop: train on one random crop x crop window of each image; the condition is made from the whole one.
            An int is in pixels, a float in (0, 1] the part of the shorter side: 0.25 is the paper's.
        check_range=False skips the look at the values, for which the host has to wait for a GPU.
        """
        check_images("image", image, self.channels, check_range=check_range)
        batch, _, height, width = image.shape
        self.check_size("image", height, width)
        small = (height // self.factor, width // self.factor)
        if low_res is None:
            low_res = F.interpolate(image, small, mode="bicubic", antialias=True).clamp(0, 1)
        else:
            check_images("low_res", low_res, self.channels, small, batch, check_range=check_range)
        if self.degradation is not None and self.degradation_prob > 0:
            with torch.autocast(image.device.type, enabled=False):  # pixels, not features
                degraded = DEGRADATIONS[self.degradation](low_res, generator)
            chosen = bernoulli(batch, self.degradation_prob, image.device, generator)
            low_res = torch.where(chosen[:, None, None, None], degraded, low_res)
        low_res, level = low_res * 2 - 1, None
        if self.max_noise_level > 0:
            drawn_on = generator.device if generator is not None else image.device
            draws = torch.rand(batch, generator=generator, device=drawn_on).to(image.device)
            level = draws * self.max_noise_level
            noise = torch.randn(low_res.shape, generator=generator, device=drawn_on).to(low_res)
            low_res = noised(low_res, level, noise)
        condition = enlarged(low_res, self.factor, self.resize)
        target = image * 2 - 1
        if crop is not None:
            target, condition, pixel_weight = random_crops(
                crop, self.unet.size_multiple, generator, target, condition, pixel_weight
            )
        losses = self.diffusion.training_loss(
            lambda x, t: self.predict(self.unet, x, t, condition, level),
            target,
            generator=generator,
            pixel_weight=pixel_weight,
        )
        return losses.mean()

    def predict(self, unet: UNet, x: Tensor, t: Tensor, condition: Tensor, level: Tensor | None) -> Tensor:
        classes = None if level is None else sinusoidal_embedding(level * 1000.0, unet.class_embed_dim)
        output = unet(torch.cat([x, condition.to(x.dtype)], dim=1), t, class_labels=classes)
        return output + condition.to(output.dtype) if self.residual else output

    def check_size(self, name: str, height: int, width: int) -> None:
        multiple = math.lcm(self.factor, self.unet.size_multiple)
        if height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"{name}: expected height and width to be multiples of {multiple}, got {height} x {width}"
            )

    # -- sampling: a free function of an upsampler, which is its method as well ------------------------------

    sample = sampling.sample
