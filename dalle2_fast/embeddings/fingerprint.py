"""A number that tells whether two CLIPs give the same embeddings."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP

WITHOUT = ("logit_scale", "logit_bias")  # embeddings do not depend on them


def fingerprint(clip: CLIP) -> str:
    """SHA-256 of the configuration and of the weights in float32.

    Weights that were rounded to bfloat16 have another fingerprint than those that they were rounded from.

    Args:
        clip: on any device.

    Example:
        >>> from dalle2_fast import CLIP
        >>> sizes = dict(dim_text=8, dim_image=8, dim_latent=4, num_text_tokens=5, text_enc_depth=1,
        ...              text_seq_len=4, text_heads=2, visual_enc_depth=1, visual_heads=2,
        ...              visual_image_size=8, visual_patch_size=4)
        >>> clip = CLIP(**sizes)
        >>> fingerprint(clip) == fingerprint(clip), fingerprint(clip) == fingerprint(CLIP(**sizes))
        (True, False)
    """
    config = {name: value for name, value in clip.config.items() if not name.startswith("logit_scale")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        if name not in WITHOUT:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(values.reshape(-1).numpy().data)
    return digest.hexdigest()
