"""The configuration files of diffusers' networks and schedulers -> the arguments of our classes.

A configuration that asks for what our classes do not have is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.tensor_files import read_json

# The defaults of a call of diffusers' pipeline.
SAMPLING = {
    "steps": 25,
    "guidance": 8.0,
    "prior_steps": 25,
    "prior_guidance": 4.0,
    "prior_candidates": 1,
    "negative_prompt": "",
    "upsampler_steps": 7,
    "sampler": "ddpm",
}
_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}  # class -> has attention
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# The values of options that describe what our networks do; an option that is present must have this value.
_SAME_PRIOR = {
    "dropout": 0.0, "time_embed_act_fn": "silu", "norm_in_type": None, "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear", "added_emb_type": "prd", "additional_embeddings": 4,
}  # fmt: skip
_SAME_UNET = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "norm_eps": 1e-5,
    "transformer_layers_per_block": 1, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "downsample_type": "conv",
    "upsample_type": "conv", "addition_embed_type_num_heads": 64,
}  # fmt: skip
_SAME_SCHEDULER = {"beta_schedule": "squaredcos_cap_v2"}


def class_name(file: Path) -> str | None:
    """The `_class_name` in a config.json of diffusers, None for any other content."""
    try:
        return read_json(file).get("_class_name")
    except CheckpointError:  # whoever needs the content raises again
        return None


class Options:
    """The options in one configuration file, removed one by one; `finish` checks that none is ignored.

    Args:
        file: the configuration, a JSON object.
        kinds: the classes that are expected as _class_name.

    Raises:
        CheckpointError: the file is damaged, or of another class.
    """

    def __init__(self, file: Path, kinds: Collection[str]) -> None:
        self.file, self.values = file, read_json(file)
        if (kind := self.values.get("_class_name")) not in kinds:
            raise CheckpointError(f"{file}: expected _class_name {' or '.join(kinds)}, got {kind!r}")
        self.values = {name: value for name, value in self.values.items() if not name.startswith("_")}

    def take(self, name: str, default: Any = None) -> Any:
        """Remove and return an option; `default` if it is missing or null."""
        value = self.values.pop(name, default)
        return default if value is None else value

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Remove and return an option; CheckpointError if it is missing or of another type."""
        value = self.values.pop(name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {name}: expected {_kind(kind)}, got {value!r}")
        return value

    def finish(self, expected: Mapping[str, Any]) -> None:
        """Raise CheckpointError if an option is left that our class does not have.

        Args:
            expected: option -> the only value that our class has. Another option may only be None or False.
        """
        for name, value in self.values.items():
            wanted = expected.get(name)
            if value != wanted and not (name not in expected and (value is None or value is False)):
                raise CheckpointError(
                    f"{self.file}: {name}: this library has no such option, or only the value {wanted!r}; "
                    f"got {value!r}"
                )


def prior_options(folder: Path) -> dict[str, Any]:
    """The configuration of a PriorTransformer in `folder` -> the arguments of our DiffusionPrior."""
    options = Options(folder / "config.json", ["PriorTransformer"])
    heads, dim_head = options.need("num_attention_heads", int), options.need("attention_head_dim", int)
    depth, embed_dim = options.need("num_layers", int), options.need("embedding_dim", int)
    dim, context_length = heads * dim_head, options.need("num_embeddings", int)
    widths = {"time_embed_dim": dim, "embedding_proj_dim": embed_dim, "clip_embed_dim": embed_dim}
    unset = {name: None for name in widths if options.values.get(name) is None}
    options.finish(_SAME_PRIOR | widths | unset)
    return {
        "net": {
            "dim": dim, "depth": depth, "heads": heads, "dim_head": dim_head, "embed_dim": embed_dim,
            "text_dim": embed_dim, "context_length": context_length, "mlp_ratio": 4.0,
        },
        "sample_timesteps": SAMPLING["prior_steps"], "unit_norm": False, "embed_scale": 1.0,
        "timesteps": 1000, "prediction": "sample", "sample_clip": 5.0,
    }  # fmt: skip


def unet_options(options: Options, attention: bool) -> dict[str, Any]:
    """The configuration of a U-Net -> the arguments of our UNet.

    Args:
        options: of the U-Net.
        attention: True for a decoder, False for an upsampler, which has no attention.
    """
    channels = options.need("block_out_channels", list)
    layers = options.need("layers_per_block", (int, list))
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    blocks = {}
    for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        blocks[name] = options.need(name, list)
        if strangers := [kind for kind in blocks[name] if kind not in known]:
            expected = " or ".join(known)
            raise CheckpointError(f"{options.file}: {name}: expected {expected}, got {strangers[0]}")
    attends = [_DOWN[kind] for kind in blocks["down_block_types"]]
    if [_UP[kind] for kind in reversed(blocks["up_block_types"])] != attends or len(attends) != len(channels):
        raise CheckpointError(
            f"{options.file}: up_block_types: expected the mirror image of down_block_types, one per level "
            f"of {channels}, got {blocks['up_block_types']}"
        )
    scale_shift = options.take("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        raise CheckpointError(
            f"{options.file}: resnet_time_scale_shift: expected 'default' or 'scale_shift', "
            f"got {scale_shift!r}"
        )
    middle = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn" if any(attends) else "UNetMidBlock2D"}
    unet = {
        "in_channels": options.need("in_channels", int),
        "out_channels": options.need("out_channels", int),
        "channels": channels,
        "layers_per_block": layers,
        "attention_levels": [level for level, here in enumerate(attends) if here],
        "cross_dim": options.need("cross_attention_dim", int) if attention else None,
        "embed_dim": options.take("time_embedding_dim", 4 * channels[0]),
        "num_groups": options.take("norm_num_groups", 32),
        "film": scale_shift == "scale_shift",
    }
    head_dim = options.take("attention_head_dim", 8)
    if attention:
        heads = head_dim if isinstance(head_dim, list) else [head_dim] * len(channels)
        unet["head_dim"] = heads[0] if len(set(heads)) == 1 else heads
        options.finish(_SAME_UNET | middle | {"class_embed_type": "identity"})
    else:
        if options.take("add_attention", True) or any(attends):
            raise CheckpointError(f"{options.file}: add_attention: expected an upsampler without attention")
        options.finish(_SAME_UNET | middle)
    return unet


def scheduler_options(folder: Path) -> tuple[dict[str, Any], float | None]:
    """The configuration of an UnCLIPScheduler in `folder`.

    Returns:
        The arguments of our classes, and the bound of the predicted data (None: no bound).
    """
    options = Options(folder / "scheduler_config.json", ["UnCLIPScheduler"])
    variance = options.take("variance_type", "fixed_small_log")
    variances = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}
    if variance not in variances:
        raise CheckpointError(
            f"{options.file}: variance_type: expected one of {', '.join(variances)}, got {variance!r}"
        )
    process = {
        "schedule": "cosine",
        "timesteps": options.take("num_train_timesteps", 1000),
        "prediction": options.take("prediction_type", "epsilon"),
        "variance": variances[variance],
    }
    bound = options.take("clip_sample_range", 1.0) if options.take("clip_sample", True) else None
    options.finish(_SAME_SCHEDULER)
    return process, bound


def image_scheduler_options(folder: Path) -> dict[str, Any]:
    """The same for a scheduler of images, whose bound must be 1."""
    process, bound = scheduler_options(folder)
    if bound != 1.0:
        raise CheckpointError(f"{folder}: clip_sample_range: expected 1 for images, got {bound}")
    return process


def _kind(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join({int: "an integer", list: "a list"}[one] for one in kinds)
