"""Stage `clip`: images and captions, with hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.models.clip.model import CLIP, LARGEST_LOGIT_SCALE
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.parallel.contrastive import Features, contrastive_loss
from dalle2_fast.training.parallel.processes import ALONE
from dalle2_fast.training.recipes import Recipe
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.protocol import Validation


class ClipStage(SceneStage):
    """CLIP on images, captions and hard negatives, without which it would not bind attributes to objects."""

    name = "clip"
    model_classes = (CLIP,)
    stream_number = 1
    held_out_size = 256
    negatives = 2

    @classmethod
    def needs(cls, recipe: Recipe) -> tuple[str, ...]:
        return ()

    def build_model(self) -> CLIP:
        if (batch_size := self.scenes_per_batch()) < 2:
            raise TrainingError(
                "--batch-size: clip learns to tell the images of a batch apart: expected at least 2, "
                f"got {batch_size}"
            )
        self._has_warned = False
        words = dict(num_text_tokens=self.tokenizer.vocab_size, text_seq_len=self.tokenizer.context_length)
        return CLIP(**self.recipe.model, **words)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return (self.model.image_size,)

    def batch(self, step: int) -> dict:
        batch = super().batch(step)
        if not self._has_warned and (repeated := count_repeated(batch, self.model.image_size)):
            self._has_warned = True
            print(
                f"clip: in step {step}, {repeated} of {len(batch['tokens'])} pairs repeat another pair of "
                "their batch, which the loss takes for wrong: give more --data or a smaller --batch-size"
            )
        return batch

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        if self.processes.world_size > 1:
            self.limit_scale()
            return self.contrast(self.features(batch), batch, self.model.logit_scale.exp())
        return self.model(
            batch["tokens"],
            batch["images"][self.model.image_size],
            negative_text=batch.get("negatives"),
            negative_mask=batch.get("negative_mask"),
        )

    def held_out_loss(self, generator: torch.Generator) -> Tensor:
        """The loss of the held-out batch, which only one process has."""
        batch = self.held_out
        images, texts, wrong = self.features(batch)
        scale = self.model.logit_scale.exp()
        return contrastive_loss((images, texts, wrong), batch.get("negative_mask"), scale, ALONE)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Clamp the learned scale, as the model's forward pass does."""
        self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)

    def features(self, batch: dict) -> Features:
        """Embeddings of images, captions and hard negatives, on which the loss depends alone."""
        images = self.model.encode_image(batch["images"][self.model.image_size])
        tokens, negatives = batch["tokens"], batch.get("negatives")
        if negatives is None:
            return images, self.model.encode_text(tokens)[0], None
        texts = self.model.encode_text(torch.cat([tokens, negatives.flatten(0, 1)]))[0]
        rows = len(tokens)
        return images, texts[:rows], texts[rows:].unflatten(0, (rows, -1))

    def contrast(self, features: Features, batch: dict, scale: Tensor) -> Tensor:
        """The loss of `features`, which are those of all rows of the batch."""
        return contrastive_loss(features, batch.get("negative_mask"), scale, self.processes)

    def measure(self) -> Validation:
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


def count_repeated(batch: dict, size: int) -> int:
    """How many pairs of a batch of shards equal an earlier one in image and caption.

    Rendered scenes are not counted: they have no captions as text, and practically never repeat.

    Args:
        batch: of a stream.
        size: of the images that are compared, in pixels.
    """
    first: dict[str, list[int]] = {}
    repeated = 0
    for index, caption in enumerate(batch.get("captions", ())):
        earlier = first.setdefault(caption, [])
        if any(torch.equal(batch["images"][size][index], batch["images"][size][other]) for other in earlier):
            repeated += 1
        else:
            earlier.append(index)
    return repeated
