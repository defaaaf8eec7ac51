"""diffusers' names of arguments, and its kinds of results, for the methods of DALLE2."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dalle2_fast.data.images import to_pil

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image
    from torch import Tensor


NAMES = {  # of StableDiffusionPipeline and UnCLIPPipeline -> ours
    "num_inference_steps": "steps",
    "decoder_num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "decoder_guidance_scale": "guidance",
    "num_images_per_prompt": "num_images",
    "prior_num_inference_steps": "prior_steps",
    "prior_guidance_scale": "prior_guidance",
    "super_res_num_inference_steps": "upsampler_steps",
}
OUTPUT_TYPES = ("pt", "np", "pil")

P = ParamSpec("P")
R = TypeVar("R")


def convert_images(images: Tensor, output_type: str) -> Tensor | numpy.ndarray | list[Image]:
    """Images in the form that a caller wants.

    Args:
        images: float32 [B, 3, S, S] in [0, 1].
        output_type: "pt" for the tensor, "np" for float32 [B, S, S, 3] in NumPy, "pil" for B PIL images.

    Example:
        >>> import torch
        >>> convert_images(torch.rand(2, 3, 8, 8), "np").shape
        (2, 8, 8, 3)
    """
    if output_type == "pil":
        return to_pil(images)
    return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


def check_output_type(output_type: str) -> None:
    """ValueError for an output_type that is not one of OUTPUT_TYPES."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected 'pt', 'np' or 'pil', got {output_type!r}")


def accept_names(method: Callable[P, R]) -> Callable[P, R]:
    """`method` of DALLE2, whose keywords may have diffusers' names.

    Raises:
        TypeError: an argument is given under two names.
    """
    parameters = list(inspect.signature(method).parameters)

    @functools.wraps(method)
    def renamed(*args: P.args, **options: P.kwargs) -> R:
        return method(*args, **_rename(options, parameters[: len(args)]))

    return renamed


def accept_output_type(method: Callable[P, R]) -> Callable[P, R]:
    """`method` of DALLE2 that returns a Generation, with the argument `output_type` for its images."""

    @functools.wraps(method)
    def converted(*args: P.args, **options: P.kwargs) -> R:
        output_type = options.pop("output_type", "pt")
        check_output_type(output_type)
        made = method(*args, **options)
        return made if output_type == "pt" else replace(made, images=convert_images(made.images, output_type))

    return converted


def like_diffusers(method: Callable[P, R]) -> Callable[P, R]:
    """Both of `accept_names` and `accept_output_type`."""
    return accept_output_type(accept_names(method))


def _rename(options: dict[str, Any], positional: Sequence[str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    given = dict.fromkeys(positional)  # our name -> the name under which it was given
    for name, value in options.items():
        ours = NAMES.get(name, name)
        if ours in given:
            both = f"{given[ours] or ours}, {name}"
            raise TypeError(f"{both}: expected one of the two, because both are the argument {ours!r}")
        given[ours] = name
        renamed[ours] = value
    return renamed
