"""Rows of a CPU at the sizes of the checkpoint in the package: ops, networks, training steps, the whole job.

Every row exists in float32 and in bfloat16, where its op or its rivals have both. All rivals compute with
the same weights. "eager" and "reference" are torch's own ops, of an op and of a network. "compile",
"max-autotune" and "freezing" are torch.compile of them; the last has the weights as constants. OpenVINO and
ONNX Runtime get the network from torch.export and use as many threads as torch.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import group_norm_silu
from benchmarks.cases.cross_attention import attention_inputs, attention_ours, attention_sdpa
from benchmarks.cases.diffusion_step import step_eager, step_inputs, step_ours
from benchmarks.cases.networks import forward, unet_loss
from benchmarks.cases.registry import Case, add, compiled, needs, op_implementation, rounded_randn
from benchmarks.cases.rival_networks import RivalNetwork, copy_unet_weights, diffusers_unet, noise_loss
from benchmarks.cases.sizes import parameter_count, seeded_network
from benchmarks.cases.training_steps import step
from dalle2_fast import DALLE2, UNet, functional
from dalle2_fast.models.implementation import implementation
from dalle2_fast.pipeline.compilation.network import CompiledNetwork
from dalle2_fast.pipeline.compilation.openvino import OpenVINO
from dalle2_fast.pipeline.exporting.runtimes import Onnx

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPTION = "a large red circle above a small blue square on a navy background"
CONFIGS = dict(
    decoder=dict(in_channels=3, out_channels=3, channels=(112, 144), layers_per_block=2,
                 attention_levels=(1,), head_dim=48, cross_dim=192, embed_dim=384, patch_size=2,
                 num_groups=16),
    upsampler=dict(in_channels=6, out_channels=3, channels=(48, 80), layers_per_block=2, attention_levels=(),
                   cross_dim=None, embed_dim=192, patch_size=4, num_groups=8),
)  # fmt: skip


def title(name: str, dtype: str) -> str:
    return f"{name} (CPU, {dtype})"


# ---------------------------------------------------------------------------------------------------- the ops


def norm_inputs(shape, groups, gradient, dtype, device, _, tiny):
    made = group_norm_silu.norm_inputs(shape, True, True, gradient, device, dtype, tiny)
    return made | dict(groups=2 if tiny else groups)


def norm_ours(impl, x, weight, bias, scale, shift, groups):
    return functional.group_norm_silu(x, groups, weight, bias, 1e-5, scale, shift, "silu", impl)


def norm_of_torch(x, weight, bias, scale, shift, groups):
    return F.silu(group_norm_silu.film_eager(F.group_norm(x, groups, weight, bias, 1e-5), scale, shift))


def conv_inputs(shape, channels_out, upsample, dtype, device, _, tiny):
    n, c, h, w = (1, 6, 5, 4) if tiny else shape
    channels_out = 4 if tiny else channels_out
    randn = rounded_randn(device, dtype)
    factor = 2 if upsample else 1
    x, residual = (
        tensor.contiguous(memory_format=torch.channels_last)
        for tensor in (randn(n, c, h, w), randn(n, channels_out, factor * h, factor * w))
    )
    weight = randn(channels_out, c, 3, 3) / (3 * c**0.5)
    return dict(x=x, weight=weight, bias=randn(channels_out), residual=residual, upsample=upsample)


def conv_ours(impl, **inputs):
    return functional.conv3x3(**inputs, impl=impl)


def conv_of_torch(x, weight, bias, residual, upsample):
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    return F.conv2d(x, weight, bias, padding=1) + residual


def add_op(name, make, ours, eager, *, bytes, flops=0, dtypes=tuple(DTYPES), **more):
    for dtype in dtypes:
        add(
            Case(
                title(name, dtype),
                functools.partial(make, DTYPES[dtype]),
                ours,
                {"eager": eager, "compile": compiled(eager)},
                bytes=bytes * DTYPES[dtype].itemsize,
                flops=flops,
                device="cpu",
                **more,
            )
        )


def add_ops() -> None:
    for shape, groups in (((16, 112, 32, 32), 16), ((4, 48, 64, 64), 8)):
        count = torch.Size(shape).numel()
        at = ",".join(map(str, shape))
        for gradient in (False, True):
            more = dict(target_factors={"eager": 5.0, "compile": 2.0}, target_share=0.7)
            if gradient:
                more = dict(target_factors={"eager": 4.0}, backward=("x", "weight", "bias", "scale", "shift"))
            add_op(f"norm film silu {'backward' if gradient else 'forward'} {at}",
                   functools.partial(norm_inputs, shape, groups, gradient), norm_ours, norm_of_torch,
                   bytes=(3 if gradient else 2) * count, **more)  # fmt: skip
    for (n, c, h, w), out, upsample in (((16, 112, 32, 32), 112, False), ((16, 144, 16, 16), 144, True),
                                        ((4, 48, 64, 64), 48, False)):  # fmt: skip
        pixels = n * h * w * (4 if upsample else 1)
        name = f"conv3x3{' upsampled' * upsample} {n},{c},{h},{w}"
        make = functools.partial(conv_inputs, (n, c, h, w), out, upsample)
        add_op(name, make, conv_ours, conv_of_torch, bytes=n * c * h * w + 2 * pixels * out,
               flops=18 * pixels * c * out, dtypes=("fp32",))  # fmt: skip

    def attention(dtype, device, _, tiny):
        return attention_inputs(16, 3, 256, 40, 48, True, True, False, device, dtype, tiny)

    add_op("cross-attention 16,3,256,40+256,48", attention, attention_ours, attention_sdpa,
           bytes=16 * 3 * 48 * (4 * 256 + 2 * 40), flops=4 * 16 * 3 * 48 * 256 * 296)  # fmt: skip

    def update(dtype, device, _, tiny):
        return step_inputs(8, 64, False, device, dtype, tiny)

    add_op("diffusion step 8,3,64,64", update, functools.partial(step_ours, False),
           functools.partial(step_eager, False), bytes=8 * 3 * 64 * 64 * 6,
           checked_outputs=(1,))  # fmt: skip


# ----------------------------------------------------------------------------------------------- the networks


class Compiled:
    """torch.compile of our network with the references of the ops, which it fuses itself.

    gives(output, inputs): what is computed of the network's output, outside the program.
    """

    compiles = network = True

    def __init__(self, gives: Callable, freezing: bool = False, autotune: bool = False):
        self.gives, self.options = gives, dict(freezing=freezing, max_autotune=autotune)
        self.programs = weakref.WeakKeyDictionary()

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        from torch._inductor import config

        if net not in self.programs:
            torch._dynamo.reset()  # it keeps the programs of a few networks only
            self.programs[net] = torch.compile(type(net).forward, dynamic=False)
        with implementation(net, "reference"), config.patch(self.options):
            return self.gives(self.programs[net](net, **inputs), inputs)


class WithOpenVINO:
    """The network in OpenVINO. Its programs are built by the code of `DALLE2.compile`."""

    compiles = network = True

    def __init__(self) -> None:
        self.programs = weakref.WeakKeyDictionary()

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        if net not in self.programs:
            folder = tempfile.TemporaryDirectory()
            own = copy.deepcopy(net)  # a program that held `net` would keep it in the dictionary for ever
            self.programs[net] = CompiledNetwork(own, "forward", {}, OpenVINO(), Path(folder.name)), folder
        with torch.no_grad():
            return self.programs[net][0](**inputs)


class WithOnnxRuntime:
    """The network in ONNX Runtime."""

    compiles = network = True

    def __init__(self) -> None:
        self.sessions = weakref.WeakKeyDictionary()

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        import onnxruntime

        if net not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            with tempfile.TemporaryDirectory() as folder, implementation(net, "reference"):
                path = Path(folder) / "network.onnx"
                Onnx().write(net, inputs, ("output",), path)
                providers = ["CPUExecutionProvider"]
                self.sessions[net] = onnxruntime.InferenceSession(path, options, providers=providers)
        given = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(self.sessions[net].run(None, given)[0])


class OnPatches(nn.Module):
    """diffusers' U-Net has no patches: pixels become channels before it, and channels pixels after it."""

    def __init__(self, net: UNet):
        super().__init__()
        self.patch_size, area, levels = net.patch_size, net.patch_size**2, len(net.config["channels"])
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
        if net.cross_dim is not None:
            down, up = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
        self.unet = diffusers_unet(
            net, in_channels=net.in_channels * area, out_channels=net.out_channels * area,
            time_embedding_dim=net.embed_dim, resnet_time_scale_shift="scale_shift",
            down_block_types=("ResnetDownsampleBlock2D", *[down] * (levels - 1)),
            up_block_types=(*[up] * (levels - 1), "ResnetUpsampleBlock2D"),
        )  # fmt: skip

    def forward(self, sample: Tensor, **inputs) -> Tensor:
        patches = self.unet(F.pixel_unshuffle(sample, self.patch_size), **inputs).sample
        return F.pixel_shuffle(patches, self.patch_size)


