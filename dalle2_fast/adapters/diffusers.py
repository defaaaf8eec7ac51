"""Parts for diffusers' own loops and pipelines: schedulers, attention processors, the context's cache.

    from dalle2_fast.adapters.diffusers import AttnAddedKVProcessor, UnCLIPScheduler, context_cache

    pipe.decoder_scheduler = UnCLIPScheduler.from_config(pipe.decoder_scheduler.config)
    unet.set_attn_processor(AttnAddedKVProcessor())

The classes are subclasses of diffusers' and are made when they are first named: without the package installed
that is an ImportError. `dalle2_fast.patch(pipe)` needs none of them; the schedulers are a step of their own
because their noise is drawn in another way. Written for and tested with diffusers 0.42.1.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from dalle2_fast.adapters import diffusers_schedulers as schedulers
from dalle2_fast.adapters.context_cache import context_cache
from dalle2_fast.adapters.diffusers_attention import attend, attend_added_kv, is_key_mask

_NAMES = ("AttnAddedKVProcessor", "AttnProcessor", "DDIMScheduler", "DDPMScheduler", "UnCLIPScheduler")

__all__ = [*_NAMES, "context_cache"]


def __getattr__(name: str) -> type:
    if name in _NAMES:
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])


class _AttnProcessor:
    """AttnProcessor2_0 by the fused op: self- or cross-attention, for `set_attn_processor`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        _expect_key_mask(attention_mask, hidden_states)
        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class _AttnAddedKVProcessor:
    """AttnAddedKVProcessor2_0 by the fused op: context and image in one softmax, for `set_attn_processor`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        _expect_key_mask(attention_mask, hidden_states)
        return attend_added_kv(attn, hidden_states, encoder_hidden_states, attention_mask)


def _expect_key_mask(mask: Tensor | None, hidden_states: Tensor) -> None:
    batch = hidden_states.shape[0]
    if not is_key_mask(mask, batch):
        raise ValueError(
            f"attention_mask: expected one for all queries, [B, 1, S] with B = {batch}, got "
            f"{tuple(mask.shape)}"
        )


@functools.cache
def _classes() -> dict[str, type]:
    try:
        import diffusers
        from diffusers.models import attention_processor
    except ImportError as error:
        raise ImportError(
            "dalle2_fast.adapters.diffusers needs the package diffusers (pip install diffusers), which "
            f"cannot be imported: {error}"
        ) from error
    parts = {
        "AttnProcessor": (_AttnProcessor, attention_processor.AttnProcessor2_0),
        "AttnAddedKVProcessor": (_AttnAddedKVProcessor, attention_processor.AttnAddedKVProcessor2_0),
        "UnCLIPScheduler": (schedulers.FusedUnCLIP, diffusers.UnCLIPScheduler),
        "DDPMScheduler": (schedulers.FusedDDPM, diffusers.DDPMScheduler),
        "DDIMScheduler": (schedulers.FusedDDIM, diffusers.DDIMScheduler),
    }
    made = {}
    for name, (mixin, base) in parts.items():
        # __module__ and __qualname__ are what pickle looks a class up by; it meets __getattr__ above.
        names = dict(__module__=__name__, __qualname__=name, __doc__=mixin.__doc__)
        made[name] = type(name, (mixin, base), names)
    return made
