"""diffusers' folders of Karlo: UnCLIPPipeline, UnCLIPImageVariationPipeline, and each network on its own.

A pipeline's folder has model_index.json and a folder for each network, with config.json and its weights. What
is read becomes the config and the tensors of a checkpoint of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, listed
from dalle2_fast.checkpoints.formats.renaming import Rules, Taken, same, stacked, translate, under
from dalle2_fast.checkpoints.formats.unet_keys import diffusers_rules
from dalle2_fast.checkpoints.tensor_files import find_tensors, read_json, read_tensors

Part = tuple[dict[str, Any], dict[str, Tensor]]  # the arguments of our class, and its weights

_SHARED = ("decoder", "text_proj", "super_res_first", "super_res_last", "decoder_scheduler",
           "super_res_scheduler", "text_encoder", "tokenizer")
PIPELINES = {  # and their components
    "UnCLIPPipeline": (*_SHARED, "prior", "prior_scheduler"),
    "UnCLIPImageVariationPipeline": (*_SHARED, "image_encoder", "feature_extractor"),
}
# The names under which a network's weights are looked for, in this order.
WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}{suffix}"
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for variant in ("", ".fp16")
)
# What a call of diffusers' pipeline uses when it says nothing.
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
_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}  # attends?
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# What our networks do, which the options of theirs must say, too, if they say anything.
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


class Options:
    """The options of one network of theirs, taken one by one; none may be left that says something else."""

    def __init__(self, file: Path, kinds: Collection[str]) -> None:
        self.file, self.values = file, read_json(file)
        if (kind := self.values.get("_class_name")) not in kinds:
            raise CheckpointError(f"{file}: expected _class_name {' or '.join(kinds)}, got {kind!r}")
        self.values = {name: value for name, value in self.values.items() if not name.startswith("_")}

    def take(self, name: str, default: Any = None) -> Any:
        value = self.values.pop(name, default)
        return default if value is None else value

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self.values.pop(name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {name}: expected {_kind(kind)}, got {value!r}")
        return value

    def finish(self, expected: Mapping[str, Any]) -> None:
        """CheckpointError for an option that our network does not have. One that is off says nothing."""
        for name, value in self.values.items():
            wanted = expected.get(name)
            if value != wanted and not (name not in expected and (value is None or value is False)):
                raise CheckpointError(
                    f"{self.file}: {name}: this library has no such option, or only the value {wanted!r}; "
                    f"got {value!r}"
                )


def read_pipeline(folder: Path, parts: Collection[str]) -> tuple[dict[str, Part], dict[str, Any]]:
    """({part: (arguments of our class, its weights)}, the tokenizer's config) of "prior", "decoder" and
    "upsampler", those in `parts`; a pipeline of image variations has no prior."""
    index = folder / "model_index.json"
    content = read_json(index)
    if (kind := content.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{index}: expected _class_name {' or '.join(PIPELINES)}, got {kind!r}")
    components = PIPELINES[kind]
    named = {name for name, value in content.items() if isinstance(value, list) and value != [None, None]}
    if leftover := sorted(named - {*components}):
        raise CheckpointError(f"{index}: left over {listed(leftover)}: a {kind} has {', '.join(components)}")
    if missing := [name for name in components if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{folder}: a {kind} without the folders {', '.join(missing)}")
    found: dict[str, Part] = {}
    if "prior" in parts and "prior" in components:
        found["prior"] = read_prior(folder / "prior", folder / "prior_scheduler")
    if "decoder" in parts:
        found["decoder"] = read_decoder(
            folder / "decoder", folder / "text_proj", folder / "decoder_scheduler"
        )
    if "upsampler" in parts:
        size = Options(folder / "decoder" / "config.json", ["UNet2DConditionModel"]).need("sample_size", int)
        found["upsampler"] = read_upsampler(
            folder / "super_res_first", folder / "super_res_last", size, folder / "super_res_scheduler"
        )
    return found, _tokenizer(folder) if "clip" in parts else {}


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
    """A PriorTransformer -> DiffusionPrior."""
    options = Options(folder / "config.json", ["PriorTransformer"])
    heads, dim_head = options.need("num_attention_heads", int), options.need("attention_head_dim", int)
    depth, embed_dim = options.need("num_layers", int), options.need("embedding_dim", int)
    dim = heads * dim_head
    context_length = options.need("num_embeddings", int)
    options.finish(
        _SAME_PRIOR
        | {"time_embed_dim": dim, "embedding_proj_dim": embed_dim, "clip_embed_dim": embed_dim}
        | {name: None for name in ("time_embed_dim", "embedding_proj_dim", "clip_embed_dim")
           if options.values.get(name) is None}
    )
    config = {
        "net": {
            "dim": dim, "depth": depth, "heads": heads, "dim_head": dim_head, "embed_dim": embed_dim,
            "text_dim": embed_dim, "context_length": context_length, "mlp_ratio": 4.0,
        },
        "sample_timesteps": SAMPLING["prior_steps"], "unit_norm": False, "embed_scale": 1.0,
        "timesteps": 1000, "prediction": "sample", "sample_clip": 5.0,
    }  # fmt: skip
    if scheduler is not None:
        process, clip = read_scheduler(scheduler)
        if process.pop("variance") != "fixed_small":
            raise CheckpointError(f"{scheduler}: variance_type: expected 'fixed_small_log' for a prior")
        config |= process | {"sample_clip": clip}
    file = find_tensors(folder, WEIGHTS)
    return config, translate(read_tensors(file), prior_rules(depth), file)


def prior_rules(depth: int) -> Rules:
    """DiffusionPrior's tensors from those of a PriorTransformer."""
    rules = (
        same("time_embedding.0", "time_embedding.linear_1")
        | same("time_embedding.2", "time_embedding.linear_2")
        | same("proj_in", "proj_in")
        | same("text_embed_proj", "embedding_proj")
        | same("text_encodings_proj", "encoder_hidden_states_proj")
        | same("ln_final", "norm_out")
        | same("proj_out", "proj_to_clip_embeddings")
    )
    rules["query"] = Taken(("prd_embedding",), lambda x: x.flatten())
    rules["positional_embedding"] = Taken(("positional_embedding",), lambda x: x.flatten(0, 1))
    for block in range(depth):
        ours, theirs = f"transformer.resblocks.{block}", f"transformer_blocks.{block}"
        rules |= same(f"{ours}.ln_1", f"{theirs}.norm1") | same(f"{ours}.ln_2", f"{theirs}.norm3")
        fused = stacked("x", *(f"{theirs}.attn1.to_{part}" for part in "qkv"))
        rules |= {f"{ours}.attn.in_proj_{kind}": fused[f"x.{kind}"] for kind in ("weight", "bias")}
        rules |= same(f"{ours}.attn.out_proj", f"{theirs}.attn1.to_out.0")
        rules |= same(f"{ours}.mlp.c_fc", f"{theirs}.ff.net.0.proj")
        rules |= same(f"{ours}.mlp.c_proj", f"{theirs}.ff.net.2")
    statistics = {name: Taken((name,), lambda x: x.flatten()) for name in ("clip_mean", "clip_std")}
    return under("net.", rules) | statistics


def read_decoder(folder: Path, text_proj: Path, scheduler: Path | None = None) -> Part:
    """A UNet2DConditionModel and its UnCLIPTextProjModel -> Decoder."""
    options = Options(folder / "config.json", ["UNet2DConditionModel"])
    image_size = options.need("sample_size", int)
    unet = _read_unet(options, attention=True)
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
        config |= _image_process(scheduler)
    weights = translate_all(
        ("unet.", diffusers_rules(unet), find_tensors(folder, WEIGHTS)),
        ("text_proj.", text_proj_rules(tokens), find_tensors(text_proj, WEIGHTS)),
    )
    return config, weights


def text_proj_rules(tokens: int) -> Rules:
    """ConditionProjection's tensors from those of an UnCLIPTextProjModel."""
    return {
        **same("image_to_time", "clip_image_embeddings_project_to_time_embeddings"),
        **same("image_to_tokens", "clip_extra_context_tokens_proj", token_after_token(tokens)),
        **same("text_to_time", "embedding_proj"),
        **same("text_to_context", "encoder_hidden_states_proj"),
        **same("text_norm", "text_encoder_hidden_states_norm"),
        "null_image_embed": Taken(("learned_classifier_free_guidance_embeddings",)),
    }


def token_after_token(tokens: int):
    """Rows [width, tokens] -> [tokens, width]: Karlo's context tokens lie side by side in the projection."""
    return lambda rows: rows.unflatten(0, (-1, tokens)).transpose(0, 1).flatten(0, 1)


def read_upsampler(
    first: Path, last: Path, low_res_size: int, scheduler: Path | None = None
) -> Part:
    """Two UNet2DModel, the second for the last step -> Upsampler."""
    options = Options(first / "config.json", ["UNet2DModel"])
    image_size = options.need("sample_size", int)
    unets = [_read_unet(options, attention=False)]
    options = Options(last / "config.json", ["UNet2DModel"])
    if (size := options.take("sample_size", image_size)) != image_size:
        raise CheckpointError(f"{options.file}: sample_size: expected {image_size} or none, got {size}")
    unets.append(_read_unet(options, attention=False))
    config = {
        "unet": unets[0], "last_unet": unets[1], "image_size": image_size, "low_res_size": low_res_size,
        "resize": "bicubic", "sample_timesteps": SAMPLING["upsampler_steps"],
    }  # fmt: skip
    if scheduler is not None:
        config |= _image_process(scheduler)
    weights = translate_all(
        ("unet.", diffusers_rules(unets[0]), find_tensors(first, WEIGHTS)),
        ("last_unet.", diffusers_rules(unets[1]), find_tensors(last, WEIGHTS)),
    )
    return config, weights


def translate_all(*parts: tuple[str, Rules, Path]) -> dict[str, Tensor]:
    """Our prefix, the rules and the file of each network -> one dict of tensors."""
    tensors = {}
    for prefix, rules, file in parts:
        tensors |= {prefix + name: x for name, x in translate(read_tensors(file), rules, file).items()}
    return tensors


def read_scheduler(folder: Path) -> tuple[dict[str, Any], float | None]:
    """An UnCLIPScheduler -> arguments of our classes, and the bound of the predicted data."""
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


def _image_process(scheduler: Path) -> dict[str, Any]:
    process, bound = read_scheduler(scheduler)
    if bound != 1.0:
        raise CheckpointError(f"{scheduler}: clip_sample_range: expected 1 for images, got {bound}")
    return process


def _read_unet(options: Options, attention: bool) -> dict[str, Any]:
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
            f"{options.file}: up_block_types: expected the mirror image of down_block_types, one a level of "
            f"{channels}, got {blocks['up_block_types']}"
        )
    scale_shift = options.take("resnet_time_scale_shift", "default")
    if scale_shift not in ("default", "scale_shift"):
        raise CheckpointError(f"{options.file}: resnet_time_scale_shift: got {scale_shift!r}")
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


def _kind(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join({int: "an integer", list: "a list"}[one] for one in kinds)
