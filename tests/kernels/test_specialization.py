"""One compilation serves all batch sizes, steps and guidances, and no op waits for the device.

Triton compiles a kernel again when an integer becomes 1 or a multiple of 16, or when a constant changes. Here
the launchers run for several batch sizes, and the keys of Triton's compilation cache are compared. Nothing is
compiled.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle2_fast import functional
from dalle2_fast.ops import _dispatch
from tests.support.launches import Launch, recorded

BATCHES = (1, 2, 3, 7, 16, 33, 64)


@functools.cache
def binder(kernel) -> Callable:
    """Triton's function from arguments to what it specialises on."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    compiled, backend = JITFunction(kernel.fn, **kernel.kwargs), make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(compiled.signature, compiled.params, backend)


def compilation_key(launch: Launch) -> str:
    try:
        _, specialization, options = binder(launch.kernel)(*launch.args, **launch.kwargs)
    except (ImportError, TypeError, ValueError) as error:
        pytest.skip(f"this Triton binds arguments in another way: {error}")
    return f"{specialization} {options}"


def empty(*shape: int) -> torch.Tensor:  # its memory is never written
    return torch.empty(*shape, dtype=torch.bfloat16)


def norm(batch: int, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = empty(batch, *shape).to(memory_format=layout).requires_grad_()
    weight, rows = empty(shape[0]).requires_grad_(), empty(batch, shape[0])
    y = functional.group_norm_silu(x, 32, weight, weight, 1e-5, rows, rows, impl="fused")
    y.backward(torch.empty_like(y))


def attention(batch: int, image: bool) -> None:
    q, *image_kv = empty(batch, 256, 3, 10, 64).permute(2, 0, 3, 1, 4).requires_grad_().unbind(0)
    k = empty(batch, 81, 10, 64).transpose(1, 2).requires_grad_()
    mask = torch.ones(batch, 81, dtype=torch.bool)
    out = functional.cross_attention(q, k, k, mask, *(image_kv if image else ()), impl="fused")
    out.backward(torch.empty_like(out))


def step(batch: int, dynamic: bool) -> None:
    options = dict(guidance_rescale=0.3, dynamic_threshold=0.99) if dynamic else dict(clip=1.0)
    where = batch % 50 if dynamic else torch.tensor(batch % 50)
    guidance = float(batch) if dynamic else torch.tensor(float(batch))
    functional.diffusion_step(
        empty(batch, 3, 64, 64), empty(2 * batch, 6, 64, 64), torch.empty(50, 8), where,
        seeds=torch.arange(batch), guidance=guidance, learned_range=True, impl="fused", **options,
    )  # fmt: skip


def noising(batch: int) -> None:
    x, one = empty(batch, 3, 64, 64), empty(batch)
    functional.add_noise(x, one, one, seeds=torch.arange(batch), step=batch, impl="fused")


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CALLS = {
    **{
        f"norm {shape} {name}": functools.partial(norm, shape=shape, layout=layout)
        for shape in ((320, 16, 16), (1280, 4, 4), (64, 128, 128))
        for name, layout in LAYOUTS.items()
    },
    "attention": functools.partial(attention, image=False),
    "attention with image keys": functools.partial(attention, image=True),
    "step": functools.partial(step, dynamic=False),
    "step with numbers and a dynamic threshold": functools.partial(step, dynamic=True),
    "noising": noising,
}


@pytest.mark.parametrize("name", list(CALLS))
def test_one_compilation_for_all_batches(name, kernel_device):
    if kernel_device != "cpu":
        pytest.skip("there is a GPU: nothing is interpreted")
    keys: dict[str, dict[int, set[str]]] = defaultdict(dict)  # kernel -> batch -> what it is compiled for
    for batch in BATCHES:
        with recorded() as launches:
            CALLS[name](batch)
        assert launches
        for launch in launches:
            keys[launch.name].setdefault(batch, set()).add(compilation_key(launch))
    for kernel, found in keys.items():  # one call may have two: with a mask and without
        assert len(set.union(*found.values())) == max(map(len, found.values())), (kernel, found)


def implementations() -> dict[str, Callable]:
    from dalle2_fast.kernels.cross_attention import forward as cross_attention
    from dalle2_fast.kernels.diffusion import noise as add_noise
    from dalle2_fast.kernels.diffusion import step as diffusion_step
    from dalle2_fast.kernels.group_norm_silu import backward as group_norm_silu_backward
    from dalle2_fast.kernels.group_norm_silu import forward as group_norm_silu

    return {
        "group_norm_silu": group_norm_silu._forward,
        "group_norm_silu_backward": group_norm_silu_backward._backward,
        "cross_attention": cross_attention._forward,
        "cross_attention_backward": cross_attention.cross_attention_backward,
        "diffusion_step": diffusion_step._diffusion_step,
        "add_drawn_noise": add_noise._add_drawn_noise,
    }


class InsideOurOps(TorchDispatchMode):
    """Collects which of torch's ops run inside of ours."""

    def __init__(self, ours: dict[str, Callable]):
        super().__init__()
        self.ours, self.inside, self.found = ours, False, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        space, _, name = op._schema.name.partition("::")
        if space != "dalle2_fast":
            if self.inside:
                self.found.add(name)
            return op(*args, **(kwargs or {}))
        self.inside = True
        try:
            with self:  # the dispatcher would not show what an op calls
                return self.ours[name](*args, **(kwargs or {}))
        finally:
            self.inside = False


@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_waits_for_the_device(name, kernel_device, monkeypatch):
    """Catches what a CUDA graph cannot capture: a value that Python reads, which the meta device refuses, and
    a number that is sent to the device (lift_fresh is torch.tensor of a number)."""
    if kernel_device != "cpu":
        pytest.skip("there is a GPU, where the ops are captured in CUDA graphs")
    assert _dispatch.load_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(_dispatch, "use_reference", lambda *_, **__: False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which the meta device has not
    with recorded() as launches, torch.device("meta"), InsideOurOps(implementations()) as mode:
        CALLS[name](3)
    assert launches and mode.found
    assert "lift_fresh" not in mode.found


def test_waiting_is_seen():
    from dalle2_fast.kernels._op import define

    runs = {
        "toy_reading": lambda x: x * float(x.sum()),
        "toy_fetching": lambda x: x.cpu(),
        "toy_sending": lambda x: x + torch.tensor(1.0),
    }
    reading, fetching, sending = (
        define(f"{name}(Tensor x) -> Tensor", run=run, fake=torch.empty_like) for name, run in runs.items()
    )
    x = torch.empty(2, device="meta")
    with InsideOurOps(runs) as mode:
        for op in (reading, fetching):
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                op(x)
        assert "lift_fresh" not in mode.found
        sending(x)
        assert "lift_fresh" in mode.found
