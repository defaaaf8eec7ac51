"""The options of `dalle2-fast train`; some of them are also those of `dalle2-fast distill`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle2_fast.cli.arguments import DEVICE_HELP
from dalle2_fast.training.parallel.execution import PARALLEL
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import EXTRA_STAGES, PRIORS, STAGES
from dalle2_fast.training.run_folder.reports import REPORTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast train`."""
    add = parser.add_argument
    add(
        "stage",
        choices=(*STAGES, *EXTRA_STAGES, "all"),
        help="what to train; all: the first four in order, then the pipeline",
    )
    add(
        "--preset",
        metavar="NAME|FILE",
        help=f"one of {', '.join(PRESETS)}, or a .yaml file as --print-config writes it (default: that of "
        "the run in DIR)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value of the preset, as decoder.optimisation.ema_decay=0.99; may be repeated",
    )
    add("--prior", choices=PRIORS, help="which prior (default: the one in DIR, or else diffusion)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the run: one sub-folder per stage")
    add(
        "--resume",
        action="store_true",
        help="continue the run in DIR with its settings; finished stages are skipped",
    )
    add(
        "--override",
        action="store_true",
        help="let options that differ from the run's settings take their place; with a greater length, also "
        "train finished stages further",
    )
    add(
        "--init",
        type=Path,
        metavar="PATH",
        help="start from a STAGE/model.safetensors file, or from the folder of a pipeline, whose CLIP the "
        "run then takes",
    )
    add(
        "--freeze",
        nargs="+",
        metavar="PREFIX",
        help="do not train weights whose names begin with PREFIX; visual: tune CLIP's text tower alone",
    )
    add("--minutes", type=float, help="wall-clock budget of all stages, divided as in the preset")
    add("--steps", type=int, help="length of each stage in steps instead (repeatable bit for bit on the CPU)")
    add_run_options(parser)
    add(
        "--graphs",
        action="store_true",
        help="replay the training step as a CUDA graph, on a GPU; the learning rate is then rounded to "
        "float32, so that a resumed run repeats bit for bit only with the same choice",
    )
    add(
        "--data",
        metavar="DATA",
        help="images with captions instead of the scenes: tar shards, a folder, a list, a saved dataset, see "
        "docs/data.md (default: the run's)",
    )
    add(
        "--val-data",
        metavar="DATA",
        help="data for the metrics (default: one sample in 25 of --data, which is then not trained on)",
    )
    add(
        "--tokenizer",
        choices=("words", "clip"),
        help="for --data: the commonest words of the captions (default), or CLIP's byte pairs, for any text",
    )
    add(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="of prior and decoder: embeddings of the images of --data, computed by dalle2-fast embed with "
        "the CLIP of the run (default: those of the run)",
    )
    add_data_options(parser)
    add_execution_options(parser)
    add_planning_options(parser)
    add("--export", action="store_true", help="train nothing: only assemble the finished stages in DIR")
    add(
        "--export-dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of the weights of the pipeline (default bfloat16)",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare how --data are read."""
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that read and decode --data in advance; they change no batch (default 2)",
    )
    add("--allow-pipe", action="store_true", help="run the commands of --data that begin with pipe:")


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Declare how a step is carried out, on one or, started by `torchrun`, on many processes."""
    add = parser.add_argument
    add(
        "--parallel",
        choices=PARALLEL,
        default="ddp",
        help="of many processes (torchrun): ddp (default), each has the whole model; fsdp, each a part of it",
    )
    add(
        "--shard-size",
        type=int,
        metavar="N",
        help="of fsdp: divide each copy of the model over N processes (default: all of them)",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="compute the batch of a process in K parts, with the activations of one at a time; for clip the "
        "same as --clip-chunk",
    )
    add(
        "--clip-chunk",
        type=int,
        metavar="N",
        help="of clip: compute the batch of a process in two passes over chunks of N pairs, with the "
        "activations of one at a time (GradCache)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute the activations of each block again in the backward pass instead of keeping them",
    )
    add("--compile", action="store_true", help="compile each block with torch.compile")
    add("--save-steps", type=int, metavar="N", help="also save the state every N steps")
    add(
        "--keep", type=int, default=2, metavar="K",
        help="how many states of many processes to keep (default 2)",
    )  # fmt: skip
    add(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="how long a process waits for the others before it gives up (default 1800)",
    )


def add_planning_options(parser: argparse.ArgumentParser) -> None:
    """Declare where the log goes, and what is done in place of training."""
    add = parser.add_argument
    add(
        "--report-to",
        nargs="+",
        metavar="NAME",
        help=f"where the log also goes: some of {', '.join(REPORTS)}, or none (default: tensorboard where it "
        "is installed)",
    )
    add(
        "--sample-prompts",
        type=Path,
        metavar="FILE",
        help="captions, one per line, of which the decoder draws images at every validation",
    )
    add("--print-config", action="store_true", help="train nothing: print the preset as YAML")
    add(
        "--dry-run",
        action="store_true",
        help="train nothing: take four steps of each stage in a temporary folder, and print parameters, "
        "memory, and steps per hour",
    )
    add(
        "--find-lr",
        action="store_true",
        help="train nothing: let the learning rate of one stage rise from 1e-6 to 1 in 100 steps, and print "
        "the losses and where they fall fastest",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of every command that trains."""
    add = parser.add_argument
    add(
        "--pause-after",
        type=float,
        metavar="MINUTES",
        help="save and stop after this time; --resume then continues on the same schedule",
    )
    add("--batch-size", type=int, help="samples per step (default: the recipe's)")
    add("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add("--seed", type=int, help="of weights, scenes and noise (default: the run's, or else 0)")
    add("--device", default="auto", help=DEVICE_HELP)
    add(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="bf16, fp16: autocast, fp32 weights (fp16: a scaled loss); auto (default): the run's, or else "
        "bf16 where that is fast",
    )
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--quiet", action="store_true", help="no progress bar, no warnings about samples that are skipped")
