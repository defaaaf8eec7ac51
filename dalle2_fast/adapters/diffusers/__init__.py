"""Parts for diffusers' loops and pipelines: schedulers, attention processors, the cache of the context.

    from dalle2_fast.adapters.diffusers import AttnAddedKVProcessor, UnCLIPScheduler, context_cache

    pipe.decoder_scheduler = UnCLIPScheduler.from_config(pipe.decoder_scheduler.config)
    unet.set_attn_processor(AttnAddedKVProcessor())

The classes are subclasses of diffusers' classes. They are created when one of them is first named, which
raises ImportError if diffusers is not installed. `dalle2_fast.patch(pipe)` needs none of them; the schedulers
are replaced separately because they sample their noise in another way. Written for and tested with diffusers
0.42.1.
"""

from __future__ import annotations

import functools

from dalle2_fast.adapters._foreign import attach_classes, needed_package, subclass
from dalle2_fast.adapters.context_cache import context_cache

_NAMES = ("AttnAddedKVProcessor", "AttnProcessor", "DDIMScheduler", "DDPMScheduler", "UnCLIPScheduler")

__all__ = [*_NAMES, "context_cache"]


@functools.cache
def _classes() -> dict[str, type]:
    with needed_package("diffusers", __name__):
        import diffusers
        from diffusers.models import attention_processor
    from dalle2_fast.adapters.diffusers import processors, schedulers

    parts = {
        "AttnProcessor": (processors.FusedAttnProcessor, attention_processor.AttnProcessor2_0),
        "AttnAddedKVProcessor": (
            processors.FusedAttnAddedKVProcessor, attention_processor.AttnAddedKVProcessor2_0
        ),
        "UnCLIPScheduler": (schedulers.FusedUnCLIP, diffusers.UnCLIPScheduler),
        "DDPMScheduler": (schedulers.FusedDDPM, diffusers.DDPMScheduler),
        "DDIMScheduler": (schedulers.FusedDDIM, diffusers.DDIMScheduler),
    }  # fmt: skip
    return {name: subclass(__name__, name, mixin, base) for name, (mixin, base) in parts.items()}


__getattr__, __dir__ = attach_classes(__name__, _NAMES, _classes)