def copy_weights(net: UNet, theirs: OnPatches) -> None:
    copy_unet_weights(net, theirs.unet)


def output_alone(output: Tensor, inputs: dict) -> Tensor:
    return output


def loss_of(output: Tensor, inputs: dict) -> Tensor:
    return noise_loss(output, inputs["sample"])


def training_step(impl: str, net: UNet, **inputs) -> Tensor:
    return step(net, lambda: unet_loss(impl, net, **inputs))


class Step:
    """A training step of a rival: its loss, the gradient and AdamW."""

    def __init__(self, loss: Callable):
        self.loss = loss
        self.compiles = self.network = getattr(loss, "compiles", False)

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        trained = self.loss.ready(dict(net=net)) if hasattr(self.loss, "ready") else net
        return step(trained, lambda: self.loss(net, **inputs))


def built(name: str, device: str, dtype: torch.dtype, **changes) -> UNet:
    return seeded_network(lambda _: UNet(**CONFIGS[name] | changes), None, device, dtype)


def network_inputs(name: str, batch: int, dtype, device, _, tiny) -> dict:
    changes = dict(channels=(8, 16), layers_per_block=1, head_dim=8, embed_dim=32, num_groups=4)
    net = built(name, device, dtype, **(changes if tiny else {}))
    randn = rounded_randn(device, dtype)
    rows, side = (2, 16) if tiny else (batch, 64 if net.cross_dim else 256)
    given = dict(net=net, sample=randn(rows, net.in_channels, side, side),
                 timestep=torch.arange(1, rows + 1, device=device) * 7.0)  # fmt: skip
    if net.cross_dim:
        tokens = 20  # words of a caption and parts of the image embedding
        lengths = torch.arange(rows, device=device) % 8 + tokens - 8
        given |= dict(encoder_hidden_states=randn(rows, tokens, net.cross_dim),
                      class_labels=randn(rows, net.embed_dim),
                      attention_mask=torch.arange(tokens, device=device) < lengths[:, None])  # fmt: skip
    return given


