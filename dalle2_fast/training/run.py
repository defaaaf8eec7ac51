"""A run of training in one folder: its stages one by one, its tokenizer, and the pipeline made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from dalle2_fast.cuda_graphs import CudaGraphs
from dalle2_fast.data import World
from dalle2_fast.pipeline.compilation.graphs import check_graphs
from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.pipeline.device import choose_dtype
from dalle2_fast.training.distillation.student import teacher_tokenizer
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, delete_leftovers, reason, write_file
from dalle2_fast.training.parallel.execution import PLAIN, Execution
from dalle2_fast.training.parallel.gradient import check_parts
from dalle2_fast.training.parallel.processes import ALONE, Processes, mark_as_begun, silent_unless
from dalle2_fast.training.parallel.strategies import check_strategy
from dalle2_fast.training.planning.config_file import FILE as CONFIGURATION
from dalle2_fast.training.planning.utilisation import watch_utilisation
from dalle2_fast.training.recipes import EXTRA_STAGES, STAGES, Preset
from dalle2_fast.training.run_folder.agreement import agree_on_data, agree_on_run, is_to_be_extended, refuse
from dalle2_fast.training.run_folder.initial import freeze_weights, load_initial, take_finished
from dalle2_fast.training.run_folder.lock import run_lock
from dalle2_fast.training.run_folder.record import FILE as RECORD
from dalle2_fast.training.run_folder.record import RunRecord, differences, stage_settings
from dalle2_fast.training.run_folder.reports import open_reports
from dalle2_fast.training.run_folder.tokenizer import FILE as TOKENIZER
from dalle2_fast.training.run_folder.tokenizer import run_tokenizer
from dalle2_fast.training.stages.registry import STAGE_CLASSES, load_stage, make_stage
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import save_weights


def train_stages(
    names: Sequence[str], preset: Preset, out: Path, *, pause_after: float | None = None, **options
) -> tuple[str, str]:
    """Train stages in order, as the only command in the folder of the run.

    Args:
        names: of the stages.
        preset: the recipes.
        out: folder of the run.
        pause_after: minutes after which the state is saved and training stops.
        options: the others of `train_stage`.

    Returns:
        The name of the last stage that was trained, and its outcome, see `train_stage`.

    Raises:
        TrainingError, ValueError: what the user can correct.
    """
    processes = options.get("processes", ALONE)
    begin, _ = processes.tick([])
    with ExitStack() as stack:
        stack.enter_context(processes.ending_together())
        stack.enter_context(silent_unless(processes.is_first))
        with processes.together():
            if processes.is_first:
                stack.enter_context(run_lock(out))
                delete_leftovers(Path(out))
        for name in names:
            now, _ = processes.tick([])
            left = None if pause_after is None else pause_after - (now - begin) / 60
            outcome = _train(name, preset, Path(out), pause_after=left, planned=names, **options)
            if outcome != "finished":
                break
    return name, outcome


def train_stage(name: str, preset: Preset, out: Path, **options) -> str:
    """Train one stage in out/name and, when it is finished, store its averaged weights there.

    Args:
        name: one of STAGES or EXTRA_STAGES.
        preset: the recipes.
        out: folder of the run.
        options: by keyword:

            - resume: continue from the state in out/name. A finished stage is skipped, or, with `override`
              and a greater length, trained further.
            - seed: of weights, scenes and noise. None: the stage's when it is resumed, else 0.
            - device: where it is trained.
            - dtype: torch.bfloat16 for autocast, with float32 weights. None: the stage's when it is resumed,
              else bfloat16 where the device is fast in it.
            - shards: WebDataset shards to train on. None: those of the run, or scenes in a new run.
            - val_shards: shards for the metrics. None: those of the run, or a part of `shards`, which is then
              not trained on.
            - tokenizer: "words" or "clip", for shards. None: what the run has, else words.
            - pause_after: minutes after which the state is saved and training stops.
            - init: weights of an earlier run of this stage to start from.
            - freeze: parameters whose names begin with one of these are not trained. None: the stage's when
              it is resumed, else none.
            - override: resume although settings differ from those of the run, with the new ones.
            - show_progress: draw a progress bar.
            - graphs: replay the training step as a CUDA graph. A stage that cannot says why, and trains
              without.
            - processes: of the training, see `Processes`; every one of them calls this with the same
              arguments but its device.
            - configuration: the preset in YAML, written into the run as preset.yaml: of one that is not
              among PRESETS, which a resumed run reads there. None for none.
            - reports: where the lines of the log also go, see `choose_reports`.
            - execution: how a step is divided, see `Execution`.

    Returns:
        "finished", "paused" or "interrupted by SIGINT" (or SIGTERM).

    Raises:
        TrainingError, ValueError: what the user can correct.
    """
    return train_stages((name,), preset, out, **options)[1]


def _train(
    name: str,
    preset: Preset,
    out: Path,
    *,
    planned: Sequence[str],
    pause_after: float | None,
    resume: bool = False,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shards: str | None = None,
    val_shards: str | None = None,
    tokenizer: str | None = None,
    init: Path | None = None,
    freeze: Sequence[str] | None = None,
    override: bool = False,
    show_progress: bool = True,
    graphs: bool = False,
    processes: Processes = ALONE,
    execution: Execution = PLAIN,
    configuration: str | None = None,
    reports: Sequence[str] = (),
) -> str:
    """`train_stage` in a locked folder. planned: stages of this command, which are recorded with this one."""
    device, folder = torch.device(device), StageFolder(out / name)
    check_execution(graphs, device, dtype, processes, execution)
    with processes.together():
        if processes.is_first:
            needed = STAGE_CLASSES[name].needs(preset.recipe(name))
            take_finished(init, name, needed, out, on_shards=shards is not None)
    with processes.together():  # nothing in this block waits for another process, or writes
        if folder.has_state() and not resume:
            raise TrainingError(
                f"--out: {folder.path} already holds a training state: add --resume to continue"
            )
        if folder.weights_path.exists() and not resume:  # a resumed run would take them for its own
            raise TrainingError(f"--out: {folder.path} already holds a finished stage: choose another folder")
        record = RunRecord.read(out, resume=resume)
        shards, val_shards = agree_on_run(record, preset, out, shards, val_shards, override)

        # The settings of the stage: as given, else as recorded, else the defaults.
        finished = resume and folder.weights_path.exists()
        begun = folder.has_begun()
        recorded = record.stages.get(name) if record is not None and resume else None
        if dtype is None and recorded:
            dtype = getattr(torch, recorded["dtype"])
        dtype = choose_dtype("auto", device) if dtype is None else dtype
        seed = (recorded["seed"] if recorded else 0) if seed is None else seed
        if init is None and recorded and not begun and recorded["init"] is not None:
            init = Path(recorded["init"])
        freeze = tuple((recorded["freeze"] if recorded else ()) if freeze is None else freeze)
        if execution.embeddings is None and recorded and recorded.get("embeddings"):
            execution = replace(execution, embeddings=Path(recorded["embeddings"]))

        def settings_of(stage: str, **others) -> dict:
            return stage_settings(stage, preset, seed=seed, dtype=dtype, **others)

        settings = settings_of(name, freeze=freeze, init=init, embeddings=execution.embeddings)
        if begun and init is None:
            settings["init"] = recorded["init"] if recorded else None
        if begun and init is not None and not recorded:
            raise TrainingError(
                f"--init: {folder.path} has begun, without a record of its initial weights (older release): "
                "expected no --init"
            )
        found = differences(recorded, settings) if begun and recorded else {}
        refuse(folder.path, found, override)
        if finished and not is_to_be_extended(folder, preset, settings["length"], recorded, override):
            print(f"{name}: already finished, skipped ({folder.weights_path})")
            return "finished"
        if begun and not recorded:
            print(
                f"{name}: its state has no record of settings (older release): those of this command are "
                "taken"
            )

        # A tokenizer without a record may be the user's; with one that is not resumed, it is a killed run's.
        is_left_behind = record is None and (out / RECORD).exists()
        teacher = preset.recipe(name).data.get("teacher")
        if teacher is None:
            reads = run_tokenizer(
                preset, out, shards, tokenizer, use_file=not is_left_behind,
                allow_pipe=execution.allow_pipe,
            )  # fmt: skip
        else:
            reads = teacher_tokenizer(teacher)
        shared = agree_on_data(record, preset, out, shards, val_shards, reads, override)
        stage = make_stage(
            name, preset, out=out, seed=seed, device=device, shards=shards, val_shards=val_shards,
            tokenizer=reads, processes=processes, execution=execution,
        )  # fmt: skip
        if init is not None and not begun:
            load_initial(stage.model, init, name)
        check_parts(stage, processes, execution)
        check_strategy(stage.model, execution, processes)
    stage.fit()
    with processes.together():
        freeze_weights(stage.model, freeze)
        if processes.is_first:
            folder.prepare()
            later = [each for each in planned if each != name and not StageFolder(out / each).has_begun()]
            stages = {each: settings_of(each, freeze=(), init=None) for each in later} | {name: settings}
            RunRecord(shared, (record.stages if record else {}) | stages).write(out)
            if configuration is not None:
                write_file(out / CONFIGURATION, configuration.encode())
            if shards is not None:
                write_file(out / TOKENIZER, json.dumps(reads.to_config()).encode())
    options = preset.recipe(name).optimisation
    if graphs and (reason := stage.why_not_captured()):
        print(f"{name}: without graphs: {reason}")
        graphs = False
    trainer = Trainer(
        stage, options, folder, seed=seed, device=device, dtype=dtype, show_progress=show_progress,
        graphs=CudaGraphs(device) if graphs else None, processes=processes, execution=execution,
    )  # fmt: skip
    if folder.has_state():
        trainer.resume(fresh_optimizers="--freeze" in found)
    watch_utilisation(trainer)
    with ExitStack() as stack:
        if processes.is_first:
            trainer.reports = open_reports(
                reports, folder.path, stage=name, settings=settings, step=trainer.state.step
            )
            for report in trainer.reports:
                stack.callback(report.close)
        mark_as_begun(processes, out)
        outcome = trainer.train(pause_after)
    if shards is not None:
        stage.stream.close()
        if show_progress and processes.is_first and (skipped := stage.stream.summary()):
            print(f"{name}: {skipped}", file=sys.stderr)
    if outcome == "finished":
        facts = {
            "preset": preset.name,
            "freeze": list(freeze),
            "steps": trainer.state.step,
            "minutes": round(trainer.state.elapsed / 60, 2),
            "length": settings["length"],
            "tokenizer": shared["tokenizer"],
        }
        average = trainer.averaged_weights()
        with processes.together():  # the next stage reads the file on every process
            if processes.is_first:
                save_weights(folder.weights_path, stage.config | facts, stage.published(average))
    return outcome


def check_execution(
    graphs: bool, device: torch.device, dtype: torch.dtype | None, processes: Processes, execution: Execution
) -> None:
    """Raise ValueError if CUDA graphs are asked for where a step cannot be captured as one."""
    check_graphs(graphs, device, "--graphs")
    others = {
        f"{processes.world_size} processes": processes.world_size > 1,
        "--accumulate": execution.accumulate > 1,
        "--clip-chunk": execution.clip_chunk is not None,
        "--compile": execution.compile,
        "--dtype fp16, whose scale the host decides": dtype == torch.float16,
    }
    if graphs and any(others.values()):
        got = ", ".join(name for name, given in others.items() if given)
        raise ValueError(f"--graphs: captures the plain step of one process, got {got}")


def saved_prior_kind(out: Path) -> str | None:
    """Which prior, one of PRIORS, the run in `out` has; None if it has no prior, or an older release's."""
    folder = StageFolder(Path(out) / "prior")
    record = RunRecord.read(out, resume=True)
    if record is not None and "prior" in record.stages:
        return record.stages["prior"]["prior"]
    if folder.weights_path.exists() or not folder.has_state():
        return None
    kind = folder.load_state()[0].get("config", {}).get("class")
    return "autoregressive" if kind == "ARPrior" else "diffusion"


def export_pipeline(preset: Preset, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the finished stages of a run as a pipeline: out/config.json, out/model.safetensors.

    Args:
        preset: the recipes, whose `sampling` the pipeline gets.
        out: folder of the run.
        dtype: of the stored weights.

    Returns:
        The folder.

    Raises:
        TrainingError: a stage is not finished, the run has another preset, or the folder cannot be written.
    """
    out = Path(out)
    with run_lock(out):
        record = RunRecord.read(out, resume=True)
        if record is not None and record.run["preset"] != preset.name:
            raise TrainingError(
                f"--preset: expected that of the run in {out}, {record.run['preset']}, got {preset.name}"
            )
        extra = [name for name in EXTRA_STAGES if (out / name / "model.safetensors").exists()]
        models = {name: load_stage(out, name) for name in (*STAGES, *extra)}
        on_shards = (out / TOKENIZER).exists()
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
