"""Stage `decoder`: from an image embedding and a caption to an image."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data import render
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.stages.base import ClipGuidedStage
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source

MOST_PROMPTS = 64


class DecoderStage(ClipGuidedStage):
    """The decoder on images, captions and image embeddings.

    In the recipe, model["text_encoder"] is the configuration of a text tower that is trained from scratch,
    "clip" for one that starts as CLIP's, or None for the encodings of the frozen CLIP, as Karlo has them.
    data["foreground_weight"] is the weight of the error on objects, which have few of the pixels, but all of
    the shapes. Where objects are is known of rendered scenes only; with the user's images the weight is 1,
    and a line says so.
    """

    name = "decoder"
    model_classes = (Decoder,)
    stream_number = 3
    held_out_size = 8

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        super().__init__(preset, source, out=out)
        self.size = self.model.image_size
        self.prompts = read_prompts(source.execution.sample_prompts)
        self.weight = self.recipe.data.get("foreground_weight", 1.0)
        if source.shards is not None and self.weight != 1.0:
            print(
                f"decoder: the preset's foreground_weight {self.weight:g} is for rendered scenes; the "
                "images of --data are weighted evenly"
            )
            self.weight = 1.0

    def build_model(self) -> Decoder:
        options = dict(self.recipe.model)
        tower = options.pop("text_encoder")
        if tower == "clip":
            tower = self.clip.text_tower()
        elif tower is not None:
            words = dict(num_tokens=self.tokenizer.vocab_size, context_length=self.tokenizer.context_length)
            tower = tower | words
        clip = self.clip
        if tower is None:
            options |= dict(text_embed_dim=clip.dim_latent, text_encoding_dim=clip.config["dim_text"])
        return Decoder(**options, text_encoder=tower, image_embed_dim=clip.dim_latent)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.model.image_size, self.clip.image_size)))

    @property
    def unembedded_resolutions(self) -> tuple[int, ...]:
        return (self.model.image_size,)

    def batch(self, step: int) -> dict:
        """The batch of the stream, and pixel_weight where objects have more weight."""
        batch = super().batch(step)
        if self.weight != 1.0:  # here and not in the loss, because rendering makes the host wait
            batch = batch | {"pixel_weight": foreground_weight(batch, self.size, self.weight)}
        return batch

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(
            batch["images"][self.size],
            **self.captions(batch),
            image_embed=self.image_embed(batch),
            generator=generator,
            pixel_weight=batch.get("pixel_weight"),
            check_range=self.device.type == "cpu",
        )

    @torch.no_grad()
    def captions(self, batch: dict) -> dict[str, Tensor]:
        """The captions of a batch, as arguments of the decoder."""
        if self.model.text_encoder is not None:
            return {"text": batch["tokens"]}
        names = ("text_embed", "text_encodings", "text_mask")
        encoded = self.clip.encode_text(batch["tokens"], normalize=self.model.unit_norm)
        return dict(zip(names, encoded, strict=True))

    def measure(self) -> Validation:
        """clip_score: mean cosine of the sampled images and their captions by the run's CLIP, times 100.

        Upper row: held-out images. Lower row: sampled from their captions and embeddings. Then, with
        --sample-prompts, images of the user's captions alone.

        Source: Hessel et al., "CLIPScore", 2104.08718, without its factor 2.5.
        """
        truth = self.held_out["images"][self.size]
        sampled = self.model.sample(
            self.image_embed(self.held_out),
            **self.captions(self.held_out),
            seeds=self.fixed_seeds(len(truth)),
            steps=20,
            cond_scale=2.0,
            progress=False,
        )
        rows, score = [truth, sampled.to(truth.dtype)], self.clip_score(sampled, self.held_out["tokens"])
        if self.prompts is not None:
            wanted = {"tokens": self.tokenizer.encode(self.prompts, unknown="token", truncate=True)}
            wanted["tokens"] = wanted["tokens"].to(self.device)
            made = self.model.sample(
                **self.captions(wanted),
                seeds=self.fixed_seeds(len(self.prompts)),
                steps=20,
                cond_scale=2.0,
                progress=False,
            )
            rows.append(made.to(truth.dtype))
        return Validation({"clip_score": score}, torch.cat(rows), columns=len(truth))

    def clip_score(self, images: Tensor, tokens: Tensor) -> float:
        """100 times the mean cosine of images and captions."""
        size = self.clip.image_size
        images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        image, text = self.clip.encode_image(images), self.clip.encode_text(tokens)[0]
        return 100 * F.cosine_similarity(image.float(), text.float()).mean().item()


def read_prompts(path: Path | None) -> list[str] | None:
    """The captions of a file, one per line; empty lines do not count.

    Raises:
        TrainingError: the file cannot be read, or has no caption or more than 64.
    """
    if path is None:
        return None
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"--sample-prompts: {path} cannot be read: {error}") from error
    prompts = [line for line in lines if line]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise TrainingError(f"--sample-prompts: expected 1 to {MOST_PROMPTS} captions, got {len(prompts)}")
    return prompts


def foreground_weight(batch: dict, size: int, weight: float) -> Tensor:
    """[B, 1, size, size]: `weight` on objects and one pixel around them, 1 on the background.

    Objects are found as the difference between the scene and the same scene rendered without its objects.
    """
    if batch.get("scenes") is None:
        raise TrainingError("foreground_weight: expected 1 where there are no rendered scenes (--data)")
    scenes = batch["scenes"]
    empty = render(scenes | {"nobj": torch.zeros_like(scenes["nobj"])}, size)
    objects = ((batch["images"][size] - empty).abs().amax(1, keepdim=True) > 0.06).to(empty.dtype)
    return 1.0 + (weight - 1.0) * F.max_pool2d(objects, 3, stride=1, padding=1)
