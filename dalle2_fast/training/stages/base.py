"""What the stages share: batches for training, a fixed held-out batch, and the finished CLIP."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dalle2_fast.data import Tokenizer
from dalle2_fast.embeddings.fingerprint import fingerprint
from dalle2_fast.embeddings.folder import EmbeddingFolder
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.parallel.processes import check_division
from dalle2_fast.training.recipes import Preset, Recipe
from dalle2_fast.training.run_folder.record import describe_tokenizer
from dalle2_fast.training.stages.finished import load_finished
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source
from dalle2_fast.training.weights import load_config

HELD_OUT_STREAM = 5  # for all stages, so that their metrics are on the same scenes


class SceneStage:
    """A stage (see protocol.py) that is trained on a stream of batches and validated on one fixed batch.

    A subclass sets the class attributes and defines `build_model`, `resolutions`, `loss` and `measure`.

    Args:
        preset: has the recipe of this stage.
        source: of the batches.
        out: folder of the run, which has the finished stages.
    """

    name: str
    model_classes: tuple[type[nn.Module], ...]  # of finished models; the first one where the file names none
    stream_number: int  # of the training batches; different for each stage, and not HELD_OUT_STREAM
    held_out_size = 64
    negatives = 0  # hard-negative captions for each image
    embeddings: EmbeddingFolder | None = None  # of the images that are trained on

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        self.recipe = preset.recipe(self.name)
        self.device, self.tokenizer, self.processes = source.device, source.tokenizer, source.processes
        self.model = self.build_model().to(self.device)
        self.config = {"model": self.model.config}
        check_division(self.name, self.scenes_per_batch(), source.processes)
        self.stream = source.stream(
            self.stream_number,
            self.scenes_per_batch(),
            self.training_resolutions,
            self.negatives,
            split="train",
            factors=self.recipe.data.get("factors"),
            embeddings=self.embeddings,
        )
        self.held_out = source.held_out(
            HELD_OUT_STREAM, self.held_out_size, self.resolutions, self.negatives
        )

    def build_model(self) -> nn.Module:
        """The model of the recipe with its initial weights."""
        raise NotImplementedError

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Of the images of a batch."""
        raise NotImplementedError

    @property
    def training_resolutions(self) -> tuple[int, ...]:
        """Of the images of a batch that is trained on."""
        return self.resolutions

    def fit(self) -> None:
        """Compute from data what is not learned; called after the initial weights are set."""

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size

    def why_not_captured(self) -> str | None:
        """Why the loss cannot be part of a CUDA graph; None if it can."""
        return None

    def batch(self, step: int) -> dict:
        return self.stream.batch(step)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    @classmethod
    def needs(cls, recipe: Recipe) -> tuple[str, ...]:
        """The stages that a run has before one of this recipe; the tokenizer comes with CLIP."""
        return ("clip",)

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the model's weights that a finished stage keeps: all."""
        return weights

    def validate(self) -> Validation:
        """val_loss, metrics and images on the held-out batch; nothing if there is none."""
        if self.held_out is None:
            return Validation({})
        loss = self.held_out_loss(torch.Generator(self.device).manual_seed(0)).item()
        measured = self.measure()
        return measured._replace(metrics={"val_loss": loss, **measured.metrics})

    def held_out_loss(self, generator: torch.Generator) -> Tensor:
        """The loss of the held-out batch, with the same noise and times in every validation."""
        return self.loss(self.held_out, generator)

    def measure(self) -> Validation:
        """`validate`, where there is a held-out batch."""
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
        self._check_tokenizer(out, source.tokenizer)
        self.embeddings = open_embeddings(source, self.clip, out)
        super().__init__(preset, source, out=out)

    @staticmethod
    def _check_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
        """Compare what CLIP was trained with, which files of older releases do not say."""
        trained = load_config(out / "clip" / "model.safetensors").get("tokenizer")
        if trained is not None and trained != describe_tokenizer(tokenizer):
            raise TrainingError(
                f"{out}/clip was trained on other captions, with another tokenizer; give every stage the "
                "same --data and --tokenizer"
            )

    @property
    def training_resolutions(self) -> tuple[int, ...]:
        """Without the size of CLIP's images where their embeddings are known."""
        return self.resolutions if self.embeddings is None else self.unembedded_resolutions

    @property
    def unembedded_resolutions(self) -> tuple[int, ...]:
        """Of the images that the stage itself is trained on."""
        return ()

    @torch.no_grad()
    def image_embed(self, batch: dict) -> Tensor:  # [B, D]
        if "image_embed" in batch:
            return batch["image_embed"]
        return self.clip.encode_image(
            batch["images"][self.clip.image_size], normalize=self.model.unit_norm
        )


def open_embeddings(source: Source, clip: CLIP, out: Path) -> EmbeddingFolder | None:
    """The precomputed embeddings of a run, or None.

    Args:
        source: says where they are.
        clip: of the run, which must have computed them.
        out: folder of the run.

    Raises:
        ValueError, FileNotFoundError: they are not complete, of another CLIP, or the run is not on shards.
    """
    if source.execution.embeddings is None:
        return None
    if source.shards is None:
        raise ValueError("--embeddings: is for a run on --data, got rendered scenes")
    embeddings = EmbeddingFolder(source.execution.embeddings)
    embeddings.check_clip(fingerprint(clip), clip.dim_latent, out / "clip")
    return embeddings
