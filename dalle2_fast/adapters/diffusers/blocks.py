"""The rules of `patch` for diffusers' ResnetBlock2D and Attention, and its pipelines with a context cache.

Written for and tested with diffusers 0.42.1. The package is not imported: a user who has one of its modules
has imported it.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from dalle2_fast.adapters._foreign import imported_class, is_instance
from dalle2_fast.adapters._swap import Patched, PatchRule, why_overridden
from dalle2_fast.adapters.context_cache import context_cache
from dalle2_fast.adapters.diffusers.attention import attend, attend_added_kv
from dalle2_fast.adapters.diffusers.masks import is_key_mask
from dalle2_fast.adapters.norm_blocks import why_norm_unavailable

_RESNET = ("diffusers.models.resnet", "ResnetBlock2D")
_PROCESSORS = "diffusers.models.attention_processor"
_ATTENTION = (_PROCESSORS, "Attention")
_PIPELINE = ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline")

# ---------------------------------------------------------------------------------------------- ResnetBlock2D


class FusedResnetBlock2D(Patched):
    """norm1 and SiLU are one op; norm2, FiLM and SiLU another.

    With time_embedding_norm="default" the embedding is added before norm2, in a separate sum.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        if args or kwargs.get("scale") is not None:  # deprecated: the original warns
            return super().forward(input_tensor, temb, *args, **kwargs)
        h = self.norm1(input_tensor, activation="silu")
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and h.shape[0] >= 64:  # as in diffusers: channels_last fails
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
            if self.training:  # as in diffusers: DDP warns of gradients in other strides
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor


def _why_resnet_unavailable(block: nn.Module) -> str | None:
    overridden = why_overridden(block, imported_class(*_RESNET))
    if overridden is not None:
        return overridden
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm={block.time_embedding_norm!r}"
    return why_norm_unavailable(block.norm1) or why_norm_unavailable(block.norm2)


# -------------------------------------------------------------------------------------------------- Attention


class FusedAttention(Patched):
    """Attention that runs AttnProcessor2_0 and AttnAddedKVProcessor2_0 as the fused op.

    The processor object stays. A processor of another class, set later, runs unchanged.
    """

    def __init_subclass__(cls) -> None:
        cls.plain_processor = imported_class(_PROCESSORS, "AttnProcessor2_0")
        cls.added_kv_processor = imported_class(_PROCESSORS, "AttnAddedKVProcessor2_0")

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


def _why_attention_unavailable(attention: nn.Module) -> str | None:
    overridden = why_overridden(attention, imported_class(*_ATTENTION))
    if overridden is not None:
        return overridden
    kind = type(attention.processor)
    known = [imported_class(_PROCESSORS, name) for name in ("AttnProcessor2_0", "AttnAddedKVProcessor2_0")]
    if kind not in known:
        return f"its processor is {kind.__name__}; known are {', '.join(one.__name__ for one in known)}"
    if attention.inner_kv_dim != attention.inner_dim:
        return "it has fewer heads of keys than of queries"
    if kind is known[1] and (attention.group_norm is None or attention.add_k_proj is None):
        return "AttnAddedKVProcessor2_0 without a group_norm and added projections"
    return None


# -------------------------------------------------------------------------------------------------- pipelines


class CachingPipeline(Patched):
    """A pipeline that projects its context once per call, because every call runs in `context_cache`."""

    def __init_subclass__(cls) -> None:
        plain_call = cls.__bases__[1].__call__

        @functools.wraps(plain_call)
        def call(self, *args, **kwargs):
            with context_cache():
                return plain_call(self, *args, **kwargs)

        cls.__call__ = call


is_pipeline = is_instance(*_PIPELINE)

RULES = (
    PatchRule("norms", FusedResnetBlock2D, is_instance(*_RESNET), _why_resnet_unavailable),
    PatchRule("attention", FusedAttention, is_instance(*_ATTENTION), _why_attention_unavailable),
)
