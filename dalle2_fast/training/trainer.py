"""One loop for all stages: loss, gradient, clipping, AdamW or Muon, EMA, log, validation, state.

Everything random in step k (scenes, captions, noise, times, dropped conditions) is a function of (seed, k),
and for a row of the batch the same on any number of processes (see `draws`).
The state therefore has no generator, and on a CPU a run that was killed and resumed equals the uninterrupted
run bit for bit if its length is given in steps. With a length in minutes the learning rate follows the clock,
which no run can repeat exactly.
"""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dalle2_fast.seeds import mix_seed
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.graphs.step import GraphedStep, Graphs
from dalle2_fast.training.interruption import stop_requests
from dalle2_fast.training.parallel.checkpoints import Checkpoints
from dalle2_fast.training.parallel.execution import PLAIN, Execution
from dalle2_fast.training.parallel.gradient import StepGradient
from dalle2_fast.training.parallel.loss_scale import LossScale
from dalle2_fast.training.parallel.processes import ALONE, Processes
from dalle2_fast.training.parallel.strategies import make_strategy
from dalle2_fast.training.recipes import Optimisation
from dalle2_fast.training.run_folder.reports import Report
from dalle2_fast.training.stages.protocol import Stage
from dalle2_fast.training.state import TrainingState
from dalle2_fast.training.window import Window, used_memory

SMALLEST_SCALE = 2.0**-10  # of a float16 loss: below it the gradient does not overflow, it is not finite


