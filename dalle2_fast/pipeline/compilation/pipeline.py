"""DALLE2.compile: the networks of a pipeline run as compiled programs."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.pipeline.compilation import BACKENDS, store
from dalle2_fast.pipeline.compilation.inductor import Inductor
from dalle2_fast.pipeline.compilation.network import Backend, CompiledNetwork
from dalle2_fast.pipeline.compilation.openvino import OpenVINO

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2


def compile_networks(
    pipe: DALLE2,
    backend: str = "inductor",
    *,
    mode: str = "default",
    freezing: bool = False,
    cache_dir: str | PathLike | None = None,
) -> DALLE2:
    """Let the networks run as compiled programs when they sample; results differ by rounding alone.

    The diffusion prior, the decoder, the upsamplers and the image tower of CLIP are compiled, each when it
    first runs, which takes minutes in all. The programs are kept in a folder, where later processes find them
    in a fraction of a second. A program serves any number of images and any caption; for another size, dtype
    or tile another one is made. Not compiled: the text encoders, whose lengths differ from caption to caption
    and which run once per image, and an autoregressive prior. Networks that record gradients, train or run
    under autocast run uncompiled.

    Args:
        backend: "inductor", torch's compiler, which needs a C++ compiler; "openvino", for CPUs, in float32 or
            bfloat16, which needs the package openvino; or "eager", which ends compilation.
        mode: of inductor, "default" or "max-autotune", which tries several programs for each matrix product
            and compiles for much longer.
        freezing: of inductor, for CPUs: whether programs contain the weights in the layout that they read
            fastest. Otherwise a program serves all weights of a network. Those of OpenVINO always contain
            them.
        cache_dir: the folder of the programs; None is dalle2_fast/compiled in $XDG_CACHE_HOME or ~/.cache.
            What lies in it is executed: it must not be writable for others.

    Returns:
        The same pipeline.

    Raises:
        ValueError: another backend or mode, an option of another backend, or weights of a device or dtype
            that the backend does not take.
        ImportError: openvino is not installed.
        RuntimeError: torch is too old; or, when a network first runs, there is no C++ compiler.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> pipe = DALLE2.from_pretrained(device="cpu").compile()  # the first images take minutes
        >>> pipe = pipe.compile("eager")  # as before
    """
    if backend not in (*BACKENDS, "eager"):
        raise ValueError(f"backend: expected {', '.join(BACKENDS)} or eager, got {backend!r}")
    compiler: Backend | None = None
    if backend == "inductor":
        compiler = Inductor(mode, freezing)
    elif mode != "default" or freezing:
        raise ValueError(f"mode, freezing: expected with the backend inductor alone, got {backend!r}")
    elif backend == "openvino":
        compiler = OpenVINO()
    folder = store.default_folder() if cache_dir is None else Path(cache_dir).expanduser()
    networks = list(networks_of(pipe))
    for network, _, _ in networks if compiler is not None else []:
        compiler.check(network)
    for network, name, config in networks:
        if compiler is None:
            network.__dict__.pop(name, None)
        else:
            setattr(network, name, CompiledNetwork(network, name, config, compiler, folder))
    return pipe


def networks_of(pipe: DALLE2) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
    """(network, name of its method, its configuration) of each network that is compiled."""
    if pipe.clip.visual is not None:
        yield pipe.clip.visual, "forward", pipe.clip.config
    if isinstance(pipe.prior, DiffusionPrior):
        yield pipe.prior.net, "denoise", pipe.prior.net.config
    for part in (pipe.decoder, pipe.upsampler, pipe.upsampler2):
        for unet in (getattr(part, "unet", None), getattr(part, "last_unet", None)):
            if unet is not None:
                yield unet, "forward", unet.config
