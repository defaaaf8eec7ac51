"""The four stages: what each learns from a batch, how it is scored on the way, how its weights are stored."""
from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.data.render import render
from dalle2_fast.data.scenes import World
from dalle2_fast.data.stream import SceneStream
from dalle2_fast.models.clip import CLIP
from dalle2_fast.models.decoder import Decoder
from dalle2_fast.models.prior import DiffusionPrior, DiffusionPriorNetwork
from dalle2_fast.models.unet import UNet
from dalle2_fast.models.upsampler import Upsampler
from dalle2_fast.training.folder import TrainingError, load_weights
from dalle2_fast.training.presets import Preset, Recipe

# Each stage draws its own scenes: the same seed must not show every stage the same pictures in the same
# order.
STREAM_OFFSETS = {"clip": 1, "prior": 2, "decoder": 3, "upsampler": 4, "held-out": 5}


def build_clip(model: dict) -> CLIP:
    return CLIP(**model)


def build_prior(model: dict) -> DiffusionPrior:
    options = dict(model)
    return DiffusionPrior(net=DiffusionPriorNetwork(**options.pop("net")), **options)


def build_decoder(model: dict) -> Decoder:
    options = dict(model)
    return Decoder(unet=UNet(**options.pop("unet")), **options)


def build_upsampler(model: dict) -> Upsampler:
    options = dict(model)
    return Upsampler(unet=UNet(**options.pop("unet")), **options)


BUILDERS = {"clip": build_clip, "prior": build_prior, "decoder": build_decoder, "upsampler": build_upsampler}


