"""Everything that changes while a stage is trained, as one object that is saved and resumed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dalle2_fast.training.ema import ExponentialMovingAverage
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.optimisers import make_optimizers
from dalle2_fast.training.parallel.loss_scale import LossScale
from dalle2_fast.training.recipes import Optimisation
from dalle2_fast.training.stages.protocol import Stage
from dalle2_fast.training.window import Window

FORMAT_VERSION = 1


class TrainingState:
    """Model, average of its weights, optimisers, step, elapsed seconds, and what the log has not shown yet.

    It has no generator, because everything random in a step is a function of the seed and the step.

    Args:
        stage: gives the model, which is moved to `device` and trained in place.
        options: optimiser and decay of the average.
        seed: with the step it determines everything random; a state of another seed is not resumed.
        device: where model, average and optimisers are.
        graphs: whether an update may be captured as a CUDA graph: learning rate and decay are then tensors.
        loss_scale: of float16, which is saved with the rest; None for none.
    """

    def __init__(
        self,
        stage: Stage,
        options: Optimisation,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        graphs: bool = False,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.model = stage.model.to(device).train()
        self.ema = ExponentialMovingAverage(self.model, options.ema_decay)
        self._rate = torch.zeros((), device=device) if graphs else None
        self._average_weight = torch.zeros((), device=device) if graphs else None
        self.optimizers = make_optimizers(self.model, options, self._rate)
        self.options, self.loss_scale = options, loss_scale
        self.step = 0
        self.samples = 0  # that were trained on; the batch size may change when a run is resumed
        self.elapsed = 0.0
        self.window = Window(torch.device(device))  # the steps since the last line of the log
        self._origin = {
            "stage": stage.name, "optimizer": options.optimizer, "seed": seed, "config": stage.config
        }  # fmt: skip

    def update(self, rate: float) -> None:
        """Step the optimisers with learning rate `rate`, then move the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.ema.update(self.model)
        self._count()

    def skip(self) -> None:
        """Count a step whose gradient overflowed: it changes no weight."""
        self._count()

    def set_update(self, rate: float) -> None:
        """Count an update with learning rate `rate` and set the tensors that `captured_update` reads."""
        self._rate.fill_(rate)
        self._average_weight.fill_(self.ema.next_weight())
        self._count()

    def captured_update(self) -> None:
        """The part of an update that is done on the device."""
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.move(self.model, self._average_weight)

    def _count(self) -> None:
        self.step += 1
        self.samples += self.options.batch_size

    def state_dict(self) -> dict:
        """What state.pt holds: tensors and plain values, which load with weights_only=True."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}
        return {
            "format_version": FORMAT_VERSION,
            **self._origin,
            "step": self.step,
            "samples": self.samples,
            "elapsed": self.elapsed,
            "window": self.window.state_dict(),
            **scale,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def check_origin(self, saved: dict, path: Path) -> None:
        """Raise unless a saved state, or its plain values, is of this stage, seed, model and optimiser.

        Raises:
            TrainingError: it is not; the message says what differs.
        """
        saved["config"] = completed(saved.get("config"), type(self.model))
        for name in ("stage", "seed", "config", "optimizer"):
            if saved.get(name) != self._origin[name]:
                differs = difference(self._origin[name], saved.get(name))
                raise TrainingError(f"{path}: cannot resume: its {name} differs: {differs}")

    def load_state_dict(self, saved: dict, path: Path, *, fresh_optimizers: bool = False) -> None:
        """Continue from `saved`, which was read from `path`.

        Args:
            saved: the result of `state_dict`, on any device.
            path: named by errors.
            fresh_optimizers: do not load the state of the optimisers.

        Raises:
            TrainingError: it is not whole, or it has another stage, seed, model or optimiser; the message
                says what differs.
        """
        self.check_origin(saved, path)
        for name in ("model", "ema", "optimizers", "step", "elapsed"):
            if name not in saved:
                raise TrainingError(f"{path}: cannot resume: it has no {name!r}")
        try:
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            if not fresh_optimizers:
                self._load_optimizers(saved["optimizers"])
            self.step, self.elapsed = int(saved["step"]), float(saved["elapsed"])
            if "window" in saved:  # not in states of the previous release
                self.window.load_state_dict(saved["window"])
            if self.loss_scale is not None and "loss_scale" in saved:
                self.loss_scale.load_state_dict(saved["loss_scale"])
            self.samples = int(saved.get("samples", self.step * self.options.batch_size))
        except torch.OutOfMemoryError:  # a RuntimeError, but the state is good
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split())
            raise TrainingError(f"{path}: cannot resume: it does not fit this stage: {text}") from error

    def _load_optimizers(self, saved: list[dict]) -> None:
        """Load moments; learning rate, decay and betas stay those of the options."""
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            options = [
                {name: value for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, options, strict=True):
                group.update(values)


def completed(config: object, kind: type[nn.Module]) -> object:
    """A saved configuration, completed with the defaults of options that are newer than it.

    It is returned unchanged if it does not build a model of class `kind`.
    """
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
