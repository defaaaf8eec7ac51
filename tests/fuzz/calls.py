"""Drawn calls of the public ops: valid ones of any shape, dtype, layout and option, and wrong ones.

A call is a function of its number alone, so that a fault can be repeated: `python -m tests.fuzz --only 4711`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Call:
    """One call of `dalle2_fast.functional.<op>` with keyword arguments.

    wrong: the argument that was made wrong, and how; None for a valid call.
    differentiable: arguments of which the gradient is compared.
    """

    number: int
    op: str
    arguments: dict
    wrong: tuple[str, str] | None = None
    differentiable: tuple[str, ...] = ()


def draw(number: int) -> Call:
    """The call of this number; a third of them are wrong in one argument."""
    rng = random.Random(number)
    op = rng.choice(list(OPS))
    torch.manual_seed(number)
    arguments, differentiable = OPS[op](rng)
    call = Call(number, op, arguments, differentiable=differentiable)
    if rng.random() < 1 / 3:
        spoil(call, rng)
    return call


# ---------------------------------------------------------------------------------------------------- tensors


def size(rng: random.Random, most: int = 9) -> int:
    """0 rarely, 1 often, otherwise up to `most`."""
    return rng.choice((0, 1, 1, 2, 3, most, rng.randint(1, most), rng.randint(1, most)))


def tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, unit: bool = False) -> Tensor:
    """Normal numbers in a random layout, sometimes with a large mean, all equal, or zero."""
    value = torch.randn(shape)
    if not unit:
        kind = rng.random()
        if kind < 0.1:
            value = value + rng.choice((10.0, -100.0, 1000.0 if dtype != torch.float16 else 30.0))
        elif kind < 0.15:
            value = torch.full(shape, rng.uniform(-2, 2))
        elif kind < 0.2:
            value = torch.zeros(shape)
    value = value.to(dtype)
    layout = rng.random()
    if layout < 0.2 and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout < 0.35 and value.dim() >= 2:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout < 0.5 and value.dim() >= 1:
        longer = torch.cat([value, value], dim=-1)  # the result is every second number of a longer row
        longer[..., ::2] = value
        return longer[..., ::2]
    if layout < 0.55 and value.dim() >= 1 and value.shape[0] > 0:
        return value[:1].expand(value.shape)
    return value


def maybe(rng: random.Random, value: Callable[[], object]) -> object:
    return value() if rng.random() < 0.5 else None


# -------------------------------------------------------------------------------------------------------- ops


def group_norm_silu(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    dtype, groups = rng.choice(DTYPES), rng.randint(1, 4)
    batch, channels = size(rng, 4), groups * rng.randint(1, 5)
    shape = (batch, channels, *(size(rng) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))))
    parameter = rng.choice((torch.float32, dtype))
    arguments = dict(
        x=tensor(rng, shape, dtype),
        num_groups=groups,
        weight=maybe(rng, lambda: tensor(rng, (channels,), parameter)),
        bias=maybe(rng, lambda: tensor(rng, (channels,), parameter)),
        eps=rng.choice((1e-5, 1e-6, 1e-3)),
        scale=maybe(rng, lambda: tensor(rng, (batch, channels), parameter, unit=True)),
        shift=maybe(rng, lambda: tensor(rng, (batch, channels), parameter, unit=True)),
        activation=rng.choice(("silu", None)),
    )
    return arguments, ("x", "weight", "bias", "scale", "shift")


def cross_attention(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    dtype = rng.choice(DTYPES)
    batch, heads, width = size(rng, 3), size(rng, 3), rng.choice((1, 8, 16, 32, 40, 64))
    queries, keys = size(rng, 20), size(rng, 20)
    image = rng.random() < 0.5
    image_keys = size(rng, 20)

    def rows(count: int) -> Tensor:
        return tensor(rng, (batch, heads, count, width), dtype, unit=True)

    arguments = dict(
        q=rows(queries),
        context_k=rows(keys),
        context_v=rows(keys),
        context_mask=maybe(rng, lambda: torch.rand(batch, keys) < rng.choice((0.0, 0.3, 0.8, 1.0))),
        image_k=rows(image_keys) if image else None,
        image_v=rows(image_keys) if image else None,
        softmax_scale=rng.choice((None, 0.2, 1.0)),
    )
    return arguments, ("q", "context_k", "context_v", "image_k", "image_v")


def step_number(rng: random.Random, most: int) -> int | Tensor:
    step = rng.randrange(most)
    return torch.tensor(step) if rng.random() < 0.3 else step


def sample_noise(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    batch = size(rng, 4)
    arguments = dict(
        seeds=torch.randint(-(2**62), 2**62, (batch,)),
        step=step_number(rng, 2**40),
        shape=(batch, *(size(rng) for _ in range(rng.randint(0, 3)))),
        device=rng.choice((None, "cpu")),
        dtype=rng.choice(DTYPES),
    )
    return arguments, ()


def add_noise(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    dtype, batch = rng.choice(DTYPES), size(rng, 4)
    shape = (batch, *(size(rng) for _ in range(rng.randint(0, 3))))
    given = rng.random() < 0.5
    arguments = dict(
        x0=tensor(rng, shape, dtype),
        alpha=torch.rand(batch),
        sigma=torch.rand(batch),
        noise=tensor(rng, shape, dtype, unit=True) if given else None,
        seeds=None if given else torch.randint(0, 2**62, (batch,)),
        step=0 if given else step_number(rng, 1000),
    )
    return arguments, ("x0", "alpha", "sigma", "noise")


def diffusion_step(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    dtype, batch, channels, steps = rng.choice(DTYPES), size(rng, 3), rng.randint(1, 3), rng.randint(1, 4)
    rest = tuple(size(rng, 7) for _ in range(rng.randint(0, 3)))
    guided, learned = rng.random() < 0.5, rng.random() < 0.3
    guidance = None
    if guided:
        guidance = rng.choice((0.0, 1.0, 3.5, torch.tensor(2.0), torch.rand(batch) * 3))
    rows = 2 * batch if guided else batch
    table = torch.rand(steps, 8) * 0.9 + 0.1
    table[:, 6:] = -torch.rand(steps, 2) * 4
    if rng.random() < 0.3:
        table[:, 5] = 0
    elements = channels * math.prod(rest)
    rescale = rng.choice((0.0, 0.0, 0.7)) if guided and elements > 1 else 0.0
    arguments = dict(
        x=tensor(rng, (batch, channels, *rest), dtype, unit=True),
        model_output=tensor(rng, (rows, channels * (2 if learned else 1), *rest), dtype, unit=True),
        table=table,
        step=step_number(rng, steps),
        seeds=maybe(rng, lambda: torch.randint(0, 2**62, (batch,))),
        guidance=guidance,
        guidance_rescale=rescale,
        prediction=rng.choice(("epsilon", "sample", "v_prediction")),
        clip=rng.choice((None, 1.0, 0.5)),
        dynamic_threshold=rng.choice((None, None, 0.9, 1.0)) if elements else None,
        learned_range=learned,
        previous_x0=maybe(rng, lambda: tensor(rng, (batch, channels, *rest), dtype, unit=True)),
    )
    return arguments, ("x", "model_output", "previous_x0")


def features(rng: random.Random) -> tuple[Tensor, Tensor]:
    dtype = rng.choice(DTYPES)
    shape = (rng.choice((1, 2, 3, 17, rng.randint(1, 40))), rng.choice((1, 2, 8, 33)))
    pair = (torch.nn.functional.normalize(torch.randn(shape), dim=1) for _ in range(2))
    return tuple(value.to(dtype) for value in pair)  # type: ignore[return-value]


def scalar(rng: random.Random, value: float) -> float | Tensor:
    return rng.choice((value, torch.tensor(value), torch.tensor([value])))


def contrastive_loss(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    image, text = features(rng)
    arguments = dict(
        image_features=image, text_features=text, logit_scale=scalar(rng, rng.uniform(1, 100)),
        logit_bias=rng.choice((None, -1.0)),
    )  # fmt: skip
    return arguments, ("image_features", "text_features", "logit_scale")


def soft_contrastive_loss(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    image, text = features(rng)
    arguments = dict(image_features=image, text_features=text, logit_scale=scalar(rng, rng.uniform(1, 30)))
    return arguments, ("image_features", "text_features", "logit_scale")


def sigmoid_loss(rng: random.Random) -> tuple[dict, tuple[str, ...]]:
    image, text = features(rng)
    arguments = dict(
        image_features=image, text_features=text, logit_scale=scalar(rng, rng.uniform(1, 30)),
        logit_bias=scalar(rng, -3.0),
    )  # fmt: skip
    return arguments, ("image_features", "text_features", "logit_scale", "logit_bias")


OPS = {
    "group_norm_silu": group_norm_silu,
    "cross_attention": cross_attention,
    "sample_noise": sample_noise,
    "add_noise": add_noise,
    "diffusion_step": diffusion_step,
    "contrastive_loss": contrastive_loss,
    "soft_contrastive_loss": soft_contrastive_loss,
    "sigmoid_loss": sigmoid_loss,
}

# -------------------------------------------------------------------------------------------- wrong arguments


def spoil(call: Call, rng: random.Random) -> None:
    """Make one argument wrong in a way that no op may accept."""
    names = [key for key, value in call.arguments.items() if value is not None or key == "activation"]
    name = rng.choice(names)
    value = call.arguments[name]
    ways = {"a word": "red", "an object": object()}
    if isinstance(value, Tensor):
        others = [v for k, v in call.arguments.items() if k != name and isinstance(v, Tensor) and v.dim()]
        ways |= tensor_faults(name, value, bool(others))
        if call.op == "add_noise" and name == "x0" and call.arguments["noise"] is None:
            ways.pop("a number of dimensions", None)  # one sample of another shape is not wrong
        if call.op == "group_norm_silu" and name == "x":
            # Without tensors per channel or per sample, another shape is not wrong.
            ways.pop("a number of dimensions", None)
            if call.arguments["scale"] is None and call.arguments["shift"] is None:
                ways.pop("one size larger", None)
    elif isinstance(value, bool):
        ways = {}  # any object has a truth value
    elif isinstance(value, (int, float)):
        ways |= {"not a number": math.nan, "infinite": math.inf, "complex": 1j, "a list": [1, 2]}
        if name not in ("guidance", "logit_scale", "logit_bias", "softmax_scale"):
            ways["negative"] = -1
    elif isinstance(value, torch.dtype):
        ways |= {"an integer dtype": torch.int32, "a word": "float32"}
    elif isinstance(value, tuple):
        ways |= {"a number": 3, "empty": (), "negative": (*value[:-1], -1), "not whole": (*value[:-1], 1.5)}
    if name == "device":
        ways = {"a word": "red"}
    if name == "activation":
        ways = {"a word": "relu", "a number": 1}
    if name == "prediction":
        ways["None"] = None
    if not ways:
        return
    how = rng.choice(sorted(ways))
    call.arguments[name] = ways[how]
    call.wrong = (name, how)


def tensor_faults(name: str, value: Tensor, has_others: bool) -> dict[str, object]:
    """Replacements of an argument. has_others: whether the call has other tensors, on the CPU."""
    faults = {
        "a list": value.flatten().tolist()[:9],
        "a number of dimensions": value[None, None] if value.dim() else value.expand(1, 2),
        "complex": value.to(torch.complex64) if value.is_floating_point() else value.float(),
    }
    if has_others:
        faults["on the meta device"] = value.to("meta")
    if value.is_floating_point():
        faults["whole numbers"] = value.to(torch.int32)
        faults["boolean"] = value > 0
    else:
        faults["floating point"] = value.to(torch.float32)
    if value.dim() and value.numel():
        faults["one size larger"] = torch.cat([value, value[:1]])
        faults["sparse"] = value.to_sparse()
        faults["nested"] = torch.nested.nested_tensor([value])
    if name in ("logit_scale", "logit_bias", "guidance"):
        # A scalar may have any number of dimensions, or be a number.
        faults = {key: faults[key] for key in ("complex", "a list", "sparse", "nested") if key in faults}
    if name == "step":
        faults = {"floating point": value.to(torch.float32), "two": torch.tensor([0, 0]),
                  "sparse": value.reshape(1).to_sparse()}  # fmt: skip
    return faults
