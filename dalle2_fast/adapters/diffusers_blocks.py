"""diffusers' ResnetBlock2D, Attention and pipelines, patched. Written for and tested with diffusers 0.42.1.

The package is looked at when one of its classes is: whoever has a module of it has imported it.
"""

from __future__ import annotations

import functools
import sys

from torch import Tensor, nn

from dalle2_fast.adapters._swap import Cover, Patched, overrides
from dalle2_fast.adapters.context_cache import context_cache
from dalle2_fast.adapters.diffusers_attention import attend, attend_added_kv, is_key_mask
from dalle2_fast.adapters.norm_blocks import norm_obstacle

# ---------------------------------------------------------------------------------------------- ResnetBlock2D


class FusedResnetBlock2D(Patched):
    """norm1 and SiLU are one op; norm2, FiLM and SiLU another.

    With time_embedding_norm="default" the embedding is added before norm2, which stays a sum of its own.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        if args or kwargs.get("scale") is not None:  # deprecated: theirs says so
            return super().forward(input_tensor, temb, *args, **kwargs)
        h = self.norm1(input_tensor, activation="silu")
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and h.shape[0] >= 64:  # as theirs: large batches fail channels_last
                input_tensor, h = input_tensor.contiguous(), h.contiguous()
            input_tensor, h = resample(input_tensor), resample(h)
        h = self.conv1(h)

        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        scale = shift = None
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError(
                    'temb: expected a tensor because time_embedding_norm="scale_shift", got None'
                )
            scale, shift = temb.flatten(1).chunk(2, dim=1)
        elif temb is not None:
            h = h + temb
        h = self.norm2(h, scale, shift, "silu")
        h = self.conv2(self.dropout(h))

        if self.conv_shortcut is not None:
            if self.training:  # as theirs: DDP warns of gradients in other strides
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor


def _resnet_obstacle(block: nn.Module) -> str | None:
    own = overrides(block, _theirs("diffusers.models.resnet", "ResnetBlock2D"))
    if own is not None:
        return own
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm={block.time_embedding_norm!r}"
    return norm_obstacle(block.norm1) or norm_obstacle(block.norm2)


# -------------------------------------------------------------------------------------------------- Attention


class FusedAttention(Patched):
    """Attention in which AttnProcessor2_0 and AttnAddedKVProcessor2_0 run fused.

    The processor object stays, and another one that is set later is obeyed.
    """

    def __init_subclass__(cls) -> None:
        cls.plain_processor = _theirs("diffusers.models.attention_processor", "AttnProcessor2_0")
        cls.added_kv_processor = _theirs("diffusers.models.attention_processor", "AttnAddedKVProcessor2_0")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        kind = type(self.processor)
        others = [name for name in kwargs if name != "temb"]
        if not others and is_key_mask(attention_mask, hidden_states.shape[0]):
            if kind is self.added_kv_processor:
                return attend_added_kv(self, hidden_states, encoder_hidden_states, attention_mask)
            if kind is self.plain_processor:
                temb = kwargs.get("temb")
                return attend(self, hidden_states, encoder_hidden_states, attention_mask, temb)
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def _attention_obstacle(attention: nn.Module) -> str | None:
    own = overrides(attention, _theirs("diffusers.models.attention_processor", "Attention"))
    if own is not None:
        return own
    kind = type(attention.processor)
    known = [_theirs("diffusers.models.attention_processor", name)
             for name in ("AttnProcessor2_0", "AttnAddedKVProcessor2_0")]  # fmt: skip
    if kind not in known:
        return f"its processor is {kind.__name__}; known are {', '.join(one.__name__ for one in known)}"
    if attention.inner_kv_dim != attention.inner_dim:
        return "it has fewer heads of keys than of queries"
    if kind is known[1] and (attention.group_norm is None or attention.add_k_proj is None):
        return "AttnAddedKVProcessor2_0 without a group_norm and added projections"
    return None


# -------------------------------------------------------------------------------------------------- pipelines


class CachingPipeline(Patched):
    """A pipeline that projects its context once a call: every call runs in `context_cache`."""

    def __init_subclass__(cls) -> None:
        plain_call = cls.__bases__[1].__call__

        @functools.wraps(plain_call)
        def call(self, *args, **kwargs):
            with context_cache():
                return plain_call(self, *args, **kwargs)

        cls.__call__ = call


def is_pipeline(target: object) -> bool:
    pipeline = _theirs("diffusers.pipelines.pipeline_utils", "DiffusionPipeline")
    return pipeline is not None and isinstance(target, pipeline)


# ---------------------------------------------------------------------------------------------------- look-up


def _theirs(module: str, name: str) -> type | None:
    """A class of diffusers, if that module of it has been imported."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name)


def _is_a(module: str, name: str):
    def is_one(candidate: nn.Module) -> bool:
        kind = _theirs(module, name)
        return kind is not None and isinstance(candidate, kind)

    return is_one


COVERS = (
    Cover("norms", FusedResnetBlock2D, _is_a("diffusers.models.resnet", "ResnetBlock2D"), _resnet_obstacle),
    Cover("attention", FusedAttention, _is_a("diffusers.models.attention_processor", "Attention"),
          _attention_obstacle),
)  # fmt: skip