def add_network(name: str, batch: int, dtype: str) -> None:
    diffusers = RivalNetwork(OnPatches, copy_weights, lambda net, **inputs: net(**inputs))
    onnx = needs("onnxruntime", WithOnnxRuntime()) if dtype == "fp32" else "it has no bfloat16 on a CPU"
    add(
        Case(
            title(f"{name} of the package, batch {batch}", dtype),
            functools.partial(network_inputs, name, batch, DTYPES[dtype]),
            forward,
            {"reference": functools.partial(forward, "reference"),
             "diffusers": needs("diffusers", diffusers),
             "compile": Compiled(output_alone), "max-autotune": Compiled(output_alone, autotune=True),
             "freezing": Compiled(output_alone, freezing=True),
             "openvino": needs("openvino", WithOpenVINO()), "onnxruntime": onnx},
            bytes=lambda: parameters(name) * DTYPES[dtype].itemsize,
            flops=lambda: flops(name, batch),
            images=batch,
            device="cpu",
            target_factors={"compile": 1.2, "max-autotune": 1.2, "freezing": 1.2, "openvino": 1.1},
        )
    )  # fmt: skip


def add_training_step(name: str, batch: int) -> None:
    diffusers = RivalNetwork(OnPatches, copy_weights, lambda net, **inputs: loss_of(net(**inputs), inputs))
    add(
        Case(
            title(f"{name} training step of the package, batch {batch}", "fp32"),
            functools.partial(network_inputs, name, batch, torch.float32),
            training_step,
            {"reference": Step(functools.partial(unet_loss, "reference")),
             "diffusers": needs("diffusers", Step(diffusers)), "compile": Step(Compiled(loss_of))},
            bytes=lambda: 40 * parameters(name),
            flops=lambda: 3 * flops(name, batch),
            images=batch,
            device="cpu",
            same_bits=False,
            wall_clock=True,
            calls=1,
            target_factors={"reference": 1.4, "compile": 1.2},
        )
    )  # fmt: skip


