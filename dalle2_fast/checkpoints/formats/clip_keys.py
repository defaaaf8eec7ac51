"""CLIP's weights under other projects' names: which tensors of a file make which of ours, in both directions.

Our names are those of OpenAI's files and of open_clip's `CLIP` class. Hugging Face's `CLIPModel` splits q, k
and v, transposes the two projections and has names of its own ("pre_layrnorm" is how it is spelled there).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_fast.checkpoints.errors import CheckpointError, listed, mismatches

PROJECTIONS = ("text_projection", "visual.proj")
TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# What files hold besides weights: OpenAI's sizes, masks and indices that follow from them.
NO_WEIGHTS = re.compile(r"(.*\.)?(input_resolution|context_length|vocab_size|attn_mask|position_ids)")


@dataclass(frozen=True)
class Naming:
    """name: whose it is; sources: our key -> the keys of the file that make it, in order (q, k, v)."""

    name: str
    sources: Callable[[str], tuple[str, ...]]
    transposed: tuple[str, ...] = ()

    def assemble(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor `key` from those of the file."""
        parts = [tensors[name] for name in self.sources(key)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value.T.contiguous() if key in self.transposed else value

    def take_apart(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors of the file that make our tensor `key`."""
        names = self.sources(key)
        value = value.T if key in self.transposed else value
        parts = [value] if len(names) == 1 else value.chunk(len(names))
        return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}

    def shape(self, key: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Of our tensor `key`, where the file has one tensor for it. KeyError without it."""
        size = tuple(tensors[self.sources(key)[0]].shape)
        return size[::-1] if key in self.transposed else size

    def depth(self, prefix: str, tensors: Mapping[str, Tensor]) -> int:
        """Blocks of the Transformer whose blocks our keys begin with `prefix`."""
        name = self.sources(f"{prefix}7.ln_1.weight")[0]
        numbers = re.compile(re.escape(name).replace("7", r"(\d+)", 1))
        return max((int(found[1]) + 1 for key in tensors if (found := numbers.fullmatch(key))), default=0)


def _as_hugging_face(key: str) -> tuple[str, ...]:
    if key in TOP:
        return (TOP[key],)
    found = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if found:
        tower = "vision_model" if found[1] else "text_model"
        part, begin = found[3], f"{tower}.encoder.layers.{found[2]}."
        if part == "attn.in_proj":
            return tuple(f"{begin}self_attn.{letter}_proj.{found[4]}" for letter in "qkv")
        if part in BLOCK:
            return (f"{begin}{BLOCK[part]}.{found[4]}",)
    raise ValueError(f"layout: Hugging Face's CLIP has Vision Transformers with patches only, not {key}")


NATIVE = Naming("OpenAI's and open_clip's", lambda key: (key,))
HUGGING_FACE = Naming("Hugging Face's", _as_hugging_face, PROJECTIONS)
NAMINGS = {"openai": NATIVE, "open_clip": NATIVE, "huggingface": HUGGING_FACE}


def find_naming(tensors: Mapping[str, Tensor], source: object) -> tuple[Naming, dict[str, Tensor]]:
    """(naming, tensors without the prefixes of wrappers), from the keys. CheckpointError if it is no CLIP."""
    for wrapper in WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    if "text.token_embedding.weight" in tensors:  # open_clip's CustomTextCLIP keeps the text tower apart
        tensors = {key.removeprefix("text."): value for key, value in tensors.items()}
    tensors = dict(tensors)
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:  # [1] for some trainers
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    if any(key.startswith(("text_model.", "vision_model.")) for key in tensors):
        return HUGGING_FACE, tensors
    if "token_embedding.weight" in tensors and any(key.startswith("visual.") for key in tensors):
        return NATIVE, tensors
    raise CheckpointError(
        f"{source}: not a CLIP: expected OpenAI's and open_clip's names (token_embedding.weight, visual.*) "
        f"or Hugging Face's (text_model.*, vision_model.*, with projections), got {listed(list(tensors))}"
    )


def convert(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], naming: Naming, source: object
) -> dict[str, Tensor]:
    """The tensors of a file under our names; `expected` is the state_dict of the model, maybe without data.

    Raises CheckpointError that names, as the file does, what is missing, left over or of another shape.
    """
    wanted: dict[str, Tensor] = {}
    for key, value in expected.items():
        wanted |= naming.take_apart(key, value)
    weights = {name: x for name, x in tensors.items() if name in wanted or not NO_WEIGHTS.fullmatch(name)}
    if problems := mismatches({name: tensor.shape for name, tensor in wanted.items()}, weights):
        raise CheckpointError(f"{source}: the weights are not those of this CLIP: " + "; ".join(problems))
    return {key: naming.assemble(key, tensors) for key in expected}


def export(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our state_dict under the names of `layout`: "openai", "open_clip" or "huggingface".

    Raises ValueError for another one, or for weights that Hugging Face's CLIP has no place for.
    """
    if layout not in NAMINGS:
        raise ValueError(f"layout: expected one of {', '.join(NAMINGS)}, got {layout!r}")
    parts = (NAMINGS[layout].take_apart(key, value) for key, value in state.items())
    return {name: tensor for part in parts for name, tensor in part.items()}
