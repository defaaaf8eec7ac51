"""Sampling runs of every stage, and what takes the place of StageGraphs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.sizes import fill_zeros
from dalle2_fast import DALLE2
from dalle2_fast.diffusion.graphs.plan import SamplingPlan
from dalle2_fast.diffusion.graphs.static import StaticSteps
from tests.support.tiny_pipeline import tiny_pipeline

STAGES = ("prior", "decoder", "upsampler")


def pipeline() -> DALLE2:
    """No layer of zeros, which would hide what the layers before it compute."""
    pipe = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fill_zeros(pipe)
    return pipe.eval()


def sample(pipe: DALLE2, stage: str, caption: str = "a red ring", **options) -> Tensor:
    """Two samples of a stage; the upsampler has no guidance."""
    tokens = pipe.tokenizer.encode([caption] * 2)
    embed, encodings, mask = pipe.clip.encode_text(tokens)
    options = dict(seeds=torch.tensor([3, -5]), steps=4) | options
    if stage == "prior":
        return pipe.prior.sample(text_embed=embed, text_encodings=encodings, text_mask=mask, **options)
    if stage == "decoder":
        return pipe.decoder.sample(embed, tokens, **options)
    options = {key: value for key, value in options.items() if "guidance" not in key}
    low_res = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(len(caption)))
    return pipe.upsampler.sample(low_res, **options)


class WithoutCapture:
    """Runs the static steps of each plan, of the same buffers for plans of one key, without a graph."""

    def __init__(self):
        self.static, self.plan = {}, None

    def run(self, plan: SamplingPlan, progress, **_) -> Tensor:
        self.plan = plan
        static = self.static.setdefault(StaticSteps.key(plan), StaticSteps(plan))
        static.begin(plan)
        for position in plan.choice[plan.start :]:
            static.steps[position]()
        return static.x.clone()
