"""The arguments of our `CLIP` for a published one: from its configuration file, else from its shapes.

Shapes do not show the activation, and show the number of heads only by convention: a file without
configuration may need `quick_gelu`. A configuration that asks for what our `CLIP` does not have is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.clip_keys import Naming
from dalle2_fast.checkpoints.formats.renaming import count_numbers

# Widths of Vision Transformers with 16 heads, where the convention of 64 per head gives more: H, g, G, e.
SIXTEEN_HEADS = (1280, 1408, 1664, 1792)
# Hugging Face's defaults, which config.json leaves out.
TEXT_DEFAULTS = dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512,
    eos_token_id=49407,
)  # fmt: skip
VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
    patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512, num_channels=3,
)  # fmt: skip
KINDS = {"clip": "both", "clip_text_model": "text", "clip_vision_model": "image"}
ONE_TOWER = {"both": {}, "text": {"visual_kind": None}, "image": {"text_enc_depth": None}}
# Settings of open_clip that change the network, with the only value that ours has; None means "not set".
PLAIN_VISION = dict(
    ls_init_value=None, attentional_pool=False, no_ln_pre=False, pos_embed_type="learnable",
    final_ln_after_pool=False, pool_type="tok", act_kwargs=None, norm_kwargs=None, timm_model_name=None,
)  # fmt: skip
PLAIN_TEXT = dict(
    ls_init_value=None, embed_cls=False, no_causal_mask=False, final_ln_after_pool=False, pool_type="argmax",
    proj_bias=False, proj_type="linear", act_kwargs=None, norm_kwargs=None, hf_model_name=None,
)  # fmt: skip
PLAIN_MODEL = dict(multimodal_cfg=None)
# Settings that are read below, and settings that do not change what the network computes.
READ_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
READ_VISION |= {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
READ_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
READ_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs", "pad_id", "eos_id", "output_tokens"}
READ_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
READ_MODEL |= {"custom_text", "nonscalar_logit_scale", "init_logit_scale", "preprocess_cfg"}
READ_MODEL |= {"init_logit_bias"}
NEUTRAL = (None, False, 0, {}, [])  # values with which a setting is off


def from_shapes(tensors: Mapping[str, Tensor], naming: Naming, towers: str, source: object) -> dict[str, Any]:
    """The arguments of our CLIP that follow from shapes.

    The activation follows only for OpenAI's archives, which also hold their sizes; the number of heads only
    for a width that is a multiple of 64.

    Args:
        tensors: of the file.
        naming: how they are named.
        towers: "both", "text" or "image".
        source: the file; the error message begins with it.

    Raises:
        CheckpointError: a tensor is missing.
    """
    options = dict(ONE_TOWER[towers])
    try:
        if towers != "image":
            options |= _text_from_shapes(tensors, naming)
        if towers != "text":
            options |= _image_from_shapes(tensors, naming)
    except KeyError as error:
        raise CheckpointError(f"{source}: not a whole CLIP: {error.args[0]} is missing") from None
    if "input_resolution" in tensors:
        options["quick_gelu"] = True
    return options


def _text_from_shapes(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, Any]:
    tokens, width = naming.shape("token_embedding.weight", tensors)
    hidden, _ = naming.shape("transformer.resblocks.0.mlp.c_fc.weight", tensors)
    return dict(
        num_text_tokens=tokens, dim_text=width, mlp_ratio=ratio(hidden, width), eos_token_id=tokens - 1,
        text_seq_len=naming.shape("positional_embedding", tensors)[0],
        text_enc_depth=naming.depth("transformer.resblocks.", tensors),
        dim_latent=naming.shape("text_projection", tensors)[1],
        **({} if width % 64 else {"text_heads": width // 64}),
    )  # fmt: skip


def _image_from_shapes(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, Any]:
    if "visual.layer1.0.conv1.weight" in tensors:
        stages = [count_numbers(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
        width = tensors["visual.layer1.0.conv1.weight"].shape[0]
        grid = _root(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
        return dict(
            visual_kind="resnet", visual_enc_depth=stages, dim_image=width, visual_heads=width * 32 // 64,
            visual_image_size=32 * grid, dim_latent=tensors["visual.attnpool.c_proj.weight"].shape[0],
        )  # fmt: skip
    width, _, patch, _ = naming.shape("visual.conv1.weight", tensors)
    hidden, _ = naming.shape("visual.transformer.resblocks.0.mlp.c_fc.weight", tensors)
    grid = _root(naming.shape("visual.positional_embedding", tensors)[0] - 1)
    return dict(
        dim_image=width, visual_patch_size=patch, visual_image_size=patch * grid,
        visual_mlp_ratio=ratio(hidden, width),
        visual_enc_depth=naming.depth("visual.transformer.resblocks.", tensors),
        dim_latent=naming.shape("visual.proj", tensors)[1],
        **({} if width % 64 else {"visual_heads": 16 if width in SIXTEEN_HEADS else width // 64}),
    )  # fmt: skip


def from_hugging_face(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The arguments of our CLIP for a configuration of Hugging Face.

    Args:
        config: of a CLIPModel, CLIPTextModelWithProjection or CLIPVisionModelWithProjection.
        source: its file; error messages begin with it.

    Raises:
        CheckpointError: it asks for what our CLIP does not have.

    Example:
        >>> from_hugging_face({"model_type": "clip_text_model"}, "config.json")["dim_text"]
        512
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f"{source}: model_type: expected one of {', '.join(KINDS)}, got {kind!r}")
    options: dict[str, Any] = dict(ONE_TOWER[KINDS[kind]])
    activations = set()
    if KINDS[kind] != "image":
        text = _section(config, "text", TEXT_DEFAULTS)
        tokens, end = text["vocab_size"], text["eos_token_id"]
        options |= dict(
            num_text_tokens=tokens, dim_text=text["hidden_size"], text_heads=text["num_attention_heads"],
            text_enc_depth=text["num_hidden_layers"], text_seq_len=text["max_position_embeddings"],
            mlp_ratio=ratio(text["intermediate_size"], text["hidden_size"]),
            dim_latent=text["projection_dim"],
            eos_token_id=tokens - 1 if end == 2 else end,  # 2 in old files means the largest id
        )  # fmt: skip
        activations.add(_activation(text, source))
    if KINDS[kind] != "text":
        vision = _section(config, "vision", VISION_DEFAULTS)
        if vision["num_channels"] != 3:
            raise CheckpointError(f"{source}: num_channels: expected 3, got {vision['num_channels']}")
        options |= dict(
            dim_image=vision["hidden_size"], visual_heads=vision["num_attention_heads"],
            visual_enc_depth=vision["num_hidden_layers"], dim_latent=vision["projection_dim"],
            visual_image_size=_side(vision["image_size"], source),
            visual_patch_size=_side(vision["patch_size"], source),
            visual_mlp_ratio=ratio(vision["intermediate_size"], vision["hidden_size"]),
        )  # fmt: skip
        activations.add(_activation(vision, source))
    if kind == "clip":
        options["dim_latent"] = config.get("projection_dim", 512)
    if len(activations) > 1:
        raise CheckpointError(f"{source}: hidden_act: expected the same for both towers, got {activations}")
    return options | {"quick_gelu": activations.pop() == "quick_gelu"}


def from_open_clip(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The arguments of our CLIP for a configuration of open_clip.

    Args:
        config: open_clip_config.json, or a model configuration from the package open_clip.
        source: its file; error messages begin with it.

    Raises:
        CheckpointError: it asks for what our CLIP does not have.

    Example:
        >>> config = {"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {}}
        >>> from_open_clip(config, "config.json")["visual_patch_size"]
        32
    """
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict) or "embed_dim" not in model:
        raise CheckpointError(f"{source}: expected embed_dim, vision_cfg and text_cfg, as open_clip has them")
    for name, section, plain, read in (
        ("", model, PLAIN_MODEL, READ_MODEL),
        ("vision_cfg.", vision, PLAIN_VISION, READ_VISION),
        ("text_cfg.", text, PLAIN_TEXT, READ_TEXT),
    ):
        for key, value in section.items():
            if key not in read and value not in (plain.get(key), *NEUTRAL):
                expected = repr(plain[key]) if key in plain else "nothing of that name"
                raise CheckpointError(f"{source}: {name}{key}: expected {expected}, got {value!r}")
    vision = dict(layers=12, width=768, patch_size=16, image_size=224, head_width=64, mlp_ratio=4.0) | vision
    text = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, mlp_ratio=4.0) | text
    width, is_resnet = vision["width"], isinstance(vision["layers"], list)
    options = dict(
        dim_latent=model["embed_dim"], quick_gelu=bool(model.get("quick_gelu", False)),
        num_text_tokens=text["vocab_size"], text_seq_len=text["context_length"], dim_text=text["width"],
        text_heads=text["heads"], text_enc_depth=text["layers"], eos_token_id=text["vocab_size"] - 1,
        mlp_ratio=text["mlp_ratio"], dim_image=width, visual_enc_depth=vision["layers"],
        visual_heads=(32 * width if is_resnet else width) // vision["head_width"],
        visual_image_size=_side(vision["image_size"], source), visual_mlp_ratio=vision["mlp_ratio"],
    )  # fmt: skip
    kind = {"visual_kind": "resnet"} if is_resnet else {"visual_patch_size": vision["patch_size"]}
    return options | kind | image_statistics(config.get("preprocess_cfg", {}))


