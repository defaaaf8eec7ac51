"""`dalle2-fast distill decoder|prior|upsampler --teacher DIR --steps 1|2|4 --out DIR`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dalle2_fast.cli import arguments
from dalle2_fast.cli.train import choose_run_device, exit_code, warnings_of_samples
from dalle2_fast.cli.train_options import add_data_options, add_run_options
from dalle2_fast.pipeline.device import choose_dtype
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.recipes import Preset, adjust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast distill`."""
    add = parser.add_argument
    add("stage", choices=("decoder", "prior", "upsampler"), help="which network of the teacher")
    add("--teacher", required=True, type=Path, metavar="DIR", help="a pipeline, as --checkpoint takes it")
    add(
        "--steps",
        required=True,
        type=int,
        choices=(1, 2, 4),
        help="the largest number of steps of the student, which then also knows the smaller ones",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the run, and of the new pipeline")
    add(
        "--guidance",
        type=arguments.non_negative_float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the guidance weight that becomes an input (default: 1 to the teacher's plus 2)",
    )
    add(
        "--method", choices=("consistency", "dmd2"), default="consistency",
        help="consistency (default): the end of the teacher's path, as ECT; dmd2: distribution matching with "
        "a third network, a fifth of the iterations for the student",
    )  # fmt: skip
    add("--iterations", type=int, help="length of the training in steps of the optimiser (default 10000)")
    add("--resume", action="store_true", help="continue the run in DIR")
    add(
        "--override", action="store_true",
        help="let options that differ from the run's take their place; a greater length trains further",
    )  # fmt: skip
    add_run_options(parser)
    add("--data", metavar="DATA", help="images with captions instead of the scenes, see docs/data.md")
    add("--val-data", metavar="DATA", help="those for the images of the log (default: a part of --data)")
    add_data_options(parser)
    add(
        "--export-dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="dtype of the weights of the pipeline (default bfloat16)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Distil as asked.

    Returns:
        The exit code. 0: finished or paused; 128 + n: stopped by signal n with the state saved.

    Raises:
        TrainingError, ValueError: what the user can correct.
    """
    with warnings_of_samples(shown=not args.quiet):
        return _distill(args)


def _distill(args: argparse.Namespace) -> int:
    import torch

    from dalle2_fast.training.distillation.student import check_folders, export_student
    from dalle2_fast.training.run import train_stage

    device = choose_run_device(args)
    check_folders(args.teacher, args.out)
    outcome = train_stage(
        args.stage, _preset(args), args.out, pause_after=args.pause_after, resume=args.resume,
        override=args.override, seed=args.seed, device=device,
        dtype=None if args.dtype == "auto" else choose_dtype(args.dtype, device), shards=args.data,
        val_shards=args.val_data, show_progress=not args.quiet,
        execution=Execution(workers=args.workers, allow_pipe=args.allow_pipe),
    )  # fmt: skip
    if outcome != "finished":
        return exit_code(args.stage, outcome)
    path = export_student(args.stage, args.teacher, args.out, dtype=getattr(torch, args.export_dtype))
    print(f"pipeline: {path}")
    return 0


def _preset(args: argparse.Namespace) -> Preset:
    """The recipe with the options of the command line, and the optimisation that a resumed run recorded."""
    from dalle2_fast.training.distillation.recipe import distillation_preset
    from dalle2_fast.training.distillation.student import load_teacher
    from dalle2_fast.training.run_folder.record import RunRecord, with_recorded

    guidance = None if args.guidance is None else tuple(args.guidance)
    pipe = load_teacher(args.teacher)
    preset = distillation_preset(pipe, args.stage, args.teacher, args.steps, guidance, args.method)
    data = preset.recipe(args.stage).data
    options = dict(steps=args.iterations, batch_size=args.batch_size, learning_rate=args.lr)
    preset = adjust(preset, (args.stage,), **options)
    record = RunRecord.read(args.out, resume=args.resume)
    on_shards = args.data is not None or (args.resume and record is not None and record.run["data"])
    if not on_shards and pipe.metadata.get("world") is None:
        raise ValueError("--data: expected shards, because the teacher was not trained on rendered scenes")
    if not args.resume:
        return preset
    given = {option for option, value in options.items() if value is not None}
    preset = with_recorded(preset, record, given)
    return replace(preset, **{args.stage: replace(preset.recipe(args.stage), data=data)})
