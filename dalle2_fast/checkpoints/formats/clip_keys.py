"""Which tensors of a published CLIP make which of ours, in both directions.

Our names are those of OpenAI's files and of open_clip's `CLIP` class. Hugging Face's `CLIPModel` separates q,
k and v, transposes the two projections and uses other names ("pre_layrnorm" is its spelling).
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
# What files hold in addition to the weights of the towers: OpenAI's sizes, masks and indices that follow from
# sizes, and the bias of SigLIP's loss, which no embedding depends on.
NO_WEIGHTS = re.compile(
    r"(.*\.)?(input_resolution|context_length|vocab_size|attn_mask|position_ids)|logit_bias"
)


@dataclass(frozen=True)
class Naming:
    """How one project names the tensors of a CLIP.

    Args:
        name: the project, for messages.
        sources: our key -> the keys of the file that make it, in order (q, k, v).
        transposed: our keys whose tensor is the transpose of that of the file.
    """

    name: str
    sources: Callable[[str], tuple[str, ...]]
    transposed: tuple[str, ...] = ()

    def assemble(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make our tensor `key` from those of the file."""
        parts = [tensors[name] for name in self.sources(key)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value.T.contiguous() if key in self.transposed else value

    def take_apart(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors of the file that `assemble` turns into our tensor `key` = `value`."""
        names = self.sources(key)
        value = value.T if key in self.transposed else value
        parts = [value] if len(names) == 1 else value.chunk(len(names))
        return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}

    def shape(self, key: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of our tensor `key`, which one tensor of the file makes; KeyError without that tensor."""
        size = tuple(tensors[self.sources(key)[0]].shape)
        return size[::-1] if key in self.transposed else size

    def depth(self, prefix: str, tensors: Mapping[str, Tensor]) -> int:
        """The number of blocks of the Transformer whose keys begin with `prefix` in ours."""
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
    """Find out from the keys how the tensors of a file are named.

    Args:
        tensors: of the file, maybe with the prefixes of DistributedDataParallel or torch.compile.
        source: the file; the error message begins with it.

    Returns:
        The naming, and the tensors without such prefixes.

    Raises:
        CheckpointError: the tensors are not those of a CLIP.
    """
    for wrapper in WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    if "text.token_embedding.weight" in tensors:  # the text tower of open_clip's CustomTextCLIP has a prefix
        tensors = {key.removeprefix("text."): value for key, value in tensors.items()}
    tensors = dict(tensors)
    if "logit_scale" in tensors and tensors["logit_scale"].numel() == 1:  # some trainers store [1]
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
    """The tensors of a file under our names.

    Args:
        expected: the state_dict of our model, of which only names and shapes are used.
        tensors: of the file.
        naming: that of the file.
        source: the file; the error message begins with it.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape. The message uses the names of the
            file.
    """
    wanted: dict[str, Tensor] = {}
    for key, value in expected.items():
        wanted |= naming.take_apart(key, value)
    weights = {name: x for name, x in tensors.items() if name in wanted or not NO_WEIGHTS.fullmatch(name)}
    if problems := mismatches(wanted, weights):
        raise CheckpointError(f"{source}: the weights are not those of this CLIP: " + "; ".join(problems))
    return {key: naming.assemble(key, tensors) for key in expected}


def export(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The weights of our CLIP under the names of another project.

    Args:
        state: our state_dict.
        layout: "openai", "open_clip" or "huggingface".

    Raises:
        ValueError: the layout is another one, or Hugging Face's CLIP does not have some of the weights.

    Example:
        >>> import torch
        >>> list(export({"ln_final.bias": torch.zeros(2)}, "huggingface"))
        ['text_model.final_layer_norm.bias']
    """
    if layout not in NAMINGS:
        raise ValueError(f"layout: expected one of {', '.join(NAMINGS)}, got {layout!r}")
    parts = (NAMINGS[layout].take_apart(key, value) for key, value in state.items())
    return {name: tensor for part in parts for name, tensor in part.items()}
