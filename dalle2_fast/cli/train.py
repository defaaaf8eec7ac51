"""`dalle2-fast train clip|prior|decoder|upsampler|upsampler2|all --preset NAME --out DIR`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dalle2_fast.cli.train_options import add_arguments as add_arguments
from dalle2_fast.pipeline.device import choose_device, choose_dtype
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.planning.config_file import FILE as CONFIGURATION
from dalle2_fast.training.planning.config_file import change, dump_preset, is_file, load_preset
from dalle2_fast.training.presets import PRESETS
from dalle2_fast.training.recipes import PRIORS, STAGES, Preset, adjust, choose_prior
from dalle2_fast.training.run_folder.reports import choose_reports

if TYPE_CHECKING:
    import torch

    from dalle2_fast.training.parallel.processes import Processes


def run(args: argparse.Namespace) -> int:
    """Train as asked.

    Returns:
        The exit code. 0: finished or paused; 128 + n: stopped by signal n with the state saved.

    Raises:
        TrainingError, ValueError: what the user can correct.
    """
    with warnings_of_samples(shown=not args.quiet):
        try:
            return _train(args)
        except Exception:
            # The first process shows the error of any process, see `Processes.ending_together`.
            is_other = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
            if not is_other or args.traceback:
                raise
            return 2


@contextmanager
def warnings_of_samples(*, shown: bool) -> Iterator[None]:
    """Print each warning about a skipped sample as one line, without a place in the code, or not at all."""
    from dalle2_fast.data.shards import SkippedSample

    with warnings.catch_warnings():
        warnings.simplefilter("always" if shown else "ignore", SkippedSample)
        show_others = warnings.showwarning

        def show(message, category, *place, **options):
            if issubclass(category, SkippedSample):
                print(f"dalle2-fast: {message}", file=sys.stderr)
            else:
                show_others(message, category, *place, **options)

        warnings.showwarning = show
        yield


def _train(args: argparse.Namespace) -> int:
    from dalle2_fast.training.parallel.identity import facts_of
    from dalle2_fast.training.parallel.processes import is_restarted, joined, silent_unless

    device = choose_run_device(args)
    if args.stage == "all" and (args.init or args.freeze):
        raise ValueError("--init, --freeze: expected one stage, got all")
    if args.embeddings is not None and args.stage not in ("prior", "decoder"):
        raise ValueError(f"--embeddings: is for prior and decoder, got {args.stage}")
    if not args.timeout > 0:
        raise ValueError(f"--timeout: expected a number of seconds above 0, got {args.timeout}")
    with joined(device, timeout=args.timeout) as processes, silent_unless(processes.is_first):
        processes.agree(facts_of(vars(args), device))
        args.resume = args.resume or is_restarted(processes, args.out)
        return _train_together(args, device, processes)


def _train_together(args: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    """Train on this process, which has met the others."""
    import torch

    from dalle2_fast.training.run import export_pipeline, train_stages

    stages = STAGES if args.stage == "all" else (args.stage,)
    with processes.together():
        preset = _preset(args, stages)
        execution = Execution(
            parallel=args.parallel,
            shard_size=args.shard_size,
            accumulate=args.accumulate,
            clip_chunk=args.clip_chunk,
            checkpoint_activations=args.checkpoint_activations,
            compile=args.compile,
            keep=args.keep,
            workers=args.workers,
            allow_pipe=args.allow_pipe,
            embeddings=args.embeddings,
            sample_prompts=args.sample_prompts,
        )
        reports = choose_reports(args.report_to)
        if args.print_config:
            print(dump_preset(preset), end="")
            return 0
    options = dict(
        seed=args.seed,
        device=device,
        dtype=None if args.dtype == "auto" else choose_dtype(args.dtype, device),
        shards=args.data,
        val_shards=args.val_data,
        tokenizer=args.tokenizer,
        freeze=args.freeze,
        processes=processes,
        execution=execution,
    )
    if args.dry_run or args.find_lr:
        return _rehearse(args, stages, preset, options)
    if not args.export:
        name, outcome = train_stages(
            stages,
            preset,
            args.out,
            pause_after=args.pause_after,
            resume=args.resume,
            override=args.override,
            init=args.init,
            show_progress=not args.quiet,
            graphs=args.graphs,
            reports=reports,
            configuration=dump_preset(preset) if _is_changed(args) else None,
            **options,
        )
        if outcome != "finished":
            return exit_code(name, outcome)
    if args.stage == "all" or args.export:
        with processes.together():
            if processes.is_first:
                path = export_pipeline(preset, args.out, dtype=getattr(torch, args.export_dtype))
                print(f"pipeline: {path}")
    return 0


def _rehearse(args: argparse.Namespace, stages: tuple[str, ...], preset: Preset, options: dict) -> int:
    """`--dry-run` and `--find-lr`."""
    from dalle2_fast.training.planning.rehearsal import find_learning_rate, rehearse

    if not args.find_lr:
        for needs in rehearse(stages, preset, args.out, **options):
            print(needs, flush=True)
        return 0
    if len(stages) > 1:
        raise ValueError("--find-lr: expected one stage, got all")
    found = find_learning_rate(stages[0], preset, args.out, **options)
    for rate, loss in list(zip(found.rates, found.losses, strict=True))[:: max(1, len(found.rates) // 25)]:
        print(f"{rate:<10.2e}{loss:.5g}")
    if found.suggested is None:
        print("the loss did not fall at any learning rate")
    else:
        print(f"falls fastest at {found.suggested:.2g}; the recipe has "
              f"{preset.recipe(stages[0]).optimisation.learning_rate:.2g}")
    return 0


def _is_changed(args: argparse.Namespace) -> bool:
    """Whether the preset is none of PRESETS, so that the run has to keep it."""
    kept = args.resume and (args.out / CONFIGURATION).exists()
    return bool(args.set) or kept or (args.preset is not None and is_file(args.preset))


def choose_run_device(args: argparse.Namespace) -> torch.device:
    """The device of a command that trains, whose threads are set. ValueError for a wrong option."""
    import torch

    from dalle2_fast.training.parallel.processes import world_size

    if world_size() > 1 and args.command != "train":
        raise ValueError(f"{args.command} is one process on one device: start it without torchrun")
    device = choose_device(args.device, ("cpu", "cuda"))
    if device.type == "cuda" and world_size() > 1:  # torchrun gives each process of a host its number
        device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}", ("cuda",))
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.pause_after is not None and not args.pause_after >= 0:
        raise ValueError(f"--pause-after: expected at least 0, got {args.pause_after}")
    return device


def exit_code(name: str, outcome: str) -> int:
    """Say why the training of a stage stopped before its end; the exit code."""
    print(f"{name}: {outcome}; the state is saved, continue with --resume")
    return 0 if outcome == "paused" else 128 + signal.Signals[outcome.split()[-1]]


def _preset(args: argparse.Namespace, stages: tuple[str, ...]) -> Preset:
    """The recipes with the options of the command line, and those that a resumed run has recorded."""
    from dalle2_fast.training.run import saved_prior_kind
    from dalle2_fast.training.run_folder.record import RunRecord, with_recorded

    record = RunRecord.read(args.out, resume=args.resume)
    name = args.preset or (record.run["preset"] if record is not None else None)
    if args.preset is None and args.resume and (args.out / CONFIGURATION).exists():
        name = str(args.out / CONFIGURATION)
    if name is None:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got none")
    prior = args.prior or (saved_prior_kind(args.out) if args.resume else None) or PRIORS[0]
    options = dict(
        minutes=args.minutes, steps=args.steps, batch_size=args.batch_size, learning_rate=args.lr,
        save_steps=args.save_steps,
    )  # fmt: skip
    preset = adjust(choose_prior(load_preset(name), prior), stages, **options)
    given = {option for option, value in options.items() if value is not None}
    preset = with_recorded(preset, record, given) if args.resume else preset
    return change(preset, args.set)
