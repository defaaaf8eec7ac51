"""Reads the CLIPs of other projects: OpenAI's archives, the files of open_clip and of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.folder import load_folder
from dalle2_fast.checkpoints.formats.clip_keys import HUGGING_FACE, NATIVE, Naming, convert, find_naming
from dalle2_fast.checkpoints.formats.clip_options import (
    KINDS,
    from_hugging_face,
    from_open_clip,
    from_shapes,
    image_statistics,
)
from dalle2_fast.checkpoints.tensor_files import find_tensors, read_json, read_tensors
from dalle2_fast.checkpoints.weights import reject_leftovers

HUGGING_FACE_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PIPELINE = ("text_encoder", "image_encoder")  # the folders of the towers in a diffusers pipeline


@dataclass
class ClipSource:
    """A CLIP that was read, before its tensors get our names.

    Args:
        path: where it was read; error messages begin with it.
        naming: how its tensors are named.
        tensors: name -> tensor.
        options: the arguments of our CLIP.
    """

    path: Path
    naming: Naming
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def towers(self) -> str:
        """The towers that it has: "both", "text" or "image"."""
        if self.options.get("visual_kind", "vit") is None:
            return "text"
        return "image" if self.options.get("text_enc_depth", 1) is None else "both"

    def weights(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under our names, for a CLIP with the state_dict `expected`; CheckpointError if they do
        not fit."""
        return convert(expected, self.tensors, self.naming, self.path)


def read_clip(path: str | PathLike, **overrides: Any) -> ClipSource:
    """Read the weights of a CLIP, and find out the arguments with which our class makes it.

    Args:
        path: a file (.pt, .bin, .safetensors, an index of shards), a folder with such a file and its
            configuration, the folder of a diffusers pipeline with text_encoder/, image_encoder/ or both, or a
            checkpoint of dalle2_fast.
        **overrides: arguments of our CLIP that replace those found, or that the files do not hold.

    Raises:
        FileNotFoundError: the path or the weights do not exist.
        CheckpointError: a file is damaged, no CLIP, or a CLIP that our class cannot make.

    Example:
        >>> from dalle2_fast.checkpoints import embedded_path
        >>> read_clip(embedded_path()).towers
        'both'
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and "format_version" in _json_if_present(path / "config.json"):
        return _read_folder(path, overrides)
    if path.is_dir() and (parts := [path / name for name in PIPELINE if (path / name).is_dir()]):
        return _join_towers(path, [_read(part, overrides) for part in parts])
    return _read(path, overrides)


def _read_folder(path: Path, overrides: dict[str, Any]) -> ClipSource:
    config, tensors = load_folder(path, ["clip"])
    if not isinstance(config.get("clip"), dict):
        raise CheckpointError(f"{path}: expected a checkpoint with a CLIP, got {config.get('model')!r}")
    reject_leftovers(tensors, ["clip"], path)
    tensors = {name.removeprefix("clip."): value for name, value in tensors.items()}
    return ClipSource(path, NATIVE, tensors, config["clip"] | overrides)


def _read(path: Path, overrides: dict[str, Any]) -> ClipSource:
    file = find_tensors(path, _preferred(path)) if path.is_dir() else path
    if (header := _config_in_header(file)) is not None:
        return ClipSource(file, NATIVE, read_tensors(file), header | overrides)
    naming, tensors = find_naming(read_tensors(file), file)
    options = _options(file, naming, tensors) | overrides
    source = ClipSource(file, naming, tensors, options)
    if naming is HUGGING_FACE and source.towers != "both":
        # The file of a single tower has no temperature, because it compares nothing.
        tensors.setdefault("logit_scale", torch.tensor(1 / 0.07).log())
    needed = {
        "quick_gelu": "quick_gelu=True (OpenAI's weights, and what was trained from them) or False (LAION's)",
        **({} if source.towers == "image" else {"text_heads": "text_heads=..., its attention heads"}),
        **({} if source.towers == "text" else {"visual_heads": "visual_heads=..., its attention heads"}),
    }
    if unknown := [advice for name, advice in needed.items() if name not in options]:
        raise CheckpointError(
            f"{file}: neither the file nor a configuration next to it says enough: pass {'; '.join(unknown)}"
        )
    return source


def _preferred(folder: Path) -> tuple[str, ...]:
    """The names of weights files, the best first.

    LAION's folders hold the same CLIP in two layouts; in timm's folders model.safetensors is no CLIP, but the
    file of open_clip is one.
    """
    if _json_if_present(folder / "config.json").get("model_type") in KINDS:
        return HUGGING_FACE_FILES + OPEN_CLIP_FILES
    return OPEN_CLIP_FILES + HUGGING_FACE_FILES


def _options(file: Path, naming: Naming, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if naming is HUGGING_FACE:
        source = file.with_name("config.json")
        config = _json_if_present(source)
        if config.get("model_type") in KINDS:
            return _configured(from_hugging_face, config, source) | _processor(file.parent)
        return from_shapes(tensors, naming, _towers(tensors), file)
    source = file.with_name("open_clip_config.json")
    if config := _json_if_present(source):
        return _configured(from_open_clip, config, source)
    return from_shapes(tensors, naming, "both", file)


def _configured(read: Callable[..., dict[str, Any]], config: dict[str, Any], file: Path) -> dict[str, Any]:
    """`read(config, file)`; CheckpointError also if a value has another type than `read` computes with."""
    try:
        return read(config, file)
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{file}: not the configuration of a CLIP ({error})") from None


def _towers(tensors: dict[str, Tensor]) -> str:
    """The towers in tensors of Hugging Face: a CLIPModel has logit_scale, single towers do not have it."""
    has = [any(key.startswith(prefix) for key in tensors) for prefix in ("text_model.", "vision_model.")]
    if "logit_scale" in tensors or all(has):
        return "both"
    return "text" if has[0] else "image"


def _processor(folder: Path) -> dict[str, Any]:
    """The normalisation of images, from the folder of the weights or a pipeline's feature_extractor/."""
    for place in (folder, folder.parent / "feature_extractor"):
        for name in ("preprocessor_config.json", "processor_config.json"):
            if found := image_statistics(_json_if_present(place / name)):
                return found
    return {}


def _config_in_header(file: Path) -> dict[str, Any] | None:
    """The arguments of our CLIP in the header of a file that `dalle2-fast train clip` wrote, else None."""
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            config = json.loads((opened.metadata() or {}).get("config", "{}")).get("model")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return None  # damage raises when the tensors are read
    return config if isinstance(config, dict) and "visual_kind" in config else None


def _json_if_present(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _join_towers(path: Path, parts: list[ClipSource]) -> ClipSource:
    """One CLIP from one or both towers of a pipeline."""
    if len(parts) == 1:
        return parts[0]
    text, image = parts
    for part, towers in zip(parts, ("text", "image"), strict=True):
        if part.naming is not HUGGING_FACE or part.towers != towers:
            raise CheckpointError(f"{part.path}: expected a {towers} tower of CLIP with its projection")
    for name in ("dim_latent", "quick_gelu"):
        if text.options[name] != image.options[name]:
            came = f"{text.options[name]} and {image.options[name]}"
            raise CheckpointError(f"{path}: text_encoder and image_encoder differ: {name} is {came}")
    theirs = {name: value for name, value in image.options.items() if name != "text_enc_depth"}
    options = {name: value for name, value in text.options.items() if name != "visual_kind"} | theirs
    return ClipSource(path, HUGGING_FACE, text.tensors | image.tensors, options)