def image_statistics(config: Mapping[str, Any]) -> dict[str, Any]:
    """image_mean and image_std from open_clip's preprocess_cfg or Hugging Face's preprocessor_config.json.

    Example:
        >>> image_statistics({"mean": (0.5, 0.5, 0.5)})
        {'image_mean': [0.5, 0.5, 0.5]}
    """
    config = config.get("image_processor", config)
    names = {"mean": "image_mean", "std": "image_std", "image_mean": "image_mean", "image_std": "image_std"}
    return {ours: list(config[theirs]) for theirs, ours in names.items() if config.get(theirs) is not None}


def ratio(hidden: int, width: int) -> float:
    """The mlp_ratio r for which int(width * r) is `hidden`.

    Example:
        >>> ratio(2048, 512)
        4.0
    """
    exact = hidden / width
    return exact if int(width * exact) == hidden else math.nextafter(exact, math.inf)


def _section(config: Mapping[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    if config["model_type"] != "clip":
        return defaults | config
    # Old files have both sections, and the second one is right.
    return defaults | (config.get(f"{name}_config") or {}) | (config.get(f"{name}_config_dict") or {})


def _activation(section: Mapping[str, Any], source: object) -> str:
    if section["layer_norm_eps"] != 1e-5:
        raise CheckpointError(f"{source}: layer_norm_eps: expected 1e-05, got {section['layer_norm_eps']}")
    if (name := section["hidden_act"]) not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{source}: hidden_act: expected quick_gelu or gelu, got {name!r}")
    return name


def _side(size: int | list[int], source: object) -> int:
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"{source}: image and patch size: expected squares, got {size}")
    return sides.pop()


def _root(cells: int) -> int:
    side = math.isqrt(max(cells, 0))
    if side * side != cells:
        raise KeyError(f"a square of positions and one for the class ({cells} + 1 found)")
    return side