class Trainer:
    """Trains `stage.model` in `folder`.

    Args:
        stage: model, batches and loss.
        options: length, batch size, optimiser, learning rate, and how often to log, validate and save.
        folder: of the stage; it is prepared.
        seed: with the step it determines everything random.
        device: where the model is.
        dtype: torch.bfloat16 or torch.float16 for autocast; weights, averages and losses are float32.
        show_progress: draw a progress bar.
        graphs: captures the step as a CUDA graph, see `GraphedStep`; None for none. Then the learning rate is
            rounded to float32.
        processes: of the training; the first one validates, logs and writes.
        execution: how a step is divided, see `Execution`.

    Raises:
        TrainingError, ValueError: the execution does not fit the stage or the number of processes.
    """

    def __init__(
        self,
        stage: Stage,
        options: Optimisation,
        folder: StageFolder,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        show_progress: bool = True,
        graphs: Graphs | None = None,
        processes: Processes = ALONE,
        execution: Execution = PLAIN,
    ) -> None:
        self.stage, self.options, self.folder, self.seed = stage, options, folder, seed
        self.device, self.dtype = torch.device(device), dtype
        self.show_progress = show_progress and processes.is_first
        self.processes = processes
        self.checkpoints = Checkpoints(folder, processes, execution.keep)
        model = stage.model.to(self.device).train()
        self.strategy = make_strategy(model, execution, processes, self.device)
        loss_scale = LossScale() if dtype == torch.float16 else None
        self.state = TrainingState(
            stage, options, seed=seed, device=self.device, graphs=graphs is not None, loss_scale=loss_scale
        )
        self.gradient = StepGradient(
            stage, self.strategy, processes, execution,
            device=self.device, dtype=dtype, loss_scale=loss_scale,
        )  # fmt: skip
        self.reports: list[Report] = []  # where the lines of the log also go
        self.flops_per_image: float | None = None  # for the model FLOPs utilisation in the log
        self.peak_flops = 0.0  # of all processes together
        self._graphed = None
        if graphs is not None:
            self._graphed = GraphedStep(self._whole_step, graphs, self.gradient.generator)

    def save(self, *, wait: bool = True) -> None:
        """Save the state; without `wait` the state of many processes may be written while they go on."""
        self.checkpoints.save(self.state, wait=wait)

    def resume(self, *, fresh_optimizers: bool = False) -> None:
        """Continue from the folder's state; it must be of this stage, model and seed.

        Args:
            fresh_optimizers: start the optimisers anew, because other weights are trained than before.
        """
        self.checkpoints.load(self.state, fresh_optimizers=fresh_optimizers)
        if self.processes.is_first:
            self.folder.trim_log(self.state.step)

    def train(self, pause_after: float | None = None) -> str:
        """Train to the end.

        Args:
            pause_after: stop (state saved) after this many minutes of this call.

        Returns:
            "finished", "paused" or "interrupted by SIGINT" (SIGTERM).

        Raises:
            TrainingError: a loss or gradient is not finite, and the last good state is on the disk; or a
                file cannot be written.
        """
        cuda = [self.device] if self.device.type == "cuda" else []
        random_state = torch.random.fork_rng(devices=cuda)
        with stop_requests() as stops, random_state, fast_matmul(self.device), self._bar() as bar:
            if not self.processes.from_first(self.folder.has_state()):
                self.save()  # a full disk is found now, and there is a good state from the start
            return self._loop(stops, bar, pause_after)

    def _loop(self, stops: list[int], bar: tqdm, pause_after: float | None) -> str:
        options, state = self.options, self.state
        state.window.start()
        begin, _ = self.processes.tick([])
        elapsed_before, first_step = state.elapsed, state.step
        saved = validated = begin
        while True:
            # Is this the end? All processes use the clock of the first one.
            now, stop = self.processes.tick(stops)
            self.checkpoints.poll()
            state.elapsed = elapsed_before + now - begin
            progress = options.progress(state.step, state.elapsed)
            finished = progress >= 1.0
            paused = pause_after is not None and now - begin >= 60 * pause_after
            if finished or stop or paused:
                self._require_finite()
                # A run that was killed between its last state and its weights has already logged its end.
                is_logged = state.step == first_step and self.processes.from_first(
                    state.step == self.folder.last_logged_step()
                )
                if finished and not is_logged:
                    self._log(bar, validate=True)
                if finished:
                    state.window = Window(self.device)
                self.save()
                if finished:
                    return "finished"
                return f"interrupted by {signal.Signals(stop).name}" if stop else "paused"

            # Batch, loss, gradient, clipping; then the weights and their average.
            rate = options.rate(state.step, progress)
            self.step(rate)

            # The log: numbers often, metrics and images now and then.
            doubled = state.step >= options.first_validation and state.step & (state.step - 1) == 0
            validate = doubled or now - validated >= 60 * options.validation_minutes
            if (validate or state.step % options.log_steps == 0) and state.step != options.steps:
                self._require_finite()
                if self.processes.is_first:
                    state.elapsed = elapsed_before + time.monotonic() - begin
                self._log(bar, validate)
                state.window = Window(self.device)
                validated = now if validate else validated
            bar.update(1 if options.steps is not None else max(0, int(state.elapsed) - bar.n))

            # The state, to resume from.
            by_step = options.save_steps is not None and state.step % options.save_steps == 0
            if by_step or now - saved >= 60 * options.save_minutes:
                self._require_finite()
                self.save(wait=False)
                saved = now

    def step(self, rate: float) -> None:
        """One step with this learning rate: loss, gradient, clipping, weights and their average."""
        state = self.state
        if self._graphed is not None:
            batch = self._batch()
            state.set_update(rate)
            state.window.add(*self._graphed(batch), rate)
            return
        loss, norm = self._backward()
        if state.loss_scale is not None:
            finite = bool(norm.isfinite())
            state.loss_scale.update(finite=finite)
            if not finite and state.loss_scale.value >= SMALLEST_SCALE:
                state.skip()
                return
        state.window.add(loss, norm, rate)
        if self.device.type == "cpu":  # reading a value stalls a GPU; there the log line does it
            self._require_finite()
        state.update(rate)

    def _batch(self) -> dict:
        """The batch of this step; everything random in the step then depends on (seed, step)."""
        seed = self._step_seed()
        # For dropout, which takes no generator: another seed on each process.
        torch.manual_seed(mix_seed(seed, self.processes.rank) if self.processes.rank else seed)
        self.gradient.generator.manual_seed(seed)
        return self.stage.batch(self.state.step)

    def _step_seed(self) -> int:
        # The 1 makes this noise differ from the numbers of the data, which depend on (seed, step).
        return mix_seed(self.seed, self.state.step, 1)

    def _whole_step(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Everything that a step does on the device, after `TrainingState.set_update`."""
        loss_and_norm = self._gradient(batch)
        self.state.captured_update()
        return loss_and_norm

    def _backward(self) -> tuple[Tensor, Tensor]:
        """Leave the clipped gradient of this step's loss in the parameters; return loss and gradient norm."""
        return self._gradient(self._batch())

    def _gradient(self, batch: dict) -> tuple[Tensor, Tensor]:
        """`_backward` of a batch."""
        loss = self.gradient(batch, self._step_seed())
        return loss, self.gradient.clip(self.options.clip_norm)

    def _require_finite(self) -> None:
        if not self.state.window.is_finite():
            raise TrainingError(
                f"{self.stage.name}: the loss or its gradient is not finite near step {self.state.step}; "
                f"stopped. The last good state is {self.folder.newest_path()}; resume it with --override and "
                "a lower --lr"
            )

    def _log(self, bar: tqdm, validate: bool) -> None:
        """One line of log.jsonl: means over the window; with `validate` metrics and images, too."""
        batch_size, step, window = self.options.batch_size, self.state.step, self.state.window
        metrics, picture = self._validate() if validate else ({}, None)
        if not self.processes.is_first:
            return
        row = {"step": step, "seconds": round(self.state.elapsed, 2), "samples": self.state.samples}
        if window.steps:
            row |= window.summary(batch_size) | used_memory(self.device)
            if self.flops_per_image is not None:
                row["mfu"] = round(self.flops_per_image * row["images_per_s"] / self.peak_flops, 4)
            bar.set_postfix(loss=f"{row['loss']:.4f}", images=f"{row['images_per_s']:.0f}/s", refresh=False)
        row |= metrics
        self.folder.append_log([row])
        for report in self.reports:
            report.add(row, picture)

    def _average(self) -> dict[str, Tensor]:
        """The whole averaged weights, on the first process; every process takes part."""
        return self.strategy.whole(self.state.ema.average, wanted=self.processes.is_first)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights of the finished stage; only the first process gets them."""
        self.checkpoints.finish()
        return self._average()

    @torch.no_grad()
    def _validate(self) -> tuple[dict[str, float], Path | None]:
        """Metrics of the averaged weights, on the first process, and the file of their images, if any."""
        average, picture = self._average(), None
        if not self.processes.is_first:
            return {}, None
        with self.strategy.averaged(self.state.ema, average, self.stage):
            metrics, images, columns = self.stage.validate()
        if images is not None:
            picture = self.folder.save_images(f"step-{self.state.step:07d}.png", images, columns)
        return {name: round(value, 5) for name, value in metrics.items()}, picture

    def _bar(self) -> tqdm:
        options, common = self.options, dict(desc=self.stage.name, disable=not self.show_progress)
        if options.steps is not None:
            return tqdm(total=options.steps, initial=self.state.step, unit="step", **common)
        return tqdm(total=round(60 * options.minutes), initial=round(self.state.elapsed), unit="s", **common)


@contextmanager
def fast_matmul(device: torch.device):
    """Multiply float32 matrices with oneDNN on a CPU, for Muon.

    torch uses oneDNN only below the precision "highest". On an AMD CPU with AVX-512 it is 2.3 times as fast
    as MKL, and the results have the same digits.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
