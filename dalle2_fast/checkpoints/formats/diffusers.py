"""Karlo in the folders of diffusers: UnCLIPPipeline, UnCLIPImageVariationPipeline, or a prior alone.

The folder of a pipeline has model_index.json and, for each network, a folder with config.json and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.checkpoint import PARTS, Checkpoint, Part
from dalle2_fast.checkpoints.errors import CheckpointError, listed
from dalle2_fast.checkpoints.formats.diffusers_options import (
    SAMPLING,
    Options,
    class_name,
    image_scheduler_options,
    prior_options,
    scheduler_options,
    unet_options,
)
from dalle2_fast.checkpoints.formats.karlo_keys import diffusers_conditioning_rules, diffusers_prior_rules
from dalle2_fast.checkpoints.formats.renaming import Rules, prefixed, translate
from dalle2_fast.checkpoints.formats.unet_keys import diffusers_rules
from dalle2_fast.checkpoints.tensor_files import find_tensors, read_json, read_tensors

_SHARED = ("decoder", "text_proj", "super_res_first", "super_res_last", "decoder_scheduler",
           "super_res_scheduler", "text_encoder", "tokenizer")
PIPELINES = {  # class -> its components
    "UnCLIPPipeline": (*_SHARED, "prior", "prior_scheduler"),
    "UnCLIPImageVariationPipeline": (*_SHARED, "image_encoder", "feature_extractor"),
}
# The names of a network's weights; the first that exists is read.
WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}{suffix}"
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for variant in ("", ".fp16")
)

def read_pipeline(folder: Path, parts: Collection[str]) -> Checkpoint | None:
    """Read the folder of a pipeline; a pipeline of image variations has no prior.

    Args:
        folder: of the pipeline.
        parts: of "clip", "prior", "decoder" and "upsampler", those that are read.

    Returns:
        The checkpoint, or None for a folder without model_index.json.

    Raises:
        FileNotFoundError: a folder or file of a component is missing.
        CheckpointError: a file is damaged, or asks for what our classes do not have.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    content = read_json(index)
    if (kind := content.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{index}: expected _class_name {' or '.join(PIPELINES)}, got {kind!r}")
    components = PIPELINES[kind]
    named = {name for name, value in content.items() if isinstance(value, list) and value != [None, None]}
    if leftover := sorted(named - {*components}):
        raise CheckpointError(f"{index}: left over {listed(leftover)}: a {kind} has {', '.join(components)}")
    if missing := [name for name in components if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder}: a {kind} without the folders {', '.join(missing)}")

    tokenizer = _tokenizer(folder) if "clip" in parts else {}
    checkpoint = Checkpoint(folder, pipeline_config("diffusers", tokenizer))
    if "prior" not in components and "prior" in parts:
        checkpoint.config["prior_class"] = None
    elif "prior" in parts:
        checkpoint.add("prior", read_prior(folder / "prior", folder / "prior_scheduler"))
    if "decoder" in parts:
        decoder = read_decoder(folder / "decoder", folder / "text_proj", folder / "decoder_scheduler")
        checkpoint.add("decoder", decoder)
    if "upsampler" in parts:
        size = Options(folder / "decoder" / "config.json", ["UNet2DConditionModel"]).need("sample_size", int)
        nets = folder / "super_res_first", folder / "super_res_last"
        checkpoint.add("upsampler", read_upsampler(*nets, size, folder / "super_res_scheduler"))
    if "clip" in parts:
        checkpoint.add_clip(folder)
    return checkpoint


def read_network(folder: Path, parts: Collection[str]) -> Checkpoint | None:
    """Read the folder of a prior alone; its scheduler may lie next to it, as in a pipeline.

    Args:
        folder: of the prior.
        parts: ignored, because there is only one.

    Returns:
        The checkpoint, or None for a folder without a config.json of diffusers.

    Raises:
        FileNotFoundError: the weights are missing.
        CheckpointError: the network is no PriorTransformer, damaged, or has options that ours does not have.
    """
    config = folder / "config.json"
    if not config.is_file() or class_name(config) is None:
        return None
    places = (folder.parent / name for name in ("prior_scheduler", "scheduler"))
    scheduler = next((place for place in places if (place / "scheduler_config.json").is_file()), None)
    checkpoint = Checkpoint(folder, {"model": "DiffusionPrior"})
    checkpoint.add("prior", read_prior(folder, scheduler))
    return checkpoint


def pipeline_config(layout: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The config of a DALLE2 in another layout, before its parts are added.

    Args:
        layout: its name, for the metadata.
        tokenizer: the config of the tokenizer.
    """
    return {
        "model": "DALLE2", "prior_class": "DiffusionPrior", **dict.fromkeys(PARTS), "tokenizer": tokenizer,
        "sampling": dict(SAMPLING), "metadata": {"layout": layout},
    }  # fmt: skip


def _tokenizer(folder: Path) -> dict[str, Any]:
    from dalle2_fast.data.text.bpe import BPETokenizer

    length = read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
    try:
        return BPETokenizer.from_folder(folder / "tokenizer", length).to_config()
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None


# ----------------------------------------------------------------------------------------------- the networks


def read_prior(folder: Path, scheduler: Path | None = None) -> Part:
    """A PriorTransformer -> the arguments and weights of a DiffusionPrior.

    Args:
        folder: of the network.
        scheduler: the folder of its scheduler; None takes the published values.
    """
    config = prior_options(folder)
    if scheduler is not None:
        process, clip = scheduler_options(scheduler)
        if process.pop("variance") != "fixed_small":
            raise CheckpointError(f"{scheduler}: variance_type: expected 'fixed_small_log' for a prior")
        config |= process | {"sample_clip": clip}
    depth = config["net"]["depth"]
    return config, _weights((lambda: diffusers_prior_rules(depth), depth, folder))


def read_decoder(folder: Path, text_proj: Path, scheduler: Path | None = None) -> Part:
    """A UNet2DConditionModel and an UnCLIPTextProjModel -> the arguments and weights of a Decoder.

    Args:
        folder: of the U-Net.
        text_proj: the folder of the projections.
        scheduler: the folder of the scheduler; None takes the defaults of Decoder.
    """
    options = Options(folder / "config.json", ["UNet2DConditionModel"])
    image_size = options.need("sample_size", int)
    unet = unet_options(options, attention=True)
    projection = Options(text_proj / "config.json", ["UnCLIPTextProjModel"])
    tokens = projection.take("clip_extra_context_tokens", 4)
    width = projection.take("clip_embeddings_dim", 768)
    projection.finish({"time_embed_dim": unet["embed_dim"], "cross_attention_dim": unet["cross_dim"]})
    config = {
        "unet": unet, "image_size": image_size, "image_embed_dim": width, "text_embed_dim": width,
        "text_encoding_dim": width, "num_image_tokens": tokens, "unit_norm": False, "embed_scale": 1.0,
        "variance": "learned_range" if unet["out_channels"] == 2 * unet["in_channels"] else "fixed_small",
        "sample_timesteps": SAMPLING["steps"],
    }  # fmt: skip
    if scheduler is not None:
        config |= image_scheduler_options(scheduler)
    return config, _weights(
        (lambda: prefixed("unet.", diffusers_rules(unet)), _layers(unet), folder),
        (lambda: diffusers_conditioning_rules(tokens), 0, text_proj),
    )


def read_upsampler(
    first: Path, last: Path, low_res_size: int, scheduler: Path | None = None
) -> Part:
    """Two UNet2DModel -> the arguments and weights of an Upsampler.

    Args:
        first: the folder of the U-Net for all steps but the last.
        last: the folder of the U-Net for the last step.
        low_res_size: the side of the images that are upsampled, in pixels.
        scheduler: the folder of the scheduler; None takes the defaults of Upsampler.
    """
    options = Options(first / "config.json", ["UNet2DModel"])
    image_size = options.need("sample_size", int)
    unets = [unet_options(options, attention=False)]
    options = Options(last / "config.json", ["UNet2DModel"])
    if (size := options.take("sample_size", image_size)) != image_size:
        raise CheckpointError(f"{options.file}: sample_size: expected {image_size} or none, got {size}")
    unets.append(unet_options(options, attention=False))
    config = {
        "unet": unets[0], "last_unet": unets[1], "image_size": image_size, "low_res_size": low_res_size,
        "resize": "bicubic", "sample_timesteps": SAMPLING["upsampler_steps"],
    }  # fmt: skip
    if scheduler is not None:
        config |= image_scheduler_options(scheduler)
    return config, _weights(
        (lambda: prefixed("unet.", diffusers_rules(unets[0])), _layers(unets[0]), first),
        (lambda: prefixed("last_unet.", diffusers_rules(unets[1])), _layers(unets[1]), last),
    )


def _layers(unet: Mapping[str, Any]) -> int:
    layers = unet["layers_per_block"]
    levels = layers if isinstance(layers, list) else [layers]
    return sum(count for count in levels if isinstance(count, int))


def _weights(*networks: tuple[Callable[[], Rules], int, Path]) -> dict[str, Tensor]:
    """Our tensors, made from the weights of some networks.

    Args:
        networks: what makes the rules, the layers for which it makes them, and the folder of each network.
    """
    tensors: dict[str, Tensor] = {}
    for make_rules, layers, folder in networks:
        file = find_tensors(folder, WEIGHTS)
        theirs = read_tensors(file)
        if layers > len(theirs):  # rules for 10^9 layers would fill the memory
            limit = f"at most one for each of the {len(theirs)} tensors in {file.name}"
            raise CheckpointError(f"{folder / 'config.json'}: layers: expected {limit}, got {layers:,}")
        tensors |= translate(theirs, make_rules(), file)
    return tensors
