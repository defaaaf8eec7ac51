"""The steps of sampling runs on buffers that keep their addresses, so that a CUDA graph can replay them.

Everything that differs from step to step or from run to run is read from these buffers: the state, the number
of the step, coefficients, times, seeds, guidance, conditions, known pixels. A step copies no value to the
host, and leaves nothing behind but the buffers, so that all graphs may use the same memory for the rest.
"""

from __future__ import annotations

import torch

from dalle2_fast.diffusion.graphs.plan import SamplingPlan, make_step

_LEAST_ROWS = 128  # of a table: runs of up to so many steps share a graph


def table_rows(steps: int) -> int:
    """The rows of the buffer of a table: a power of two, so that few numbers of steps need another graph.

    Example:
        >>> table_rows(25), table_rows(200)
        (128, 256)
    """
    return max(_LEAST_ROWS, 1 << (steps - 1).bit_length())


class StaticSteps:
    """The steps of all runs that have the key of one plan, each as a function without arguments.

    Args:
        plan: a run with these shapes, dtypes, networks and constants; its values are not used.

    Attributes:
        steps: for each of `plan.nets`, a function that makes the next step with it.
    """

    def __init__(self, plan: SamplingPlan) -> None:
        rows, batch = table_rows(plan.steps), len(plan.x)
        self.options = plan.options
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.x, self.seeds = torch.empty_like(plan.x), torch.empty_like(plan.seeds)
            self.previous_x0 = torch.empty_like(plan.x) if plan.options.multistep else None
            self.row = torch.zeros((), dtype=torch.int64, device=plan.x.device)
            self.table = plan.table.new_zeros(rows, plan.table.shape[1])
            self.times = plan.times.new_zeros(rows, batch)
            self.scales = None if plan.scales is None else plan.scales.new_zeros(rows)
            self.guidance = None if plan.guidance is None else plan.table.new_zeros(batch)
            self.inpainting = None if plan.inpainting is None else plan.inpainting.on_buffers(rows + 1)
            self.nets = tuple((net.on_buffers(), guided) for net, guided in plan.nets)
        self.steps = [lambda position=position: self._step(position) for position in range(len(self.nets))]

    @staticmethod
    def key(plan: SamplingPlan) -> tuple:
        """Two plans with the same key can use the same steps; it can be hashed."""
        inpainting = None if plan.inpainting is None else tuple(plan.inpainting.mask.shape)
        return (
            tuple(plan.x.shape), plan.x.dtype, str(plan.x.device), table_rows(plan.steps), plan.options,
            plan.guidance is None, plan.scales is None, inpainting,
            tuple((*net.form(), guided) for net, guided in plan.nets),
        )  # fmt: skip

    def begin(self, plan: SamplingPlan) -> None:
        """Take the values of a run; the steps then continue from its first one."""
        self.x.copy_(plan.x)
        self.seeds.copy_(plan.seeds)
        if self.previous_x0 is not None:
            self.previous_x0.zero_()  # the first step has the factor 0 for it, see `sample`
        self.row.fill_(plan.start)
        self.table[: plan.steps].copy_(plan.table)
        self.times[: plan.steps].copy_(plan.times)
        if self.scales is not None:
            self.scales[: plan.steps].copy_(plan.scales)
        if isinstance(plan.guidance, torch.Tensor):
            self.guidance.copy_(plan.guidance)
        elif plan.guidance is not None:
            self.guidance.fill_(plan.guidance)
        if self.inpainting is not None:
            self.inpainting.copy_(plan.inpainting)
        for (buffers, _), (net, _) in zip(self.nets, plan.nets, strict=True):
            for buffer, tensor in zip(buffers.tensors(), net.tensors(), strict=True):
                buffer.copy_(tensor)

    def _step(self, position: int) -> None:
        net, guided = self.nets[position]
        row = self.row.reshape(1)
        time = self.times.index_select(0, row)[0]
        x, x0 = make_step(
            net, self.x, time, self.table, self.row, self.options, seeds=self.seeds,
            guidance=self.guidance if guided else None, previous_x0=self.previous_x0,
            scale=None if self.scales is None else self.scales.index_select(0, row)[0],
        )  # fmt: skip
        self.row.add_(1)
        if self.inpainting is not None:
            x = self.inpainting.with_known(x, self.row, self.seeds)
        self.x.copy_(x)
        if self.previous_x0 is not None:
            self.previous_x0.copy_(x0)
