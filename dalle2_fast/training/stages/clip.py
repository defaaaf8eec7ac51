"""Stage `clip`: images and captions, with hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.protocol import Validation


class ClipStage(SceneStage):
    """CLIP on images, captions and hard negatives, without which it would not bind attributes to objects."""

    name = "clip"
    model_classes = (CLIP,)
    stream_number = 1
    held_out_size = 256
    negatives = 2

    def build_model(self) -> CLIP:
        words = dict(num_text_tokens=self.tokenizer.vocab_size, text_seq_len=self.tokenizer.context_length)
        return CLIP(**self.recipe.model, **words)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return (self.model.image_size,)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(
            batch["tokens"],
            batch["images"][self.model.image_size],
            negative_text=batch.get("negatives"),
            negative_mask=batch.get("negative_mask"),
        )

    def validate(self) -> Validation:
        """top1: the nearest held-out caption is the right one. two_way: it is nearer than a hard negative."""
        batch = self.held_out
        image = self.model.encode_image(batch["images"][self.model.image_size])
        text = self.model.encode_text(batch["tokens"])[0]
        truth = torch.arange(len(image), device=image.device)
        metrics = {"top1": ((image @ text.T).argmax(1) == truth).float().mean().item()}
        if batch.get("negatives") is not None:
            rows, count, length = batch["negatives"].shape
            wrong = self.model.encode_text(batch["negatives"].reshape(-1, length))[0].reshape(rows, count, -1)
            wins = (image * text).sum(-1, keepdim=True) > (image[:, None] * wrong).sum(-1)
            metrics["two_way"] = wins[batch["negative_mask"]].float().mean().item()
        return Validation(metrics)