@functools.cache
def parameters(name: str) -> int:
    return parameter_count(built(name, "meta", torch.float32))


@functools.cache
def flops(name: str, batch: int) -> int:
    """FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        forward("reference", **network_inputs(name, batch, torch.float32, "meta", None, False))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------- the job


def job_inputs(dtype, device, _, tiny) -> dict:
    settings = dict(steps=2, prior_steps=2, upsampler_steps=2, candidates=1) if tiny else {}
    pipe = DALLE2.from_pretrained(device=device, dtype=torch.float32 if tiny else dtype)
    return dict(pipe=pipe, images=1 if tiny else 4, settings=settings)


def job(impl: str, pipe: DALLE2, images: int, settings: dict) -> Tensor:
    with op_implementation(impl):
        made = pipe.generate(CAPTION, images, seed=0, **settings).images
    return made.double() if pipe.dtype == torch.float64 else made


class CompiledJob:
    """Our pipeline with its networks compiled, without our ops in them."""

    compiles = network = True

    def __init__(self, backend: str, **options):
        self.backend, self.options = backend, options
        self.pipelines = weakref.WeakKeyDictionary()

    def __call__(self, pipe: DALLE2, images: int, settings: dict) -> Tensor:
        if pipe not in self.pipelines:
            self.pipelines[pipe] = copy.deepcopy(pipe).compile(self.backend, **self.options)
        return job("reference", self.pipelines[pipe], images, settings)


def add_job(dtype: str) -> None:
    case_title = title("caption to 256 px with the package, 4 images", dtype)
    add(
        Case(
            case_title,
            functools.partial(job_inputs, DTYPES[dtype]),
            job,
            {"reference": functools.partial(job, "reference"),
             "inductor": CompiledJob("inductor"), "freezing": CompiledJob("inductor", freezing=True),
             "openvino": needs("openvino", CompiledJob("openvino"))},
            bytes=lambda: (parameters("decoder") + parameters("upsampler")) * DTYPES[dtype].itemsize,
            # 2 candidates of each image, with guidance; 12 and 10 steps
            flops=lambda: 12 * flops("decoder", 16) + 10 * flops("upsampler", 4),
            images=4,
            device="cpu",
            wall_clock=True,
            calls=1,
            # Bfloat16's errors grow over the steps beyond what the ops add.
            make_check=lambda device, _: job_inputs(torch.float32, device, None, True),
        )
    )  # fmt: skip


add_ops()
for dtype in DTYPES:
    add_network("decoder", 16, dtype)
    add_network("upsampler", 4, dtype)
add_training_step("decoder", 16)
add_training_step("upsampler", 4)
for dtype in DTYPES:
    add_job(dtype)
