"""Stage `prior`: from the embeddings of a caption to an image embedding, diffusion or autoregressive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.prior.autoregressive import ARPrior
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.stages.base import ClipGuidedStage
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source


class PriorStage(ClipGuidedStage):
    """The diffusion prior, on image embeddings that are standardised per dimension."""

    name = "prior"
    model_classes = (DiffusionPrior, ARPrior)
    stream_number = 2
    model_class: type[nn.Module] = DiffusionPrior
    sampling = {"steps": 8}  # of validation

    def build_model(self) -> nn.Module:
        options, clip = dict(self.recipe.model), self.clip
        net = options.pop("net") | dict(
            embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=clip.context_length
        )
        return self.model_class(net=net, **options)

    @property
    def resolutions(self) -> tuple[int, ...]:
        return (self.clip.image_size,)

    def fit(self) -> None:
        """Mean and standard deviation of the image embeddings."""
        images = [self.image_embed(batch).float() for batch in self.statistics_batches()]
        self.model.fit_statistics(torch.cat([self.processes.gather(rows) for rows in images]))

    def statistics_batches(self) -> Iterator[dict]:
        return (self.stream.batch(step) for step in range(self.recipe.data.get("statistics_batches", 8)))

    @torch.no_grad()
    def conditioning(self, batch: dict) -> dict[str, Tensor]:
        """CLIP's embeddings of the captions, as arguments of the prior."""
        names = ("text_embed", "text_encodings", "text_mask")
        encoded = self.clip.encode_text(batch["tokens"], normalize=self.model.unit_norm)
        return dict(zip(names, encoded, strict=True))

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(
            **self.conditioning(batch), image_embed=self.image_embed(batch), generator=generator
        )

    def measure(self) -> Validation:
        """Mean cosine similarity to the true image embedding, of one sample and of the text embedding."""
        conditioning, image = self.conditioning(self.held_out), self.image_embed(self.held_out)
        sampled = self.model.sample(
            **conditioning,
            seeds=self.fixed_seeds(len(image)),
            num_samples_per_batch=1,
            progress=False,
            **self.sampling,
        )
        pairs = {"cosine": sampled, "cosine_of_text": conditioning["text_embed"]}
        return Validation(
            {name: F.cosine_similarity(x.float(), image.float()).mean().item() for name, x in pairs.items()}
        )


class ARPriorStage(PriorStage):
    """The autoregressive prior, on quantised principal components of image embeddings."""

    model_class = ARPrior
    sampling = {}

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        super().__init__(preset, source, out=out)
        self.config |= {"class": ARPrior.__name__}

    def fit(self) -> None:
        """Principal components of the image embeddings, and the ranges of their buckets."""
        pairs = [
            (self.image_embed(batch).float(), self.conditioning(batch)["text_embed"].float())
            for batch in self.statistics_batches()
        ]
        gather = self.processes.gather
        self.model.fit(*(torch.cat([gather(rows) for rows in embeds]) for embeds in zip(*pairs, strict=True)))
