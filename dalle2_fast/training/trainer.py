"""One loop for every stage: AdamW or Muon, warm-up and decay, clipping, EMA, log, pictures, resumable state.

Everything random in step k (scenes, captions, noise, times, drops) is a function of (seed, k) alone. The
state therefore holds no generator, and on the CPU a run that was killed and resumed equals the uninterrupted
run bit for bit when the length is given in steps. With a budget in minutes the learning rate follows the
clock, which no run can repeat exactly.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dalle2_fast.seeds import mix_seed
from dalle2_fast.training.ema import ExponentialMovingAverage
from dalle2_fast.training.optimisers import Optimisation, make_optimizers
from dalle2_fast.training.state import StageFolder, TrainingError


class Stage(Protocol):
    """What the loop needs to know about a stage (see stages.py)."""

    name: str
    model: nn.Module
    config: dict  # JSON-able; rebuilds the model

    def batch(self, step: int) -> dict: ...
    def loss(self, batch: dict, generator: torch.Generator) -> Tensor: ...
    def metrics(self) -> dict[str, float]: ...
    def pictures(self) -> tuple[Tensor, int] | None: ...


@contextmanager
def stop_requests():
    """Yields a list that receives the number of a SIGINT or SIGTERM; a second one ends the process as
    usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def quick_products(device: torch.device):
    """Muon multiplies in float32. On a CPU torch takes oneDNN for that only below the precision "highest": on
    an AMD CPU with AVX-512 it is 2.3 times as fast as MKL, and there to the same digits."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer:
    """Trains `stage.model` in `folder`.

    stage: model, batches and loss. seed: with the step it determines everything random. device: where the
    model lies. dtype: bfloat16 for autocast; weights, averages and losses are float32.
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
    ) -> None:
        self.stage, self.options, self.folder, self.seed = stage, options, folder, seed
        self.device, self.dtype = torch.device(device), dtype
        self.show_progress = show_progress
        self.model = stage.model.to(self.device).train()
        self.ema = ExponentialMovingAverage(self.model, options.ema_decay)
        self.optimizers = make_optimizers(self.model, options)
        self.step = 0
        self.rate = 0.0
        self.elapsed = 0.0

    # --- state
    # -----------------------------------------------------------------------------------------------------
    def save(self) -> None:
        self.folder.save_state(
            {
                "format_version": 1,
                "stage": self.stage.name,
                "optimizer": self.options.optimizer,
                "seed": self.seed,
                "config": self.stage.config,
                "step": self.step,
                "elapsed": self.elapsed,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            }
        )

    def resume(self) -> None:
        """Continue from the folder's state; it must be of this stage, model and seed."""
        state, path = self.folder.load_state(self.device)
        state["config"] = completed(state.get("config"), type(self.model))
        mine = {"stage": self.stage.name, "seed": self.seed, "config": self.stage.config,
                "optimizer": self.options.optimizer}
        for name, expected in mine.items():
            if state.get(name) != expected:
                differs = difference(expected, state.get(name))
                raise TrainingError(f"{path}: cannot resume: its {name} differs: {differs}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
        self.folder.trim_log(self.step)

    # --- the loop
    # --------------------------------------------------------------------------------------------------
    def train(self, pause_after: float | None = None) -> str:
        """Train to the end. pause_after: stop (state saved) after this many minutes of this call.

        Returns "finished", "paused" or "interrupted by SIGINT" (SIGTERM). Raises TrainingError on a loss or
        gradient that is not finite; the last good state is then on the disk.
        """
        cuda = [self.device] if self.device.type == "cuda" else []
        keep = torch.random.fork_rng(devices=cuda)
        with stop_requests() as stops, keep, quick_products(self.device), self._bar() as bar:
            if not self.folder.has_state():
                self.save()  # a full disk shows now, and there is a good state whatever happens
            return self._loop(stops, bar, pause_after)

    def _bar(self) -> tqdm:
        options, common = self.options, dict(desc=self.stage.name, disable=not self.show_progress)
        if options.steps is not None:
            return tqdm(total=options.steps, initial=self.step, unit="step", **common)
        return tqdm(total=round(60 * options.minutes), initial=round(self.elapsed), unit="s", **common)

    def _loop(self, stops: list[int], bar: tqdm, pause_after: float | None) -> str:
        options, window = self.options, Window(self.device)
        begin, before = time.monotonic(), self.elapsed
        saved = examined = begin
        while True:
            now = time.monotonic()
            self.elapsed = before + now - begin
            progress = options.progress(self.step, self.elapsed)
            paused = pause_after is not None and now - begin >= 60 * pause_after
            if progress >= 1.0 or stops or paused:
                self._require_finite(window)
                if progress >= 1.0:
                    self._log(window, bar, examine=True)
                self.save()
                if progress >= 1.0:
                    return "finished"
                return f"interrupted by {signal.Signals(stops[0]).name}" if stops else "paused"

            self.rate = options.rate(self.step, progress)
            window.add(*self._backward())
            if self.device.type == "cpu":  # reading a value stalls a GPU: there it waits for the log line
                self._require_finite(window)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate
                optimizer.step()
            self.ema.update(self.model)
            self.step += 1

            doubled = self.step >= options.first_pictures and self.step & (self.step - 1) == 0
            examine = doubled or now - examined >= 60 * options.picture_minutes
            if (examine or self.step % options.log_steps == 0) and self.step != options.steps:
                self._require_finite(window)
                self.elapsed = before + time.monotonic() - begin
                self._log(window, bar, examine)
                window = Window(self.device)
                examined = now if examine else examined
            bar.update(1 if options.steps is not None else max(0, int(self.elapsed) - bar.n))

            by_step = options.save_steps is not None and self.step % options.save_steps == 0
            if by_step or now - saved >= 60 * options.save_minutes:
                self._require_finite(window)
                self.save()
                saved = now

    def _backward(self) -> tuple[Tensor, Tensor]:
        # The 1 keeps these numbers apart from those of the data, which depend on (seed, step).
        seed = mix_seed(self.seed, self.step, 1)
        torch.manual_seed(seed)  # for dropout and the like, which take no generator
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = self.stage.batch(self.step)
        self.model.zero_grad(set_to_none=True)
        with self._attention(), torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        ):
            loss = self.stage.loss(batch, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        return loss.detach().float(), norm.detach().float()

    def _attention(self) -> AbstractContextManager:
        """On a CPU the flash kernel's bfloat16 backward is slow on short sequences: 82 ms against 17 for
        CLIP's texts (192 rows of 4 heads x 36 tokens), 18 against 10 for 64 queries on 105 keys."""
        plain = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def _require_finite(self, window: Window) -> None:
        if not window.is_finite():
            raise TrainingError(
                f"{self.stage.name}: the loss or its gradient is not finite near step {self.step}; stopped. "
                f"The last good state is {self.folder.state_path}; resume it with a lower --lr"
            )

    def _log(self, window: Window, bar: tqdm, examine: bool) -> None:
        """One line of log.jsonl: means since the last one; with `examine` also metrics and pictures."""
        batch_size = self.options.batch_size
        row = {"step": self.step, "seconds": round(self.elapsed, 2), "samples": self.step * batch_size}
        if window.steps:
            row |= window.means(batch_size) | {"lr": self.rate}
            bar.set_postfix(loss=f"{row['loss']:.4f}", images=f"{row['images_per_s']:.0f}/s", refresh=False)
        if examine:
            row |= self._examine()
        self.folder.append_log([row])

    @torch.no_grad()
    def _examine(self) -> dict[str, float]:
        """Metrics and a picture sheet with the averaged weights."""
        with self.ema.applied_to(self.model):
            metrics = self.stage.metrics()
            sheet = self.stage.pictures()
        if sheet is not None:
            self.folder.save_picture(f"step-{self.step:07d}.png", *sheet)
        return {name: round(float(value), 5) for name, value in metrics.items()}


class Window:
    """Sums since the last log line, kept on the device: reading one value per step would stall a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps = 0
        self.begin = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.loss += loss
        self.norm += norm
        self.steps += 1

    def is_finite(self) -> bool:
        """False once any loss or gradient norm was not finite: infinities and NaN stay in a sum."""
        return math.isfinite((self.loss + self.norm).item())

    def means(self, batch_size: int) -> dict[str, float]:
        seconds = time.monotonic() - self.begin
        return {
            "images_per_s": round(self.steps * batch_size / seconds, 2),
            "loss": self.loss.item() / self.steps,
            "grad_norm": self.norm.item() / self.steps,
        }


def completed(config: object, kind: type[nn.Module]) -> object:
    """A saved configuration with the defaults of options that its version did not know yet; as it is if it
    does not build a model of class `kind`."""
    try:
        with torch.device("meta"):
            return config | {"model": kind(**config["model"]).config}
    except (TypeError, ValueError, KeyError, AttributeError):
        return config


def difference(expected, got, path: str = "") -> str:
    """The first place where two nested configurations differ, as text."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            if key not in expected or key not in got or expected[key] != got[key]:
                return difference(
                    expected.get(key, "nothing"), got.get(key, "nothing"), f"{path}.{key}".lstrip(".")
                )
    return f"{path + ': ' if path else ''}expected {expected!r}, got {got!r}"
