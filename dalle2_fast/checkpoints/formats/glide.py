"""GLIDE's files (Nichol et al., 2112.10741): base.pt, upsample.pt, base_inpaint.pt and upsample_inpaint.pt.

Each holds a U-Net and the text tower that conditions it. What the shapes do not show is as in all published
files: heads of 64, images of 64 and 256 pixels, 1000 steps.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from dalle2_fast.checkpoints.checkpoint import Part
from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.adm import shape_of, unet_options
from dalle2_fast.checkpoints.formats.renaming import (
    MadeFrom,
    Rules,
    count_numbers,
    parts_first,
    prefixed,
    renamed,
    translate,
)
from dalle2_fast.checkpoints.formats.unet_keys import original_rules
from dalle2_fast.checkpoints.tensor_files import read_tensors

HEAD_DIM = 64
# Channels of the input -> (whether it enlarges, whether it repaints).
_KINDS = {3: (False, False), 6: (True, False), 7: (False, True), 10: (True, True)}


def read_glide(
    path: str | PathLike,
    *,
    image_size: int | None = None,
    low_res_size: int | None = None,
    head_dim: int = HEAD_DIM,
) -> Part:
    """Read a file of GLIDE.

    Args:
        path: the file.
        image_size: side of its images; None is 64, and 256 for a file that enlarges.
        low_res_size: side of the images that it enlarges; None is 64.
        head_dim: width of an attention head, of the U-Net and of the text tower.

    Returns:
        The arguments of `Glide`, and its weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds another network, such as GLIDE's noised CLIP.
    """
    file = Path(path).expanduser()
    tensors = read_tensors(file)
    unet = unet_options(tensors, "", file, head_dim)
    if unet["in_channels"] not in _KINDS or unet["cross_dim"] is None:
        came = "without text" if unet["cross_dim"] is None else f"with {unet['in_channels']} input channels"
        raise CheckpointError(
            f"{file}: expected a U-Net of GLIDE, with text and 3, 6, 7 or 10 input channels, got one {came}"
        )
    upsamples, inpaint = _KINDS[unet["in_channels"]]
    num_tokens, width = shape_of(tensors, "token_embedding.weight", 2, file)
    text = {
        "num_tokens": num_tokens, "dim": width, "heads": max(1, width // head_dim),
        "context_length": shape_of(tensors, "positional_embedding", 2, file)[0],
        "depth": count_numbers(tensors, "transformer.resblocks."),
        "padding": "padding_embedding" in tensors, "final_norm": "final_ln.weight" in tensors,
    }  # fmt: skip
    config = {
        "unet": unet, "text": text, "inpaint": inpaint,
        "image_size": image_size or (256 if upsamples else 64),
        "low_res_size": (low_res_size or 64) if upsamples else None,
        "schedule": "linear" if upsamples else "cosine",
    }  # fmt: skip
    rules = prefixed("unet.", original_rules(unet)) | prefixed("text.", _text_rules(text, head_dim))
    return config, translate(tensors, rules, file)


def _text_rules(text: dict, head_dim: int) -> Rules:
    rules: Rules = {
        "token_embedding.weight": MadeFrom(("token_embedding.weight",)),
        "positional_embedding": MadeFrom(("positional_embedding",)),
    }
    if text["padding"]:
        rules["padding_embedding"] = MadeFrom(("padding_embedding",))
    if text["final_norm"]:
        rules |= renamed("ln_final", "final_ln")
    rules |= renamed("to_time", "transformer_proj")
    for block in range(text["depth"]):
        name = f"transformer.resblocks.{block}"
        for kind in ("weight", "bias"):
            rules[f"{name}.attn.in_proj_{kind}"] = MadeFrom(
                (f"{name}.attn.c_qkv.{kind}",), parts_first(3, head_dim)
            )
        rules |= renamed(f"{name}.attn.out_proj", f"{name}.attn.c_proj")
        for layer in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            rules |= renamed(f"{name}.{layer}", f"{name}.{layer}")
    return rules
