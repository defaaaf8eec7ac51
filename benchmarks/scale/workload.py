"""The training of each stage: what a sample costs, and the sizes of the paper and of our defaults."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from benchmarks.scale.networks import CAPTION, EMBEDDING, LONG_CAPTION, Cost, costs

# Bytes of a sample in shards. LAION-400M as 256 px WebDataset is 10 TB for 400 million pairs (Schuhmann et
# al., 2111.02114); LAION-high-resolution is 50 TB for 170 million pairs (its page at laion.ai).
BYTES_256 = 10e12 / 400e6
BYTES_1024 = 50e12 / 170e6
EMBEDDING_BYTES = 2 * EMBEDDING  # float16
CAPTION_BYTES = 100  # Assumption


class Stage(NamedTuple):
    """The training of one network.

    Args:
        name: what the tables call it.
        trained: cost of the networks that are trained.
        batch: samples in a step.
        steps: of the whole training.
        sample_bytes: read from storage for a sample.
        tokens: positions of a sample that its Transformers, or the finest level of its U-Net, see.
        source: of the sizes.
        frozen_image, frozen_text: FLOPs of the forward passes of CLIP's towers, where they are only used.
    """

    name: str
    trained: Cost
    batch: int
    steps: float
    sample_bytes: float
    tokens: int
    source: str
    frozen_image: float = 0.0
    frozen_text: float = 0.0

    @property
    def flops(self) -> float:
        """Of one sample in training: the backward pass is two forward passes."""
        return 3 * self.trained.flops + self.frozen_image + self.frozen_text

    def embedded(self) -> Stage:
        """With precomputed image embeddings: no image tower runs, and the prior reads no image."""
        reads = EMBEDDING_BYTES + (CAPTION_BYTES if self.name == "prior" else self.sample_bytes)
        return self._replace(name=f"{self.name}, embedded", frozen_image=0.0, sample_bytes=reads)


@cache
def stages() -> dict[str, Stage]:
    """The stages by name.

    Batch sizes and steps: unCLIP, 2204.06125, table 3; CLIP's 12.8 billion pairs (32 epochs of 400 million)
    in batches of 32,768: Radford et al., 2103.00020, section 2.5. The upsamplers train on crops of a quarter
    of the side (unCLIP, table 3).
    """
    cost = costs()
    large = dict(frozen_image=cost["CLIP L/14 image"].flops, frozen_text=cost["CLIP L/14 text"].flops)
    huge = cost["CLIP H/16 image"]
    glide = cost["decoder 3.5 B"].plus(cost["decoder 3.5 B text"])
    small, table = cost["upsampler 64-256"], "2204.06125, table 3"
    found = [
        Stage("CLIP ViT-H/16", huge.plus(cost["CLIP H/16 text"]), 32768, 12.8e9 / 32768, BYTES_256,
              257 + CAPTION, "2204.06125, appendix C"),
        Stage("prior", cost["prior"], 4096, 600e3, BYTES_256, CAPTION + 4, "our default, L/14 frozen",
              **large),
        Stage("decoder 3.5 B", glide, 2048, 800e3, BYTES_256, 64 * 64 + LONG_CAPTION, f"{table}, H/16 frozen",
              huge.flops),
        Stage("decoder 0.9 B", cost["decoder 0.9 B"], 2048, 800e3, BYTES_256, 64 * 64 + CAPTION,
              "our default, L/14 frozen", **large),
        Stage("upsampler 64-256", small, 1024, 1e6, BYTES_256, 64 * 64, table),
        Stage("upsampler 256-1024", cost["upsampler 256-1024"], 512, 1e6, BYTES_1024, 256 * 256, table),
    ]  # fmt: skip
    return {stage.name: stage for stage in found}
