"""A run of training in one folder: its stages one by one, its tokenizer, and the pipeline made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dalle2_fast.data import BPETokenizer, Tokenizer, WordTokenizer, World, tokenizer_from_config
from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.pipeline.device import choose_dtype
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, reason, write_file
from dalle2_fast.training.recipes import EXTRA_STAGES, STAGES, Preset
from dalle2_fast.training.stages.registry import load_stage, make_stage
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import load_weights, save_weights

TOKENIZER = "tokenizer.json"  # in the folder of a run on shards


def train_stage(
    name: str,
    preset: Preset,
    out: Path,
    *,
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shards: str | None = None,
    tokenizer: str | None = None,
    pause_after: float | None = None,
    init: Path | None = None,
    freeze: Sequence[str] = (),
    show_progress: bool = True,
) -> str:
    """Train one stage in out/name and, when it is finished, store its averaged weights there.

    Args:
        name: one of STAGES or EXTRA_STAGES.
        preset: the recipes.
        out: folder of the run.
        resume: continue from the state in out/name; a finished stage is skipped.
        seed: of weights, scenes and noise.
        device: where it is trained.
        dtype: torch.bfloat16 for autocast, with float32 weights. None: that, where the device computes in it.
        shards: WebDataset shards to train on instead of scenes.
        tokenizer: "words" or "clip", for shards. None: what the run has, else words.
        pause_after: minutes after which the state is saved and training stops.
        init: weights of an earlier run of this stage to start from.
        freeze: parameters whose names begin with one of these are not trained.
        show_progress: draw a progress bar.

    Returns:
        "finished", "paused" or "interrupted by SIGINT" (or SIGTERM).

    Raises:
        TrainingError, ValueError: what the user can correct.
    """
    device, folder = torch.device(device), StageFolder(Path(out) / name)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    if folder.has_state() and not resume:
        raise TrainingError(f"--out: {folder.path} already holds a training state: add --resume to continue")
    if resume and folder.weights_path.exists():
        print(f"{name}: already finished, skipped ({folder.weights_path})")
        return "finished"
    reads = run_tokenizer(preset, Path(out), shards, tokenizer)
    stage = make_stage(
        name, preset, out=Path(out), seed=seed, device=device, shards=shards, tokenizer=reads
    )
    if init is not None:
        load_initial(stage.model, init)
    stage.fit()
    freeze_weights(stage.model, freeze)
    folder.prepare()
    if shards is not None:
        write_file(Path(out) / TOKENIZER, json.dumps(reads.to_config()).encode())
    trainer = Trainer(
        stage, preset.recipe(name).optimisation, folder, seed=seed, device=device, dtype=dtype,
        show_progress=show_progress,
    )  # fmt: skip
    if folder.has_state():
        trainer.resume()
    outcome = trainer.train(pause_after)
    if shards is not None and show_progress and (skipped := stage.stream.summary()):
        print(f"{name}: {skipped}", file=sys.stderr)
    if outcome == "finished":
        facts = {
            "preset": preset.name,
            "freeze": list(freeze),
            "steps": trainer.state.step,
            "minutes": round(trainer.state.elapsed / 60, 2),
        }
        save_weights(folder.weights_path, stage.config | facts, trainer.state.ema.average)
    return outcome


def saved_prior_kind(out: Path) -> str | None:
    """Which prior, one of PRIORS, the unfinished state in `out` belongs to; None if there is no state."""
    folder = StageFolder(Path(out) / "prior")
    if folder.weights_path.exists() or not folder.has_state():
        return None
    kind = folder.load_state(torch.device("cpu"))[0].get("config", {}).get("class")
    return "autoregressive" if kind == "ARPrior" else "diffusion"


def load_initial(model: nn.Module, path: Path) -> None:
    """Copy the weights of an earlier run of the same stage into `model`.

    A fine level that the earlier U-Net did not have keeps its initial weights, and a line says so.

    Raises:
        TrainingError: no such file, or weights that do not fit.
    """
    if not path.exists():
        raise TrainingError(f"--init: {path} not found")
    weights = load_weights(path)[1]
    fine = {name: value for name, value in model.state_dict().items() if name.startswith("unet.fine.")}
    if fine and not fine.keys() & weights.keys():
        print(f"--init: {path} has no unet.fine, which starts from initial weights")
        weights |= fine
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch names the keys that are missing, left over or of another shape
        raise TrainingError(f"--init: {path} does not fit this stage and preset: {error}") from error


def freeze_weights(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Exclude from training every parameter whose name begins with one of `prefixes`.

    Raises:
        ValueError: a prefix with which no parameter begins.
    """
    for prefix in prefixes:
        chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not chosen:
            known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(f"--freeze: no weight begins with {prefix!r}; they are {', '.join(known)}")
        for parameter in chosen:
            parameter.requires_grad_(False)


def run_tokenizer(preset: Preset, out: Path, shards: str | None, kind: str | None = None) -> Tokenizer:
    """The tokenizer of all stages of a run: that of the scenes, or that of the shards (out/tokenizer.json).

    Args:
        preset: names the world of the scenes.
        out: folder of the run.
        shards: what it is trained on instead of scenes.
        kind: "words" or "clip", as asked for. None: what the run has, else words.

    Raises:
        ValueError: "clip" without shards, or another kind than the run has.
    """
    if kind == "clip" and shards is None:
        raise ValueError("--tokenizer: clip is for captions from --data, expected --data")
    path = Path(out) / TOKENIZER
    if path.exists():
        tokenizer = tokenizer_from_config(json.loads(path.read_text(encoding="utf-8")))
        has = "clip" if isinstance(tokenizer, BPETokenizer) else "words"
        if kind not in (None, has):
            raise ValueError(f"--tokenizer: the run in {out} has {has}, got {kind}")
        return tokenizer
    if shards is None:
        return WordTokenizer.scenes(World(**preset.world))
    if kind == "clip":
        return BPETokenizer()
    from dalle2_fast.data.shards import WebDatasetStream  # needs the extra "train"

    return WebDatasetStream(shards, 1).tokenizer


def export_pipeline(preset: Preset, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the finished stages of a run as a pipeline: out/config.json, out/model.safetensors.

    Args:
        preset: the recipes, whose `sampling` the pipeline gets.
        out: folder of the run.
        dtype: of the stored weights.

    Returns:
        The folder.

    Raises:
        TrainingError: a stage is not finished, or the folder cannot be written.
    """
    extra = [name for name in EXTRA_STAGES if (Path(out) / name / "model.safetensors").exists()]
    models = {name: load_stage(Path(out), name) for name in (*STAGES, *extra)}
    on_shards = (Path(out) / TOKENIZER).exists()
    world = None if on_shards else World(**preset.world).to_config()
    pipeline = DALLE2(
        **models,
        tokenizer=run_tokenizer(preset, out, None),
        sampling=preset.sampling,
        metadata={"preset": preset.name, "world": world},
    )
    try:
        return pipeline.save_pretrained(out, dtype=dtype)
    except OSError as error:
        raise TrainingError(f"--out: cannot write to {out}: {reason(error)}") from error
