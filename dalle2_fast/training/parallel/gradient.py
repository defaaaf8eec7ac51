"""Loss and gradient of one step: of the rows of this process, in micro-batches, averaged over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle2_fast.draws import BatchGenerator
from dalle2_fast.training.parallel.contrastive import two_passes
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.parallel.loss_scale import LossScale
from dalle2_fast.training.parallel.processes import Processes, check_division
from dalle2_fast.training.parallel.strategies import Alone
from dalle2_fast.training.stages.protocol import Stage


class StepGradient:
    """Computes a step's gradient and leaves it in the parameters.

    Args:
        stage: has the model and the loss of some rows.
        strategy: how the processes share the model.
        processes: of the training.
        execution: micro-batches and chunks.
        device: of the model.
        dtype: of autocast.
        loss_scale: for float16; None for none.

    Raises:
        TrainingError: the processes and micro-batches do not divide the batch.
    """

    def __init__(
        self,
        stage: Stage,
        strategy: Alone,
        processes: Processes,
        execution: Execution,
        *,
        device: torch.device,
        dtype: torch.dtype,
        loss_scale: LossScale | None,
    ) -> None:
        self.stage, self.strategy, self.processes, self.execution = stage, strategy, processes, execution
        self.device, self.dtype, self.loss_scale = device, dtype, loss_scale
        self.generator = BatchGenerator(device)
        self.is_contrastive = hasattr(stage, "features")
        check_parts(stage, processes, execution)

    def __call__(self, batch: dict, seed: int) -> Tensor:
        """The loss, a float32 scalar: the mean over the batch. The generator has the seed already."""
        self.strategy.model.zero_grad(set_to_none=True)
        if self.is_contrastive and (chunks := self._chunks(batch)):
            loss = self._in_two_passes(batch, chunks)
        else:
            loss = self._in_micro_batches(batch, seed)
        return self.processes.mean(loss.detach().float())

    def _in_micro_batches(self, batch: dict, seed: int) -> Tensor:
        count, world = self.execution.accumulate, self.processes.world_size
        factor, total = self._factor(), None
        for number in range(count):
            if number:
                self.generator.manual_seed(seed)
            self.generator.part = self.processes.rank * count + number
            self.generator.parts = world * count
            rows = batch if count == 1 else part_of(batch, number, count)
            with self._precision():
                loss = self.strategy.run(self.stage.loss, rows, self.generator, last=number == count - 1)
            loss = loss if count == 1 else loss / count
            (loss if factor == 1.0 else loss * factor).backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total

    def _chunks(self, batch: dict) -> int | None:
        """The number of chunks of a contrastive loss, which compares all rows; None: one pass."""
        execution, rows = self.execution, len(batch["tokens"])
        if execution.clip_chunk is not None:
            return -(-rows // execution.clip_chunk)
        return execution.accumulate if execution.accumulate > 1 else None

    def _in_two_passes(self, batch: dict, chunks: int) -> Tensor:
        def precisely(function):
            def call(*arguments):
                with self._precision():
                    return function(*arguments)

            return call

        self.stage.limit_scale()
        size = -(-len(batch["tokens"]) // chunks)
        rows = [rows_of(batch, begin, begin + size) for begin in range(0, len(batch["tokens"]), size)]
        return two_passes(
            precisely(self.stage.features),
            precisely(lambda features, scale: self.stage.contrast(features, batch, scale)),
            self.strategy.model.logit_scale,
            rows,
            self.strategy.run,
            self._factor(),
        )

    def _factor(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def _precision(self) -> AbstractContextManager:
        """Autocast, and the attention that is fast with it."""
        stack = ExitStack()
        stack.enter_context(self._attention())
        stack.enter_context(
            torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        )
        return stack

    def _attention(self) -> AbstractContextManager:
        """Plain attention in bfloat16 on a CPU, because the flash kernel's backward is slow there on short
        sequences: 82 ms against 17 for CLIP's texts (192 rows of 4 heads x 36 tokens), 18 against 10 for 64
        queries on 105 keys."""
        plain = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def clip(self, largest: float) -> Tensor:
        """Bound the norm of the gradient; the norm before, a float32 scalar. It is not finite after an
        overflow of float16, see `LossScale`."""
        if self.loss_scale is not None:
            self.strategy.unscale(1.0 / self.loss_scale.value)
        return self.strategy.clip(largest).detach().float()


def check_parts(stage: Stage, processes: Processes, execution: Execution) -> None:
    """Raise TrainingError unless the micro-batches divide the rows of a process.

    A contrastive loss is computed in chunks, which may have any size.
    """
    if execution.accumulate > 1 and not hasattr(stage, "features"):
        check_division(stage.name, stage.scenes_per_batch(), processes, execution.accumulate)


def rows_of(batch, begin: int, end: int):
    """The rows from `begin` to `end` of all tensors and lists in a batch."""
    if isinstance(batch, dict):
        return {key: rows_of(value, begin, end) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) or isinstance(batch, Tensor) and batch.ndim:
        return batch[begin:end]
    return batch


def part_of(batch: dict, number: int, parts: int) -> dict:
    """Part `number` of several equal parts of a batch."""
    rows = len(batch["tokens"])
    return rows_of(batch, number * rows // parts, (number + 1) * rows // parts)