def load_stage(out: Path, name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The finished model of stage `name` under `out` (averaged weights, eval mode, no gradients)."""
    path = Path(out) / name / "model.safetensors"
    if not path.exists():
        raise TrainingError(
            f"{path} does not exist: train that stage first: dalle2-fast train {name} --out {out}"
        )
    config, tensors = load_weights(path)
    model = BUILDERS[name](config["model"])
    model.load_state_dict(tensors)
    return model.to(device).eval().requires_grad_(False)


class SceneStage:
    """What the stages share: the stream of training batches and a small fixed held-out batch."""

    name: str
    resolutions: tuple[int, ...]
    held_out_size = 64

    def __init__(
        self,
        preset: Preset,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        shards: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.world = World(**preset.world)
        batch_size = batch_size or recipe.optimisation.batch_size
        options = self.stream_options()
        if shards is None:
            self.stream = SceneStream(
                self.world,
                batch_size,
                self.resolutions,
                seed=seed * 16 + STREAM_OFFSETS[self.name],
                split="train",
                device=device,
                **options,
            )
        else:
            from dalle2_fast.data.webdata import WebDatasetStream  # an optional extra

            self.stream = WebDatasetStream(
                shards, batch_size=batch_size, resolutions=self.resolutions, seed=seed, device=device
            )
        held_out = SceneStream(
            self.world,
            self.held_out_size,
            self.resolutions,
            seed=seed * 16 + STREAM_OFFSETS["held-out"],
            split="iid",
            device=device,
            **options,
        )
        self.held_out = held_out.batch(0)

    def stream_options(self) -> dict:
        return {}

    def batch(self, step: int) -> dict:
        return self.stream.batch(step)

    def metrics(self) -> dict[str, float]:
        return {}

    def pictures(self) -> tuple[Tensor, int] | None:
        return None


class ClipStage(SceneStage):
    """CLIP on (image, caption, hard negative captions): retrieval hides what is not bound, the 2-way test
    shows it."""

    name = "clip"
    held_out_size = 256

    def __init__(self, preset: Preset, **options) -> None:
        recipe = preset.clip
        self.resolutions = (recipe.model["visual_image_size"],)
        super().__init__(preset, recipe, **options)
        self.config = {"model": recipe.model}
        self.model = build_clip(recipe.model)

    def stream_options(self) -> dict:
        return {"negatives": self.recipe.data.get("negatives", True)}

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        images = batch["images"][self.resolutions[0]]
        return self.model(
            batch["tokens"],
            images,
            negative_text=batch.get("negatives"),
            negative_mask=batch.get("negative_mask"),
        )

    def metrics(self) -> dict[str, float]:
        """top1: the right caption among all held-out ones; two_way: the right caption beats its hard
        negatives."""
        batch = self.held_out
        image = self.model.encode_image(batch["images"][self.resolutions[0]])
        text = self.model.encode_text(batch["tokens"])[0]
        similarity = image @ text.T
        truth = torch.arange(len(image), device=image.device)
        scores = {"top1": (similarity.argmax(1) == truth).float().mean().item()}
        if batch.get("negatives") is not None:
            rows, count, length = batch["negatives"].shape
            wrong = self.model.encode_text(batch["negatives"].reshape(-1, length))[0].reshape(rows, count, -1)
            wins = (image * text).sum(-1, keepdim=True) > (image[:, None] * wrong).sum(-1)
            scores["two_way"] = wins[batch["negative_mask"]].float().mean().item()
        return scores


class PriorStage(SceneStage):
    """The diffusion prior on embeddings of the frozen CLIP, standardised per dimension."""

    name = "prior"

    def __init__(self, preset: Preset, *, out: Path, **options) -> None:
        recipe = preset.prior
        self.clip = load_stage(out, "clip", options["device"])
        self.resolutions = (self.clip.config["visual_image_size"],)
        super().__init__(preset, recipe, **options)
        model = recipe.model | {"image_embed_dim": self.clip.config["dim_latent"]}
        self.config = {"model": model}
        self.model = build_prior(model).to(self.device)
        embeddings = [
            self.clip.encode_image(self.stream.batch(index)["images"][self.resolutions[0]]).float()
            for index in range(recipe.data.get("statistics_batches", 8))
        ]
        self.model.set_statistics(torch.cat(embeddings))

    @torch.no_grad()
    def encode(self, batch: dict) -> dict[str, Tensor]:
        text, encodings, mask = self.clip.encode_text(batch["tokens"])
        image = self.clip.encode_image(batch["images"][self.resolutions[0]])
        return {"text_embed": text, "text_encodings": encodings, "text_mask": mask, "image_embed": image}

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(**self.encode(batch), generator=generator)

    def metrics(self) -> dict[str, float]:
        """Cosine of sampled with true image embeddings, and of the captions' text embeddings with them for
        comparison."""
        encoded = self.encode(self.held_out)
        image = encoded.pop("image_embed").float()
        seeds = torch.arange(len(image), device=self.device)
        sampled = self.model.sample(**encoded, seeds=seeds, steps=8, num_samples_per_batch=1, progress=False)
        return {
            "cosine": F.cosine_similarity(sampled.float(), image).mean().item(),
            "cosine_of_text": F.cosine_similarity(encoded["text_embed"].float(), image).mean().item(),
        }


class DecoderStage(SceneStage):
    """The decoder on (image, caption, CLIP image embedding)."""

    name = "decoder"
    held_out_size = 8

    def __init__(self, preset: Preset, *, out: Path, **options) -> None:
        recipe = preset.decoder
        self.clip = load_stage(out, "clip", options["device"])
        self.size, self.clip_size = recipe.model["image_size"], self.clip.config["visual_image_size"]
        self.resolutions = tuple(dict.fromkeys((self.size, self.clip_size)))
        super().__init__(preset, recipe, **options)
        model = recipe.model | {"image_embed_dim": self.clip.config["dim_latent"]}
        self.config = {"model": model}
        self.model = build_decoder(model)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        image = batch["images"][self.size]
        with torch.no_grad():
            embedding = self.clip.encode_image(batch["images"][self.clip_size])
        weight = self.recipe.data.get("foreground_weight", 1.0)
        return self.model(
            image,
            text=batch["tokens"],
            image_embed=embedding,
            generator=generator,
            pixel_weight=foreground_weight(batch, self.size, weight) if weight != 1.0 else None,
        )

    def pictures(self) -> tuple[Tensor, int]:
        """Upper row: held-out scenes; lower row: drawn from their captions and image embeddings."""
        image = self.held_out["images"][self.size]
        embedding = self.clip.encode_image(self.held_out["images"][self.clip_size])
        drawn = self.model.sample(
            embedding,
            text=self.held_out["tokens"],
            seeds=torch.arange(len(image), device=self.device),
            steps=20,
            cond_scale=2.0,
            progress=False,
        )
        return torch.cat([image, drawn.to(image.dtype)]), len(image)


class UpsamplerStage(SceneStage):
    """The upsampler on crops: it is fully convolutional, and one rendered scene yields several."""

    name = "upsampler"
    held_out_size = 4

    def __init__(self, preset: Preset, **options) -> None:
        recipe = preset.upsampler
        self.low, self.high = recipe.model["low_res_size"], recipe.model["image_size"]
        self.crop, self.crops = recipe.data.get("crop", self.high), recipe.data.get("crops_per_image", 1)
        batch_size = recipe.optimisation.batch_size
        if self.crop * self.low % self.high or batch_size % self.crops:
            raise TrainingError(
                f"upsampler: expected a crop that is a multiple of {self.high // self.low} and a batch size "
                f"that is a multiple of crops_per_image = {self.crops}, got {self.crop} and {batch_size}"
            )
        self.resolutions = (self.low, self.high)
        super().__init__(preset, recipe, batch_size=batch_size // self.crops, **options)
        self.config = {"model": recipe.model}
        self.model = build_upsampler(recipe.model)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        low, high = batch["images"][self.low], batch["images"][self.high]
        if self.crop < self.high:
            low, high = random_crops(low, high, self.crop, self.crops, generator)
        return self.model(high, low, generator=generator)

    def _sample(self) -> Tensor:
        low = self.held_out["images"][self.low]
        return self.model.sample(
            low, seeds=torch.arange(len(low), device=self.device), steps=5, progress=False
        )

    def metrics(self) -> dict[str, float]:
        """PSNR in dB against the render, and that of bicubic interpolation."""
        low, high = self.held_out["images"][self.low], self.held_out["images"][self.high]
        self._drawn = self._sample().to(high.dtype)
        self._bicubic = F.interpolate(low, size=high.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        return {"psnr": psnr(self._drawn, high), "psnr_bicubic": psnr(self._bicubic, high)}

    def pictures(self) -> tuple[Tensor, int]:
        """Rows: bicubic, drawn, render."""
        return torch.cat([self._bicubic, self._drawn, self.held_out["images"][self.high]]), len(self._drawn)


def foreground_weight(batch: dict, size: int, weight: float) -> Tensor:
    """[B, 1, size, size]: `weight` on objects and one pixel around them, 1 on the background.

    Objects are found as the difference between the scene and the same scene rendered without its objects.
    """
    if batch.get("scenes") is None:
        raise TrainingError(
            "foreground_weight needs rendered scenes: set it to 1 to train on one's own shards"
        )
    scenes = batch["scenes"]
    empty = render(scenes | {"nobj": torch.zeros_like(scenes["nobj"])}, size)
    objects = ((batch["images"][size] - empty).abs().amax(1, keepdim=True) > 0.06).to(empty.dtype)
    return 1.0 + (weight - 1.0) * F.max_pool2d(objects, 3, stride=1, padding=1)


def random_crops(
    low: Tensor, high: Tensor, crop: int, crops: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`crops` aligned crops of every pair: high [B, 3, H, W] -> [B * crops, 3, crop, crop], low alike at its
    own scale."""
    scale = high.shape[-1] // low.shape[-1]
    side, room = crop // scale, low.shape[-1] - crop // scale
    corners = torch.randint(0, room + 1, (len(low) * crops, 2), generator=generator, device=low.device)

    def cut(images: Tensor, size: int, factor: int) -> Tensor:
        inside = torch.arange(size, device=images.device)
        rows = (corners[:, 0] * factor)[:, None] + inside
        columns = (corners[:, 1] * factor)[:, None] + inside
        owner = torch.arange(len(images), device=images.device).repeat_interleave(crops)
        return images.permute(0, 2, 3, 1)[
            owner[:, None, None], rows[:, :, None], columns[:, None, :]
        ].permute(0, 3, 1, 2)

    return cut(low, side, 1).contiguous(), cut(high, crop, scale).contiguous()


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE), for values in [0, 1]."""
    error = (images.float() - truth.float()).square().mean((1, 2, 3)).clamp_min(1e-12)
    return (-10.0 / math.log(10.0) * error.log()).mean().item()


def make_stage(
    name: str, preset: Preset, *, out: Path, seed: int, device: torch.device, shards: str | None = None
):
    """The stage `name` of `preset`; its initial weights depend on (seed, name) only."""
    options = dict(seed=seed, device=device, shards=shards)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 16 + STREAM_OFFSETS[name])
        if name == "clip":
            return ClipStage(preset, **options)
        if name == "prior":
            return PriorStage(preset, out=out, **options)
        if name == "decoder":
            return DecoderStage(preset, out=out, **options)
        return UpsamplerStage(preset, **options)
