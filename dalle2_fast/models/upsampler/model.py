"""The upsampler of unCLIP: a small image -> a large one, by diffusion on convolutions only.

    prediction = unet([x_t, resize(degrade(low_res))], t)

Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1; Saharia et al., "SR3", 2104.07636.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.data.images import check_images
from dalle2_fast.draws import draw
from dalle2_fast.models.diffusion_options import diffusion_of
from dalle2_fast.models.distilled import check_consistency_steps
from dalle2_fast.models.inputs import bernoulli, check_probability
from dalle2_fast.models.time_embedding import sinusoidal_embedding
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler import sampling
from dalle2_fast.models.upsampler.condition import enlarged, noised
from dalle2_fast.models.upsampler.crops import random_crops
from dalle2_fast.models.upsampler.degradation import DEGRADATIONS
from dalle2_fast.models.upsampler.tiles import tiles_for


class Upsampler(Pretrained, nn.Module):
    """low_res [B, C, h, w] -> [B, C, f h, f w] with f = image_size / low_res_size, by diffusion.

    h and w may have any size that the U-Net can halve. The defaults are Karlo's net with 691,579,523
    parameters.

    Args:
        unet: a UNet with 2 C input channels (the noisy image and the enlarged condition), or a dict of its
            arguments; None builds the default.
        last_unet: a second UNet with the same channels, or a dict of its arguments, for the last step of
            `sample` alone. Karlo's is trained separately to finish the image. `forward` trains `unet` only.
        image_size: side of the large images in pixels.
        low_res_size: side of the small images in pixels, which divides image_size.
        degradation: of the condition while training: "blur" (Gaussian, 3 x 3, sigma 0.6), "bsr" (blur,
            resampling, noise, JPEG) or None.
        degradation_prob: probability with which a condition is degraded.
        max_noise_level: while training, the condition gets noise of a level in [0, max_noise_level], at most
            1, and the level conditions the U-Net, which needs an even class_embed_dim. 0 is no noise.
        resize: the filter that enlarges the condition, "bilinear" or "bicubic".
        schedule: the name of a noise schedule, or a dict of arguments of `make_schedule`.
        timesteps: the number of discrete times of a schedule that is given by name.
        prediction: what the U-Net predicts, see `GaussianDiffusion` for this and the next eight options.
        variance: variance of the noise of DDPM; "learned_range" needs a U-Net with twice as many output
            channels.
        weighting: weighting of the loss over time.
        min_snr_gamma: gamma of the weighting "min_snr".
        log_snr_focus: range of log-SNR from which a fraction of the training times is drawn.
        vlb_weight: weight of the variational bound; None is the default of `GaussianDiffusion`.
        max_weight: upper bound on the weights of the loss.
        stratified: whether training times are stratified.
        sigma_data: standard deviation of the data, for the prediction "edm".
        residual: whether the output of the U-Net is added to the enlarged condition, so that an untrained
            model returns the condition; for prediction "sample".
        sample_timesteps: the default number of steps of `sample`.
        sample_tile: the default tile of `sample`; None for one pass.
        consistency_steps: the number of steps for which the network was distilled: it then has the sampler
            "consistency" alone, with this number of steps or a divisor of it. None: not distilled.

    Raises:
        TypeError, ValueError: an option has the wrong type or value, or sizes do not fit each other.

    Source: Ramesh et al., "unCLIP", 2204.06125, section 2.1; Saharia et al., "SR3", 2104.07636.

    Example:
        >>> unet = dict(in_channels=6, out_channels=3, channels=(8, 16), layers_per_block=1, num_groups=4,
        ...             attention_levels=(), cross_dim=None)
        >>> upsampler = Upsampler(unet, image_size=16, low_res_size=4)
        >>> upsampler(torch.rand(2, 3, 16, 16)).shape
        torch.Size([])
        >>> upsampler.sample(torch.rand(2, 3, 4, 4), seeds=torch.tensor([0, 1]), steps=2).shape
        torch.Size([2, 3, 16, 16])
    """

    part = "upsampler"
    consistency_steps: int | None = None  # of the class, because pickles of version 0.1.0 do not have it

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
        sigma_data: float = 0.5,
        residual: bool = False,
        sample_timesteps: int = 7,
        sample_tile: int | None = None,
        consistency_steps: int | None = None,
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
            max_weight=max_weight, stratified=stratified, sigma_data=sigma_data, residual=residual,
            sample_timesteps=sample_timesteps, sample_tile=sample_tile,
            consistency_steps=check_consistency_steps(consistency_steps),
        )
        self.image_size, self.low_res_size, self.factor = image_size, low_res_size, image_size // low_res_size
        self.channels, self.resize = channels, resize
        self.sample_timesteps, self.sample_tile = sample_timesteps, sample_tile
        self.consistency_steps = consistency_steps
        self.degradation, self.degradation_prob = degradation, degradation_prob
        self.max_noise_level = max_noise_level
        self.residual = residual
        self.unet = unet
        self.last_unet = last_unet
        tiles_for(unet, image_size, image_size, sample_tile, None)  # raises now if the tile is impossible
        self.diffusion = diffusion_of(self.config)

    # -- training --------------------------------------------------------------------------------------------

    def forward(
        self,
        image: Tensor,  # [B, C, H, W] in [0, 1]
        low_res: Tensor | None = None,  # [B, C, H / factor, W / factor] in [0, 1]
        *,
        crop: int | float | None = None,
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # [B, 1, H, W]
        check_range: bool = True,
    ) -> Tensor:
        """The training loss, a scalar.

        Args:
            image: the large images, whole or crops; H and W may have any size that the U-Net can halve.
            low_res: the small images; None resizes `image`.
            crop: train on one random crop x crop window of each image, with the condition made from the whole
                image: an int in pixels, or a float in (0, 1], the fraction of the shorter side. The paper
                takes 0.25. None trains on whole images.
            generator: source of the random numbers; None is torch's default generator.
            pixel_weight: factor on the squared error of each pixel.
            check_range: whether the values of the images are checked; on a GPU the host has to wait for this.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or values.
        """
        target, condition, level, pixel_weight = self.training_pair(
            image, low_res, crop=crop, generator=generator, pixel_weight=pixel_weight,
            check_range=check_range,
        )  # fmt: skip
        losses = self.diffusion.training_loss(
            lambda x, t: self.predict(self.unet, x, t, condition, level),
            target,
            generator=generator,
            pixel_weight=pixel_weight,
        )
        return losses.mean()

    def training_pair(
        self,
        image: Tensor,  # [B, C, H, W] in [0, 1]
        low_res: Tensor | None = None,  # [B, C, H / factor, W / factor] in [0, 1]
        *,
        crop: int | float | None = None,
        generator: torch.Generator | None = None,
        pixel_weight: Tensor | None = None,  # [B, 1, H, W]
        check_range: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `forward`, whose arguments these are, trains on.

        Returns:
            The target in [-1, 1], the enlarged condition, its noise level [B] or None, and the weight of the
            pixels.
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
            draws = draw(torch.rand, (batch,), generator, device=drawn_on).to(image.device)
            level = draws * self.max_noise_level
            noise = draw(torch.randn, low_res.shape, generator, device=drawn_on).to(low_res)
            low_res = noised(low_res, level, noise)
        condition = enlarged(low_res, self.factor, self.resize)
        target = image * 2 - 1
        if crop is not None:
            target, condition, pixel_weight = random_crops(
                crop, self.unet.size_multiple, generator, target, condition, pixel_weight
            )
        return target, condition, level, pixel_weight

    def predict(self, unet: UNet, x: Tensor, t: Tensor, condition: Tensor, level: Tensor | None) -> Tensor:
        """The output of `unet` at x_t [B, C, H, W], given the enlarged condition and its noise level [B]."""
        classes = None if level is None else sinusoidal_embedding(level * 1000.0, unet.class_embed_dim)
        output = unet(torch.cat([x, condition.to(x.dtype)], dim=1), t, class_labels=classes)
        return output + condition.to(output.dtype) if self.residual else output

    def check_size(self, name: str, height: int, width: int) -> None:
        """Raise ValueError unless the U-Net and the factor divide a height and a width in pixels."""
        multiple = math.lcm(self.factor, self.unet.size_multiple)
        if height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"{name}: expected height and width to be multiples of {multiple}, got {height} x {width}"
            )

    # -- sampling: a free function of an upsampler, which is also its method ---------------------------------

    sample = sampling.sample
