"""`dalle2-fast train clip|prior|decoder|upsampler|upsampler2|all --preset NAME --out DIR`."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dalle2_fast.pipeline.device import choose_device, choose_dtype
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, write_file
from dalle2_fast.training.presets import PRESETS, get_preset
from dalle2_fast.training.recipes import EXTRA_STAGES, PRIORS, STAGES, Preset, adjust, choose_prior
from dalle2_fast.training.weights import load_weights, save_weights

if TYPE_CHECKING:
    from dalle2_fast.data import Tokenizer

TOKENIZER = "tokenizer.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast train`."""
    add = parser.add_argument
    add("stage", choices=(*STAGES, *EXTRA_STAGES, "all"),
        help="what to train; all: the first four in order, then the pipeline")
    add("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    add("--prior", choices=PRIORS, help="which prior (default: what DIR holds, or else diffusion)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the run: one sub-folder a stage")
    add("--resume", action="store_true", help="continue what DIR holds; finished stages are skipped")
    add("--init", type=Path, metavar="FILE", help="start from these STAGE/model.safetensors weights")
    add("--freeze", nargs="+", default=(), metavar="PREFIX",
        help="hold the weights whose names begin so; e.g. visual: tune CLIP's text tower to its images")
    add("--minutes", type=float, help="wall-clock budget in all, shared between stages as in the preset")
    add("--steps", type=int, help="length of each stage in steps instead (repeatable bit for bit on the CPU)")
    add("--pause-after", type=float, metavar="MINUTES",
        help="save and stop after this long; --resume then continues on the same schedule")
    add("--batch-size", type=int)
    add("--lr", type=float, help="peak learning rate")
    add("--seed", type=int, default=0, help="of weights, scenes and noise (default 0)")
    add("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="bf16: autocast, fp32 weights; auto (default): bf16 on a device that computes in it")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--data", metavar="SHARDS", help="WebDataset shards of image-caption pairs instead of the scenes")
    add("--tokenizer", choices=("words", "clip"),
        help="for --data: the captions' commonest words (default), or CLIP's byte pairs, which read any text")
    add("--export", action="store_true", help="train nothing: only assemble DIR's finished stages")
    add("--export-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train as asked. 0: finished or paused; 128 + n: stopped by signal n with the state saved.

    Raises TrainingError or ValueError for what the user can put right.
    """
    device = choose_device(args.device, ("cpu", "cuda"))
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.pause_after is not None and not args.pause_after >= 0:
        raise ValueError(f"--pause-after: expected at least 0, got {args.pause_after}")
    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.stage == "all" and (args.init or args.freeze):
        raise ValueError("--init, --freeze: expected one stage, got all")
    prior = args.prior or (kept_prior(args.out) if args.resume else None) or PRIORS[0]
    preset = adjust(choose_prior(get_preset(args.preset), prior), stages, minutes=args.minutes,
                    steps=args.steps, batch_size=args.batch_size, learning_rate=args.lr)
    begin = time.monotonic()
    for name in () if args.export else stages:
        left = None if args.pause_after is None else args.pause_after - (time.monotonic() - begin) / 60
        outcome = train_stage(name, preset, args.out, resume=args.resume, seed=args.seed, device=device,
                              dtype=choose_dtype(args.dtype, device), shards=args.data,
                              tokenizer=args.tokenizer, pause_after=left,
                              init=args.init, freeze=args.freeze, show_progress=not args.quiet)
        if outcome != "finished":
            print(f"{name}: {outcome}; the state is saved, continue with --resume")
            return 0 if outcome == "paused" else 128 + signal.Signals[outcome.split()[-1]]
    if args.stage == "all" or args.export:
        path = export_pipeline(preset, args.out, dtype=getattr(torch, args.export_dtype))
        print(f"pipeline: {path}")
    return 0


def kept_prior(out: Path) -> str | None:
    """Which prior the state in `out` is of, one of PRIORS; None where there is no whole one to say it."""
    folder = StageFolder(Path(out) / "prior")
    if folder.weights_path.exists() or not folder.has_state():
        return None
    kind = folder.load_state(torch.device("cpu"))[0].get("config", {}).get("class")
    return "autoregressive" if kind == "ARPrior" else "diffusion"


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
    """Train stage `name` of `preset` in out/name and store its averaged weights there when it is finished.

    Returns "finished", "paused" or "interrupted by SIGINT" (SIGTERM). dtype: torch.bfloat16 for autocast, the
    weights being float32; None: that, where the device computes in it. tokenizer: "words" or "clip" for
    `shards`; None: what the run has, else words. pause_after: in minutes. init: an earlier weights file of
    this stage to start from. freeze: weights whose names begin so stay.
    """
    from dalle2_fast.training.stages.registry import make_stage  # models and data: not needed to print --help
    from dalle2_fast.training.trainer import Trainer

    device, folder = torch.device(device), StageFolder(Path(out) / name)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    if folder.has_state() and not resume:
        raise TrainingError(f"--out: {folder.path} already holds a training state: add --resume to continue")
    if resume and folder.weights_path.exists():
        print(f"{name}: already finished, skipped ({folder.weights_path})")
        return "finished"
    tokenizer = run_tokenizer(preset, Path(out), shards, tokenizer)
    stage = make_stage(name, preset, out=Path(out), seed=seed, device=device, shards=shards,
                       tokenizer=tokenizer)
    if init is not None:
        load_initial(stage.model, init)
    stage.fit()
    freeze_weights(stage.model, freeze)
    folder.prepare()
    if shards is not None:
        write_file(Path(out) / TOKENIZER, json.dumps(tokenizer.to_config()).encode())
    trainer = Trainer(stage, preset.recipe(name).optimisation, folder, seed=seed, device=device,
                      dtype=dtype, show_progress=show_progress)
    if folder.has_state():
        trainer.resume()
    outcome = trainer.train(pause_after)
    if outcome == "finished":
        facts = {"preset": preset.name, "freeze": list(freeze), "steps": trainer.state.step,
                 "minutes": round(trainer.state.elapsed / 60, 2)}
        save_weights(folder.weights_path, stage.config | facts, trainer.state.ema.average)
    return outcome


def load_initial(model: torch.nn.Module, path: Path) -> None:
    """Copy the weights of an earlier run of the same stage into `model`. A fine level that the earlier U-Net
    did not have starts fresh, and is named; anything else that does not fit is an error."""
    if not path.exists():
        raise TrainingError(f"--init: {path} not found")
    weights = load_weights(path)[1]
    fine = {name: value for name, value in model.state_dict().items() if name.startswith("unet.fine.")}
    if fine and not fine.keys() & weights.keys():
        print(f"--init: {path} has no unet.fine, which starts fresh")
        weights |= fine
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch names the keys that are missing, left over or of another shape
        raise TrainingError(f"--init: {path} does not fit this stage and preset: {error}") from error


def freeze_weights(model: torch.nn.Module, prefixes: Sequence[str]) -> None:
    """Exclude from training every parameter whose name begins with one of `prefixes`."""
    for prefix in prefixes:
        chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not chosen:
            known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(f"--freeze: no weight begins with {prefix!r}; they are {', '.join(known)}")
        for parameter in chosen:
            parameter.requires_grad_(False)


def run_tokenizer(preset: Preset, out: Path, shards: str | None, kind: str | None = None) -> Tokenizer:
    """The one tokenizer of a run: the scenes', or that of the shards, kept in out/tokenizer.json.

    kind: "words" or "clip", as asked for; None: what the run has, else words.
    """
    from dalle2_fast.data import BPETokenizer, WordTokenizer, World, tokenizer_from_config

    if kind == "clip" and shards is None:
        raise ValueError("--tokenizer: clip reads own data, expected --data")
    if (Path(out) / TOKENIZER).exists():
        kept = tokenizer_from_config(json.loads((Path(out) / TOKENIZER).read_text(encoding="utf-8")))
        has = "clip" if isinstance(kept, BPETokenizer) else "words"
        if kind not in (None, has):
            raise ValueError(f"--tokenizer: the run in {out} has {has}, got {kind}")
        return kept
    if shards is None:
        return WordTokenizer.scenes(World(**preset.world))
    if kind == "clip":
        return BPETokenizer()
    from dalle2_fast.data.shards import WebDatasetStream  # needs the extra "train"

    return WebDatasetStream(shards, 1).tokenizer


def export_pipeline(preset: Preset, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Assemble the finished stages of `out` into a pipeline: out/config.json, out/model.safetensors."""
    from dalle2_fast.data import World
    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.training.stages.registry import load_stage

    there = [name for name in EXTRA_STAGES if (Path(out) / name / "model.safetensors").exists()]
    models = {name: load_stage(Path(out), name) for name in (*STAGES, *there)}
    own_data = (Path(out) / TOKENIZER).exists()
    world = None if own_data else World(**preset.world).to_config()
    pipeline = DALLE2(**models, tokenizer=run_tokenizer(preset, out, None), sampling=preset.sampling,
                      metadata={"preset": preset.name, "world": world})
    try:
        return pipeline.save_pretrained(out, dtype=dtype)
    except OSError as error:
        raise TrainingError(f"--out: cannot write to {out}: {error.strerror or error}") from error
