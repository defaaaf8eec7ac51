"""Karlo's original files: a .ckpt each for prior, decoder and upsampler, the statistics of the image
embeddings, and the CLIP.

The names of its tensors tell which file it is, regardless of the name of the file. The files hold no
configuration: sizes follow from shapes, and what shapes do not show is fixed as in Karlo (heads of 64, cosine
schedules of 1000 steps, images of 64 and 256 pixels).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle2_fast.checkpoints.checkpoint import Checkpoint, Part
from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.adm import shape_of, unet_options
from dalle2_fast.checkpoints.formats.diffusers import pipeline_config
from dalle2_fast.checkpoints.formats.diffusers_options import SAMPLING
from dalle2_fast.checkpoints.formats.karlo_keys import (
    HEAD_DIM,
    original_conditioning_rules,
    original_prior_rules,
)
from dalle2_fast.checkpoints.formats.renaming import Rules, count_numbers, prefixed, translate
from dalle2_fast.checkpoints.formats.unet_keys import original_rules
from dalle2_fast.checkpoints.tensor_files import SUFFIXES, read_torch, state_dict
from dalle2_fast.checkpoints.torchscript import is_torchscript

IMAGE_SIZE, LOW_RES_SIZE = 256, 64
FILES = {  # content -> the name under which it was published
    "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "upsampler": "improved-sr-ckpt-step=1.2M.ckpt",
    "statistics": "ViT-L-14_stats.th",
    "clip": "ViT-L-14.pt",
}


@dataclass
class Originals:
    """The files of Karlo in one folder.

    Args:
        folder: where they lie.
        found: a key of FILES -> (file, its content).
    """

    folder: Path
    found: dict[str, tuple[Path, Any]] = field(default_factory=dict)

    def need(self, what: str) -> tuple[Path, Any]:
        """The file with this content, a key of FILES; FileNotFoundError if there is none."""
        if what not in self.found:
            present = ", ".join(f"{name} ({file.name})" for name, (file, _) in self.found.items())
            raise FileNotFoundError(
                f"{self.folder}: Karlo's {what} is missing, published as {FILES[what]}; got {present}"
            )
        return self.found[what]


def find_originals(folder: Path) -> Originals | None:
    """Karlo's files in a folder, or None if there is none except for a CLIP.

    Raises:
        CheckpointError: a file is damaged, or two files have the same content.
    """
    originals = Originals(folder)
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in (*SUFFIXES, ".th"):
            continue
        what, content = _recognise(file)
        if what is None:
            continue
        if what in originals.found:
            other = originals.found[what][0].name
            raise CheckpointError(f"{folder}: expected one {what} of Karlo, got {other} and {file.name}")
        originals.found[what] = (file, content)
    return originals if originals.found.keys() - {"clip"} else None


def read_originals(folder: Path, parts: Collection[str]) -> Checkpoint | None:
    """Read a folder of Karlo's files.

    Args:
        folder: where they lie.
        parts: of "clip", "prior", "decoder" and "upsampler", those that are read.

    Returns:
        The checkpoint, or None for a folder without Karlo's files.

    Raises:
        FileNotFoundError: the file of a part is missing.
        CheckpointError: a file is damaged, or its tensors do not fit.
    """
    if (originals := find_originals(folder)) is None:
        return None
    tokenizer = {"kind": "bpe", "context_length": 77, "merges": None}
    checkpoint = Checkpoint(folder, pipeline_config("karlo", tokenizer))
    for name, part in read_original(originals, parts).items():
        checkpoint.add(name, part)
    if "clip" in parts:
        checkpoint.add_clip(originals.need("clip")[0])
    return checkpoint


def read_original(originals: Originals, parts: Collection[str]) -> dict[str, Part]:
    """Part -> (arguments of our class, its weights), for those of prior, decoder and upsampler in `parts`."""
    readers = {"prior": _read_prior, "decoder": _read_decoder, "upsampler": _read_upsampler}
    return {name: read(originals) for name, read in readers.items() if name in parts}


def _recognise(file: Path) -> tuple[str | None, Any]:
    """(the key of FILES, the content) of a file of Karlo; (None, None) for any other file."""
    if file.suffix == ".safetensors" or is_torchscript(file):
        return "clip", None  # read_clip checks whether it is one
    content = read_torch(file, mapped=True)
    if isinstance(content, (tuple, list)) and len(content) == 2 and all(
        isinstance(x, Tensor) and x.dim() == 1 for x in content
    ):
        return "statistics", content
    names = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    markers = {
        "prior": "model.prd_emb",
        "decoder": "model.clip_tok_proj.weight",
        "upsampler": "model_first_steps.out.2.weight",
        "clip": "token_embedding.weight",
    }
    what = next((what for what, marker in markers.items() if marker in names), None)
    return what, None if what is None else state_dict(content, file)


# ----------------------------------------------------------------------------------------------- the networks


def _read_prior(originals: Originals) -> Part:
    file, tensors = originals.need("prior")
    statistics, (mean, std) = originals.need("statistics")
    width, embed_dim = shape_of(tensors, "model.clip_img_proj.weight", 2, file)
    depth = count_numbers(tensors, "model.transformer.resblocks.")
    hidden, _ = shape_of(tensors, "model.transformer.resblocks.0.mlp.c_fc.weight", 2, file)
    if mean.shape != (embed_dim,) or std.shape != (embed_dim,):
        raise CheckpointError(
            f"{statistics}: expected mean and deviation of {embed_dim} entries, got {list(mean.shape)}, "
            f"{list(std.shape)}"
        )
    config = {
        "net": {
            "dim": width, "depth": depth, "heads": width // HEAD_DIM, "dim_head": HEAD_DIM,
            "embed_dim": embed_dim, "text_dim": shape_of(tensors, "model.text_enc_proj.weight", 2, file)[1],
            "context_length": shape_of(tensors, "model.positional_embedding", 3, file)[1] - 4,
            "mlp_ratio": hidden / width,
        },
        "sample_timesteps": SAMPLING["prior_steps"], "unit_norm": False, "embed_scale": 1.0,
        "prediction": "sample", "sample_clip": 10.0,
    }  # fmt: skip
    translated = translate(tensors, original_prior_rules(depth), file)
    return config, translated | {"clip_mean": mean, "clip_std": std}


def _read_decoder(originals: Originals) -> Part:
    file, tensors = originals.need("decoder")
    unet = unet_options(tensors, "model.", file, HEAD_DIM)
    embed_dim = shape_of(tensors, "model.clip_emb.weight", 2, file)[1]
    tokens = shape_of(tensors, "model.clip_tok_proj.weight", 2, file)[0] // unet["cross_dim"]
    config = {
        "unet": unet, "image_size": LOW_RES_SIZE, "image_embed_dim": embed_dim,
        "text_embed_dim": shape_of(tensors, "model.text_feat_proj.weight", 2, file)[1],
        "text_encoding_dim": shape_of(tensors, "model.text_seq_proj.0.weight", 2, file)[1],
        "num_image_tokens": tokens, "unit_norm": False, "embed_scale": 1.0,
        "prediction": "epsilon", "variance": "learned_range", "sample_timesteps": SAMPLING["steps"],
    }  # fmt: skip
    rules = prefixed("unet.", original_rules(unet), "model.") | original_conditioning_rules(tokens)
    return config, translate(tensors, rules, file)


def _read_upsampler(originals: Originals) -> Part:
    file, tensors = originals.need("upsampler")
    config: dict[str, Any] = {
        "image_size": IMAGE_SIZE, "low_res_size": LOW_RES_SIZE, "resize": "bicubic", "prediction": "epsilon",
        "variance": "fixed_small", "sample_timesteps": SAMPLING["upsampler_steps"],
    }  # fmt: skip
    rules: Rules = {}
    for name, prefix in (("unet", "model_first_steps."), ("last_unet", "model_last_step.")):
        config[name] = unet_options(tensors, prefix, file, HEAD_DIM)
        rules |= prefixed(f"{name}.", original_rules(config[name]), prefix)
    return config, translate(tensors, rules, file)
