"""The stages by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dalle2_fast.data import Tokenizer, WordTokenizer, World
from dalle2_fast.training.distillation.stages import DISTILLED
from dalle2_fast.training.parallel.execution import PLAIN, Execution
from dalle2_fast.training.parallel.processes import ALONE, Processes
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.clip import ClipStage
from dalle2_fast.training.stages.decoder import DecoderStage
from dalle2_fast.training.stages.finished import load_finished
from dalle2_fast.training.stages.prior import ARPriorStage, PriorStage
from dalle2_fast.training.stages.source import Source, seed_of
from dalle2_fast.training.stages.upsampler import SecondUpsamplerStage, UpsamplerStage

# Everything else about a stage (its name, stream number, model classes) is an attribute of its class.
STAGE_CLASSES: dict[str, type[SceneStage]] = {
    each.name: each for each in (ClipStage, PriorStage, DecoderStage, UpsamplerStage, SecondUpsamplerStage)
}


def make_stage(
    name: str,
    preset: Preset,
    *,
    out: Path,
    seed: int,
    device: torch.device,
    shards: str | None = None,
    val_shards: str | None = None,
    tokenizer: Tokenizer | None = None,
    processes: Processes = ALONE,
    execution: Execution = PLAIN,
) -> SceneStage:
    """Stage `name` of `preset`; its initial weights depend on (seed, name) only.

    Args:
        name: a key of STAGE_CLASSES.
        preset: has the recipes, and says which prior.
        out: folder of the run, which has the finished CLIP.
        seed: of weights and scenes.
        device: where batches are made and the model is trained.
        shards: WebDataset shards to train on instead of scenes.
        val_shards: shards for the metrics. None: a part of `shards`, which is then not trained on.
        tokenizer: of the captions. None: that of the scenes.
        processes: of the training.
        execution: says how data are read.

    Raises:
        TrainingError: the stage needs a CLIP that is not finished, or that was trained on other captions.
        ValueError: the preset has no recipe for this stage.
    """
    stage = STAGE_CLASSES[name]
    if "teacher" in preset.recipe(name).data:
        stage = DISTILLED[name]
    elif stage is PriorStage and preset.prior_kind == "autoregressive":
        stage = ARPriorStage
    world = World(**preset.world)
    tokenizer = tokenizer or WordTokenizer.scenes(world)
    source = Source(world, tokenizer, shards, seed, device, val_shards, processes, execution)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, stage.stream_number))
        return stage(preset, source, out=out)


def load_stage(out: Path, name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The finished model of stage `name` of the run in `out`; see `load_finished`."""
    return load_finished(out, name, STAGE_CLASSES[name].model_classes, device)
