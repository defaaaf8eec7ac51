"""Stages `upsampler` and `upsampler2`: from a small image to a large one, trained on crops."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.draws import draw
from dalle2_fast.evaluation.psnr import psnr
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.inputs import bernoulli
from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Preset, Recipe
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.finished import load_finished
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source


class UpsamplerStage(SceneStage):
    """The upsampler on aligned crops, which is possible because it is fully convolutional.

    In the recipe, data["crop"] is their side in pixels of the large image; data["crops_per_image"] is the
    number of crops from each scene. Whole images are used as often, each time with other noise.

    With data["sampled"], a part of the small images has the errors of the run's decoder, so that the
    upsampler learns to correct them: the decoder samples them, from the true image with noise on it. This is
    the conditioning augmentation of Ho et al., 2106.15282, section 4, with the real errors in place of noise.
    It is a dict: fraction (of the scenes), strength (low, high: how far back the decoder starts, drawn anew
    for each batch), steps (of a whole sample) and guidance (the weights, of which each batch takes one).
    """

    name = "upsampler"
    model_classes = (Upsampler,)
    stream_number = 4
    held_out_size = 4
    sampling_steps: int | None = 5  # of validation

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        self.sampled = preset.recipe(self.name).data.get("sampled")
        if self.sampled is not None:
            self.clip = load_finished(out, "clip", (CLIP,), source.device)
            self.decoder = load_finished(out, "decoder", (Decoder,), source.device)
        super().__init__(preset, source, out=out)
        if self.sampled is not None and self.decoder.image_size != self.low:
            raise TrainingError(
                f"{self.name}: sampled: expected a decoder of {self.low} pixels, "
                f"got {self.decoder.image_size}"
            )

    @classmethod
    def needs(cls, recipe: Recipe) -> tuple[str, ...]:
        return ("clip", "decoder") if recipe.data.get("sampled") else ("clip",)

    def build_model(self) -> Upsampler:
        model = Upsampler(**self.recipe.model)
        self.low, self.high = model.config["low_res_size"], model.config["image_size"]
        self.crop = self.recipe.data.get("crop", self.high)
        self.crops = self.recipe.data.get("crops_per_image", 1)
        batch_size = self.recipe.optimisation.batch_size
        if self.crop * self.low % self.high or self.crop > self.high or batch_size % self.crops:
            raise TrainingError(
                f"{self.name}: expected a crop that is a multiple of {self.high // self.low} and a batch "
                f"size that is a multiple of crops_per_image = {self.crops}, got {self.crop} and "
                f"{batch_size}"
            )
        return model

    @property
    def resolutions(self) -> tuple[int, ...]:
        clip = () if self.sampled is None else (self.clip.image_size,)
        return tuple(dict.fromkeys((self.low, self.high, *clip)))

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size // self.crops

    def why_not_captured(self) -> str | None:
        if self.sampled is not None:
            return "the decoder samples a part of its images"
        if self.model.degradation == "bsr" and self.model.degradation_prob > 0:
            return "the degradation bsr chooses its steps on the host"
        return None

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        low, high = batch["images"][self.low], batch["images"][self.high]
        if self.sampled is not None:
            chosen = bernoulli(len(low), self.sampled["fraction"], low.device, generator)
            low = torch.where(chosen[:, None, None, None], self.sample_low(batch, generator), low)
        if self.crop < self.high or self.crops > 1:
            low, high = random_crops(low, high, self.crop, self.crops, generator)
        return self.model(high, low, generator=generator, check_range=self.device.type == "cpu")

    @torch.no_grad()
    def sample_low(self, batch: dict, generator: torch.Generator) -> Tensor:
        """What the decoder makes of the small images, [B, 3, h, w] in [0, 1]."""
        options, low = self.sampled, batch["images"][self.low]

        def uniform() -> float:
            return torch.rand((), generator=generator, device=generator.device).item()

        (least, most), weights, tokens = options["strength"], options["guidance"], batch["tokens"]
        with torch.autocast(low.device.type, enabled=False):
            normalize = self.decoder.unit_norm
            embed = self.clip.encode_image(batch["images"][self.clip.image_size], normalize=normalize)
            captions: dict = {"text": tokens}
            if self.decoder.text_encoder is None:
                names = ("text_embed", "text_encodings", "text_mask")
                captions = dict(zip(names, self.clip.encode_text(tokens, normalize=normalize), strict=True))
            return self.decoder.sample(
                embed,
                **captions,
                seeds=draw_seeds(len(low), generator).to(low.device),
                init_image=low,
                strength=least + (most - least) * uniform(),
                steps=options["steps"],
                guidance=weights[int(len(weights) * uniform())],
                sampler="dpm++",
                progress=False,
            ).to(low.dtype)

    def measure(self) -> Validation:
        """PSNR in dB of the upsampler and of bicubic interpolation, compared with the render.

        Rows of images: bicubic, sampled, render. With data["sampled"], the small images are the decoder's.
        """
        low, high = self.held_out["images"][self.low], self.held_out["images"][self.high]
        if self.sampled is not None:
            low = self.sample_low(self.held_out, torch.Generator(self.device).manual_seed(0))
        sampled = self.model.sample(
            low, seeds=self.fixed_seeds(len(low)), steps=self.sampling_steps, progress=False
        )
        bicubic = F.interpolate(low, size=high.shape[-2:], mode="bicubic").clamp(0, 1)
        metrics = {
            "psnr": psnr(sampled, high).mean().item(),
            "psnr_bicubic": psnr(bicubic, high).mean().item(),
        }
        return Validation(metrics, torch.cat([bicubic, sampled, high]), columns=len(sampled))


class SecondUpsamplerStage(UpsamplerStage):
    """Another upsampler, trained on other scenes: from the size of the first one to a larger one."""

    name = "upsampler2"
    stream_number = 6


def draw_seeds(count: int, generator: torch.Generator) -> Tensor:
    """Seeds of images, int64 [count].

    Example:
        >>> draw_seeds(2, torch.Generator()).shape
        torch.Size([2])
    """
    return draw(partial(torch.randint, 0, 2**62), (count,), generator, device=generator.device)


def random_crops(
    low: Tensor,  # [B, 3, h, w]
    high: Tensor,  # [B, 3, H, W]
    crop: int,  # in pixels of `high`
    crops: int,  # number for each pair
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # [B * crops, 3, crop * h / H, crop * h / H], [B * crops, 3, crop, crop]
    """Random crops of low and high at the same positions."""
    scale = high.shape[-1] // low.shape[-1]
    side, room = crop // scale, low.shape[-1] - crop // scale
    integers = partial(torch.randint, 0, room + 1)
    corners = draw(integers, (len(low) * crops, 2), generator, device=low.device)

    def cut(images: Tensor, size: int, factor: int) -> Tensor:
        inside = torch.arange(size, device=images.device)
        rows = (corners[:, 0] * factor)[:, None] + inside
        columns = (corners[:, 1] * factor)[:, None] + inside
        owner = torch.arange(len(images), device=images.device).repeat_interleave(crops)
        pixels = images.permute(0, 2, 3, 1)[owner[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2)

    return cut(low, side, 1).contiguous(), cut(high, crop, scale).contiguous()
