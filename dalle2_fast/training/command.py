"""`dalle2-fast train clip|prior|decoder|upsampler|all --preset NAME --out DIR`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from dalle2_fast.training.folder import StageFolder, TrainingError, save_weights
from dalle2_fast.training.presets import PRESETS, STAGES, Preset, adjust, get_preset
from dalle2_fast.training.stages import load_stage, make_stage
from dalle2_fast.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast train`."""
    parser.add_argument(
        "stage", choices=(*STAGES, "all"), help="what to train; all: every stage in order, then the pipeline"
    )
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the run, one sub-folder a stage"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue what DIR holds; finished stages are skipped"
    )
    parser.add_argument(
        "--minutes", type=float, help="wall-clock budget in all, shared between stages as in the preset"
    )
    parser.add_argument(
        "--steps", type=int, help="length of each stage in steps instead (repeatable bit for bit on the CPU)"
    )
    parser.add_argument(
        "--pause-after",
        type=float,
        metavar="MINUTES",
        help="save and stop after this long; a later --resume continues on the same schedule",
    )
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--data", metavar="SHARDS", help="WebDataset shards of image-caption pairs instead of the scenes"
    )
    parser.add_argument(
        "--export", action="store_true", help="only assemble DIR's finished stages into the pipeline folder"
    )
    parser.add_argument("--export-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train as asked. 0: done or paused; 2: an error of the user's; 128 + n: stopped by signal n, state
    saved."""
    try:
        return _run(args)
    except (TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    stages = STAGES if args.stage == "all" else (args.stage,)
    preset = adjust(
        get_preset(args.preset),
        stages,
        minutes=args.minutes,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.lr,
    )
    begin = time.monotonic()
    for name in () if args.export else stages:
        left = None if args.pause_after is None else args.pause_after - (time.monotonic() - begin) / 60
        outcome = train_stage(
            name,
            preset,
            args.out,
            resume=args.resume,
            seed=args.seed,
            device=device,
            shards=args.data,
            pause_after=left,
            show_progress=not args.quiet,
        )
        if outcome != "finished":
            print(f"{name}: {outcome}; the state is saved, continue with --resume")
            return 0 if outcome == "paused" else 128 + signal.Signals[outcome.split()[-1]]
    if args.stage == "all" or args.export:
        path = export_pipeline(preset, args.out, dtype=getattr(torch, args.export_dtype))
        print(f"pipeline: {path}")
    return 0


def choose_device(name: str) -> torch.device:
    """auto -> cuda when there is one, else cpu; an unknown or absent device is a ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device: {name} asked for, but this torch ({torch.__version__}) sees no CUDA device"
        )
    return device


def train_stage(
    name: str,
    preset: Preset,
    out: Path,
    *,
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shards: str | None = None,
    pause_after: float | None = None,
    show_progress: bool = True,
) -> str:
    """Train one stage in out/name. Returns "finished", "paused" or "interrupted by SIGINT" (SIGTERM)."""
    device = torch.device(device)
    folder = StageFolder(Path(out) / name)
    if folder.has_state() and not resume:
        raise TrainingError(
            f"--out: {folder.path} already holds a training state: add --resume, or choose another"
        )
    if resume and folder.weights_path.exists():
        print(f"{name}: already finished, skipped ({folder.weights_path})")
        return "finished"
    folder.prepare()
    stage = make_stage(name, preset, out=Path(out), seed=seed, device=device, shards=shards)
    trainer = Trainer(
        stage, preset.recipe(name).optimisation, folder, seed=seed, device=device, show_progress=show_progress
    )
    if folder.has_state():
        trainer.resume()
    outcome = trainer.train(pause_after)
    if outcome == "finished":
        save_weights(
            folder.weights_path,
            stage.config | {"preset": preset.name, "steps": trainer.step},
            trainer.ema.average,
        )
    return outcome


def export_pipeline(preset: Preset, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Assemble the finished stages of `out` into a pipeline folder (config.json + model.safetensors) at
    `out`."""
    from dalle2_fast.data.scenes import World
    from dalle2_fast.data.tokenizer import WordTokenizer
    from dalle2_fast.models.dalle2 import DALLE2

    models = {name: load_stage(out, name) for name in STAGES}
    pipeline = DALLE2(**models, tokenizer=WordTokenizer.scenes(World(**preset.world)))
    pipeline.save_pretrained(out, dtype=dtype)
    return Path(out)
