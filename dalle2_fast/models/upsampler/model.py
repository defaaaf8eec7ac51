"""The upsampler of unCLIP: a small image -> a large one, by diffusion on convolutions only.

    prediction = unet([x_t, resize(degrade(low_res))], t)

Source: unCLIP, arXiv 2204.06125, section 2.1; SR3, arXiv 2104.07636; noise on the condition: Cascaded
Diffusion Models, arXiv 2106.15282, section 4.1. The defaults are Karlo's net: 691,579,523 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.schedules import make_schedule
from dalle2_fast.functional import add_noise, sample_noise
from dalle2_fast.models.inputs import check_probability, coin, resolve_seeds
from dalle2_fast.models.unet.blocks import sinusoidal_embedding
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler.degradation import DEGRADATIONS
from dalle2_fast.models.upsampler.tiles import Tiles

# unCLIP's own two, appendix C: their losses are on crops of a quarter of the side, their samplers DDIM.
# Upsampler(**UNCLIP_256) has 700 million parameters, Upsampler(**UNCLIP_1024) 300 million.
UNCLIP_256 = dict(
    unet=dict(
        in_channels=6, out_channels=3, channels=(320, 640, 960, 1280), layers_per_block=3,
        attention_levels=(), cross_dim=None, dropout=0.1,
    ),
    image_size=256, low_res_size=64, degradation="blur", schedule="cosine", sample_timesteps=27,
)
UNCLIP_1024 = dict(
    unet=dict(
        in_channels=6, out_channels=3, channels=(192, 192, 384, 384, 768, 768), layers_per_block=2,
        attention_levels=(), cross_dim=None,
    ),
    image_size=1024, low_res_size=256, degradation="bsr", schedule="linear", sample_timesteps=15,
    sample_tile=512,
)

# The noise of the condition while sampling: a Philox step that no sampler reaches, nor the initial noise.
_CONDITION_NOISE_STEP = 2**31 - 2


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
            unet=unet.config,
            last_unet=None if last_unet is None else last_unet.config,
            image_size=image_size,
            low_res_size=low_res_size,
            degradation=degradation,
            degradation_prob=degradation_prob,
            max_noise_level=max_noise_level,
            resize=resize,
            schedule=schedule,
            timesteps=timesteps,
            prediction=prediction,
            variance=variance,
            weighting=weighting,
            min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else list(log_snr_focus),
            vlb_weight=vlb_weight,
            max_weight=max_weight,
            stratified=stratified,
            residual=residual,
            sample_timesteps=sample_timesteps,
            sample_tile=sample_tile,
        )
        self.image_size, self.low_res_size, self.factor = image_size, low_res_size, image_size // low_res_size
        self.channels, self.resize = channels, resize
        self.sample_timesteps, self.sample_tile = sample_timesteps, sample_tile
        self.degradation, self.degradation_prob = degradation, degradation_prob
        self.max_noise_level = max_noise_level
        self.residual = residual
        self.unet = unet
        self.last_unet = last_unet
        self._tiles(image_size, image_size, sample_tile, None)  # an impossible one is found now
        options = {} if vlb_weight is None else {"vlb_weight": vlb_weight}
        self.diffusion = GaussianDiffusion(
            make_schedule(**schedule) if isinstance(schedule, dict) else make_schedule(schedule, timesteps),
            prediction=prediction,
            variance=variance,
            weighting=weighting,
            min_snr_gamma=min_snr_gamma,
            log_snr_focus=None if log_snr_focus is None else tuple(log_snr_focus),
            max_weight=max_weight,
            stratified=stratified,
            **options,
        )

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
        self._check_size("image", height, width)
        small = (height // self.factor, width // self.factor)
        if low_res is None:
            low_res = F.interpolate(image, small, mode="bicubic", antialias=True).clamp(0, 1)
        else:
            check_images("low_res", low_res, self.channels, small, batch, check_range=check_range)
        if self.degradation is not None and self.degradation_prob > 0:
            with torch.autocast(image.device.type, enabled=False):  # pixels, not features
                degraded = DEGRADATIONS[self.degradation](low_res, generator)
            chosen = coin(batch, self.degradation_prob, image.device, generator)
            low_res = torch.where(chosen[:, None, None, None], degraded, low_res)
        low_res, level = low_res * 2 - 1, None
        if self.max_noise_level > 0:
            drawn_on = generator.device if generator is not None else image.device
            draws = torch.rand(batch, generator=generator, device=drawn_on).to(image.device)
            level = draws * self.max_noise_level
            noise = torch.randn(low_res.shape, generator=generator, device=drawn_on).to(low_res)
            low_res = self._add_noise(low_res, level, noise)
        condition = self._enlarge(low_res)
        target = image * 2 - 1
        if crop is not None:
            target, condition, pixel_weight = self._crop(crop, generator, target, condition, pixel_weight)
        losses = self.diffusion.training_loss(
            lambda x, t: self._predict(self.unet, x, t, condition, level),
            target,
            generator=generator,
            pixel_weight=pixel_weight,
        )
        return losses.mean()

    # -- sampling --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,  # [B, C, h, w] in [0, 1]
        *,
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        sampler: str = "ddpm",
        noise_level: float = 0.0,
        tile: int | None = None,
        overlap: int | None = None,
        progress: Callable | bool | None = None,
        **sampler_options,
    ) -> Tensor:
        """Images [B, C, factor * h, factor * w] float32 in [0, 1].

        seeds: one int64 an image, the same seed giving the same picture in any batch; None draws them from
        `generator`, or from torch's own. noise_level: of the condition, at most max_noise_level: more noise,
        more invention.

        tile: side of the windows of the result in which the net runs, one window of one image at a time
        (None: sample_tile; a side that holds the whole picture is one pass); overlap: of neighbours, by
        default a quarter of it, see Tiles. Both are multiples of what the U-Net halves. The net's memory is
        then that of one window: counted for Karlo's net in float32, about 5 GB of activations for a tile of
        512, 18 GB for a whole picture of 1024 (an estimate: the live tensors, without workspaces).

        Further keywords (eta, clip, dynamic_threshold, x_T, start, callback) go to GaussianDiffusion.sample.
        """
        check_images("low_res", low_res, self.channels)
        if not 0.0 <= noise_level <= self.max_noise_level:
            raise ValueError(
                f"noise_level: expected a number in [0, max_noise_level] = [0, {self.max_noise_level}], got "
                f"{noise_level}"
            )
        batch, _, height, width = low_res.shape
        height, width = height * self.factor, width * self.factor
        self._check_size("low_res times the factor", height, width)
        weight = self.unet.conv_in.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        seeds = resolve_seeds(seeds, batch, weight.device, generator)
        low_res, level = low_res.to(weight.device, dtype) * 2 - 1, None
        if self.max_noise_level > 0:
            level = torch.full((batch,), noise_level, device=weight.device)
            noise = sample_noise(seeds, _CONDITION_NOISE_STEP, tuple(low_res.shape), dtype=dtype)
            low_res = self._add_noise(low_res, level, noise)
        condition = self._enlarge(low_res)
        tiles = self._tiles(height, width, self.sample_tile if tile is None else tile, overlap)

        def denoiser(unet: UNet) -> Callable[[Tensor, Tensor], Tensor]:
            def predict(x: Tensor, condition: Tensor, t: Tensor, level: Tensor | None) -> Tensor:
                return self._predict(unet, x, t, condition, level)

            if tiles is None:
                return lambda x, t: predict(x, condition, t, level)
            return lambda x, t: tiles.run(predict, (t, level), x, condition)

        images = self.diffusion.sample(
            denoiser(self.unet),
            (batch, self.channels, height, width),
            last_net=None if self.last_unet is None else denoiser(self.last_unet),
            seeds=seeds,
            sampler=sampler,
            steps=self.sample_timesteps if steps is None else steps,
            progress=progress,
            device=weight.device,
            dtype=dtype,
            **sampler_options,
        )
        return ((images + 1) / 2).clamp(0, 1)

    # -- pieces ----------------------------------------------------------------------------------------------

    def _predict(self, unet: UNet, x: Tensor, t: Tensor, condition: Tensor, level: Tensor | None) -> Tensor:
        classes = None if level is None else sinusoidal_embedding(level * 1000.0, unet.class_embed_dim)
        output = unet(torch.cat([x, condition.to(x.dtype)], dim=1), t, class_labels=classes)
        return output + condition.to(output.dtype) if self.residual else output

    def _enlarge(self, low_res: Tensor) -> Tensor:
        # antialias changes nothing for "bilinear"; for "bicubic" it selects the usual coefficients, a = -0.5.
        return F.interpolate(low_res, scale_factor=self.factor, mode=self.resize, antialias=True)

    @staticmethod
    def _add_noise(low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Variance-preserving: level 0 is clean, level 1 pure noise."""
        angle = level.float() * (math.pi / 2)
        return add_noise(low_res, angle.cos(), angle.sin(), noise)[0]

    def _crop(
        self,
        crop: int | float,
        generator: torch.Generator | None,
        image: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The same random crop x crop window of each image's tensors."""
        batch, _, height, width = image.shape
        multiple, largest = self.unet.size_multiple, min(height, width)
        if isinstance(crop, float):
            if not 0.0 < crop <= 1.0:
                raise ValueError(f"crop: expected a part of the side in (0, 1], or an int, got {crop}")
            crop = max(multiple, round(crop * largest / multiple) * multiple)
        if not 0 < crop <= largest or crop % multiple:
            raise ValueError(f"crop: expected a multiple of {multiple} up to {largest}, got {crop}")
        device = image.device
        drawn_on = generator.device if generator is not None else "cpu"

        def window(length: int) -> Tensor:
            start = torch.randint(length - crop + 1, (batch, 1), generator=generator, device=drawn_on)
            return start.to(device) + torch.arange(crop, device=device)

        rows, columns = window(height)[:, None, :, None], window(width)[:, None, None, :]
        owner = torch.arange(batch, device=device)[:, None, None, None]

        def cut(x: Tensor) -> Tensor:
            return x[owner, torch.arange(x.shape[1], device=device)[:, None, None], rows, columns]

        return tuple(None if x is None else cut(x) for x in (image, *others))

    def _tiles(self, height: int, width: int, tile: int | None, overlap: int | None) -> Tiles | None:
        """None where one pass does it. One that is not allowed is an error in any case."""
        if tile is None:
            if overlap is not None:
                raise ValueError(f"overlap: expected a tile with it, got overlap={overlap} alone")
            return None
        weight = self.unet.conv_in.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tiles = Tiles(height, width, tile, overlap, self.unet.size_multiple, weight.device, dtype)
        return None if len(tiles) == 1 else tiles

    def _check_size(self, name: str, height: int, width: int) -> None:
        multiple = math.lcm(self.factor, self.unet.size_multiple)
        if height % multiple or width % multiple or not height or not width:
            raise ValueError(
                f"{name}: expected height and width to be multiples of {multiple}, got {height} x {width}"
            )
