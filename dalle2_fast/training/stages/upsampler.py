"""Stages `upsampler` and `upsampler2`: from a small image to a large one, trained on crops."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.draws import draw
from dalle2_fast.evaluation.psnr import psnr
from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.protocol import Validation


class UpsamplerStage(SceneStage):
    """The upsampler on aligned crops, which is possible because it is fully convolutional.

    In the recipe, data["crop"] is their side in pixels of the large image; data["crops_per_image"] is the
    number of crops from each rendered scene.
    """

    name = "upsampler"
    model_classes = (Upsampler,)
    stream_number = 4
    held_out_size = 4
    sampling_steps: int | None = 5  # of validation

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
        return self.low, self.high

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size // self.crops

    def why_not_captured(self) -> str | None:
        if self.model.degradation == "bsr" and self.model.degradation_prob > 0:
            return "the degradation bsr chooses its steps on the host"
        return None

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        low, high = batch["images"][self.low], batch["images"][self.high]
        if self.crop < self.high:
            low, high = random_crops(low, high, self.crop, self.crops, generator)
        return self.model(high, low, generator=generator, check_range=self.device.type == "cpu")

    def measure(self) -> Validation:
        """PSNR in dB of the upsampler and of bicubic interpolation, compared with the render.

        Rows of images: bicubic, sampled, render.
        """
        low, high = self.held_out["images"][self.low], self.held_out["images"][self.high]
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
