"""A few real steps that leave nothing behind: what a run needs, and which learning rate it bears."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle2_fast.pipeline.device import choose_dtype
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.parallel.execution import PLAIN, Execution
from dalle2_fast.training.parallel.processes import ALONE, Processes
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.run_folder.agreement import agree_on_run
from dalle2_fast.training.run_folder.initial import freeze_weights
from dalle2_fast.training.run_folder.record import RunRecord
from dalle2_fast.training.run_folder.tokenizer import run_tokenizer
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.registry import make_stage
from dalle2_fast.training.trainer import Trainer
from dalle2_fast.training.weights import save_weights

WARM_UP, TIMED = 1, 3  # steps of `rehearse`
DIVERGED = 4.0  # `find_learning_rate` stops where the loss is so many times its smallest value


@dataclass(frozen=True)
class Needs:
    """What a stage needs.

    Args:
        stage: its name.
        parameters: numbers of the model.
        trained: those that are trained.
        state_bytes: of a saved state on this process: weights, average, moments of the optimiser.
        peak_bytes: the largest memory of this process so far: on a GPU that torch has allocated, on a CPU the
            resident memory with torch itself.
        batch_size: of a step, of all processes together.
        seconds: of a step.
        steps: how many the recipe plans; with a length in minutes, as many as fit into it.
    """

    stage: str
    parameters: int
    trained: int
    state_bytes: int
    peak_bytes: int
    batch_size: int
    seconds: float
    steps: int

    def __str__(self) -> str:
        of = "" if self.trained == self.parameters else f" ({self.trained:,} of them trained)"
        return (
            f"{self.stage}: {self.parameters:,} parameters{of}; state {_size(self.state_bytes)}, peak memory "
            f"{_size(self.peak_bytes)}; {self.batch_size / self.seconds:.3g} images/s, "
            f"{3600 / self.seconds:,.0f} steps per hour; {self.steps:,} steps take "
            f"{_duration(self.steps * self.seconds)}"
        )


def rehearse(
    stages: Sequence[str], preset: Preset, out: Path, **options
) -> Iterator[Needs]:
    """Take a few steps of each stage, and write nothing into the run.

    Args:
        stages: names, in the order in which they are trained.
        preset: the recipes.
        out: folder of the run. Stages that are not finished there are rehearsed with initial weights of those
            that they need.
        options: see `_trainers`.

    Yields:
        What each stage needs.

    Raises:
        TrainingError, ValueError: as the training does.
    """
    for trainer in _trainers(stages, preset, out, **options):
        settings = trainer.options
        for _ in range(WARM_UP):
            trainer.step(0.0)
        _wait(trainer.device)
        begin = time.perf_counter()
        for _ in range(TIMED):
            trainer.step(0.0)
        _wait(trainer.device)
        seconds = (time.perf_counter() - begin) / TIMED
        parameters = list(trainer.stage.model.parameters())
        yield Needs(
            stage=trainer.stage.name,
            parameters=sum(each.numel() for each in parameters),
            trained=sum(each.numel() for each in parameters if each.requires_grad),
            state_bytes=_bytes(trainer.state.state_dict()),
            peak_bytes=_peak_bytes(trainer.device),
            batch_size=settings.batch_size,
            seconds=seconds,
            steps=settings.steps or max(1, int(60 * settings.minutes / seconds)),
        )


@dataclass(frozen=True)
class RateTest:
    """What a range test of the learning rate found.

    Args:
        rates: of each step, rising.
        losses: smoothed.
        suggested: where the loss falls fastest; None if it never fell.
    """

    rates: list[float]
    losses: list[float]
    suggested: float | None


def find_learning_rate(
    stage: str,
    preset: Preset,
    out: Path,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    **options,
) -> RateTest:
    """Train a stage for a while with a learning rate that rises exponentially; nothing is written.

    Args:
        stage: name.
        preset: the recipes.
        out: folder of the run, which has the stages that this one needs, or their initial weights are used.
        low: first learning rate.
        high: last one.
        steps: from low to high; fewer are made if the loss grows beyond 4 times its smallest value.
        options: see `_trainers`.

    Raises:
        TrainingError, ValueError: as the training does, or low, high or steps make no range.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 1506.01186, section 3.3.
    """
    if not (0 < low < high < math.inf and steps >= 10):
        raise ValueError(f"--find-lr: expected 0 < low < high and 10 steps, got {low}, {high}, {steps}")
    (trainer,) = _trainers((stage,), preset, out, **options)
    rates, losses, average = [], [], 0.0
    for number in range(steps):
        rate = low * (high / low) ** (number / (steps - 1))
        before = trainer.state.window.loss.item()
        try:
            trainer.step(rate)
        except TrainingError:  # no longer finite
            break
        loss = trainer.state.window.loss.item() - before
        average = 0.9 * average + 0.1 * loss
        smooth = average / (1 - 0.9 ** (number + 1))
        if not math.isfinite(smooth) or (losses and smooth > DIVERGED * min(losses)):
            break
        rates.append(rate)
        losses.append(smooth)
    first = steps // 10  # the average of fewer losses says little
    return RateTest(rates, losses, steepest(rates[first:], losses[first:]))


def steepest(rates: Sequence[float], losses: Sequence[float], span: int = 5) -> float | None:
    """The rate in the middle of the `span` steps over which the loss falls most; None if it never falls.

    Example:
        >>> steepest([1e-4, 1e-3, 1e-2, 1e-1], [1.0, 0.9, 0.4, 0.7], span=1)
        0.01
    """
    falls = [(losses[i + span] - losses[i], rates[i + (span + 1) // 2]) for i in range(len(rates) - span)]
    fall, rate = min(falls, default=(0.0, 0.0))
    return rate if fall < 0 else None


def _trainers(
    stages: Sequence[str],
    preset: Preset,
    out: Path,
    *,
    seed: int | None = None,
    device: torch.device,
    dtype: torch.dtype | None,
    freeze: Sequence[str] | None = None,
    shards: str | None = None,
    val_shards: str | None = None,
    tokenizer: str | None = None,
    processes: Processes = ALONE,
    execution: Execution = PLAIN,
) -> Iterator[Trainer]:
    """A trainer of each stage in a temporary folder, where unfinished stages have their initial weights.

    Args:
        stages, preset, out: see `rehearse`.
        seed, device, dtype, freeze, shards, val_shards, tokenizer, processes, execution: see `train_stage`.
    """
    seed, record = 0 if seed is None else seed, RunRecord.read(out, resume=True)
    dtype = choose_dtype("auto", device) if dtype is None else dtype
    shards, val_shards = agree_on_run(record, preset, out, shards, val_shards, override=False)
    reads = run_tokenizer(preset, out, shards, tokenizer, allow_pipe=execution.allow_pipe)

    def made(name: str) -> SceneStage:
        return make_stage(
            name, preset, out=folder, seed=seed, device=device, shards=shards, val_shards=val_shards,
            tokenizer=reads, processes=processes, execution=execution,
        )  # fmt: skip

    with _folder_of_weights(out) as folder:
        for name in stages:
            for other in _needed_by(name, preset):
                if not (folder / other).exists():
                    stage = made(other)
                    (folder / other).mkdir()
                    save_weights(folder / other / "model.safetensors", stage.config, stage.model.state_dict())
            stage, place = made(name), StageFolder(folder / "rehearsed" / name)
            freeze_weights(stage.model, freeze or ())
            place.prepare()
            yield Trainer(
                stage, preset.recipe(name).optimisation, place, seed=seed, device=device, dtype=dtype,
                show_progress=False, processes=processes, execution=execution,
            )  # fmt: skip


def _needed_by(name: str, preset: Preset) -> tuple[str, ...]:
    """The stages that are finished before this one begins."""
    if name in ("prior", "decoder"):
        return ("clip",)
    return ("clip", "decoder") if "sampled" in preset.recipe(name).data else ()


@contextmanager
def _folder_of_weights(out: Path) -> Iterator[Path]:
    """A temporary folder that shows the finished stages of a run."""
    with tempfile.TemporaryDirectory(prefix="dalle2-fast-") as name:
        folder = Path(name)
        for weights in Path(out).glob("*/model.safetensors"):
            (folder / weights.parent.name).symlink_to(weights.parent.resolve(), target_is_directory=True)
        yield folder


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in kB


def _bytes(value) -> int:
    """Of all tensors in a nested structure."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"
