"""What the stages share: batches for training, a fixed held-out batch, and the finished CLIP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.stages.finished import load_finished
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source

HELD_OUT_STREAM = 5  # for all stages, so that their metrics are on the same scenes


class SceneStage:
    """A stage (see protocol.py) that is trained on a stream of batches and validated on one fixed batch.

    A subclass sets the class attributes and defines `build_model`, `resolutions`, `loss` and `validate`.

    Args:
        preset: has the recipe of this stage.
        source: of the batches. With shards the held-out batch has the same pairs in another order.
        out: folder of the run, which has the finished stages.
    """

    name: str
    model_classes: tuple[type[nn.Module], ...]  # of finished models; the first one where the file names none
    stream_number: int  # of the training batches; different for each stage, and not HELD_OUT_STREAM
    held_out_size = 64
    negatives = 0  # hard-negative captions for each image

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        self.recipe = preset.recipe(self.name)
        self.device, self.tokenizer = source.device, source.tokenizer
        self.model = self.build_model().to(self.device)
        self.config = {"model": self.model.config}
        self.stream = source.stream(
            self.stream_number, self.scenes_per_batch(), self.resolutions, self.negatives, split="train"
        )
        held_out = source.stream(
            HELD_OUT_STREAM, self.held_out_size, self.resolutions, self.negatives, split="iid"
        )
        self.held_out = held_out.batch(0)

    def build_model(self) -> nn.Module:
        """The model of the recipe with its initial weights."""
        raise NotImplementedError

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Of the images of a batch."""
        raise NotImplementedError

    def fit(self) -> None:
        """Compute from data what is not learned; called after the initial weights are set."""

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size

    def batch(self, step: int) -> dict:
        return self.stream.batch(step)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def validate(self) -> Validation:
        raise NotImplementedError

    def fixed_seeds(self, count: int) -> Tensor:
        """int64 [count]: the same noise for every validation, so that they can be compared."""
        return torch.arange(count, device=self.device)


class ClipGuidedStage(SceneStage):
    """A stage that learns from the embeddings of the finished, frozen CLIP."""

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        self.clip = load_finished(out, "clip", (CLIP,), source.device)
        expected, got = source.tokenizer.vocab_size, self.clip.config["num_text_tokens"]
        if got != expected:
            raise TrainingError(
                f"{out}/clip was trained on other captions: expected a vocabulary of {expected}, got {got}; "
                "give every stage the same --data"
            )
        super().__init__(preset, source, out=out)

    @torch.no_grad()
    def image_embed(self, batch: dict) -> Tensor:  # [B, D]
        return self.clip.encode_image(batch["images"][self.clip.image_size])
