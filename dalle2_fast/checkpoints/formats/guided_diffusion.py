"""The diffusion models of guided-diffusion (Dhariwal and Nichol, 2105.05233): a U-Net per file, and no
configuration.

Widths and levels follow from the shapes. The heads and the noise do not: PUBLISHED has them for
the published files, under the names of the flags in guided-diffusion's README.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from dalle2_fast.checkpoints.checkpoint import Part
from dalle2_fast.checkpoints.errors import CheckpointError
from dalle2_fast.checkpoints.formats.adm import shape_of, unet_options
from dalle2_fast.checkpoints.formats.renaming import MadeFrom, prefixed, translate
from dalle2_fast.checkpoints.formats.unet_keys import original_rules
from dalle2_fast.checkpoints.tensor_files import read_tensors

_LINEAR_256 = dict(image_size=256, num_head_channels=64)
PUBLISHED: dict[str, dict[str, Any]] = {  # name of the file -> its flags
    "64x64_diffusion.pt": dict(
        image_size=64, num_head_channels=64, noise_schedule="cosine", use_new_attention_order=True
    ),
    "128x128_diffusion.pt": dict(image_size=128, num_heads=4),
    "256x256_diffusion.pt": _LINEAR_256,
    "256x256_diffusion_uncond.pt": _LINEAR_256,
    "512x512_diffusion.pt": dict(image_size=512, num_head_channels=64),
    "64_256_upsampler.pt": dict(image_size=256, small_size=64, num_heads=4),
    "128_512_upsampler.pt": dict(image_size=512, small_size=128, num_head_channels=64),
    "lsun_bedroom.pt": _LINEAR_256,
    "lsun_cat.pt": _LINEAR_256,
    "lsun_horse.pt": _LINEAR_256,
    "lsun_horse_nodropout.pt": _LINEAR_256,
}
_DEFAULTS = dict(  # those of guided-diffusion
    image_size=None, small_size=None, num_heads=None, num_head_channels=None, noise_schedule="linear",
    diffusion_steps=1000, use_new_attention_order=False, predict_xstart=False,
)  # fmt: skip


def read_guided_diffusion(path: str | PathLike, **flags: Any) -> Part:
    """Read a file of guided-diffusion.

    Args:
        path: the file.
        flags: image_size, small_size (of an upsampler), num_heads or num_head_channels, noise_schedule,
            diffusion_steps, use_new_attention_order, predict_xstart, as guided-diffusion has them. None takes
            that of the published file of this name, else guided-diffusion's default.

    Returns:
        The arguments of `GuidedDiffusion`, and its weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds another network, or a flag is missing.
    """
    file = Path(path).expanduser()
    given = {name: value for name, value in flags.items() if value is not None}
    known = PUBLISHED.get(file.name, {})
    if given.keys() & {"num_heads", "num_head_channels"}:  # a flag of the call replaces the published one
        known = {name: value for name, value in known.items() if not name.startswith("num_head")}
    flags = _DEFAULTS | known | given
    heads, head_dim = flags["num_heads"], flags["num_head_channels"]
    tensors = read_tensors(file)
    unet = unet_options(tensors, "", file, head_dim, heads)
    if unet["cross_dim"] is not None:
        raise CheckpointError(f"{file}: its attention has keys of a text (encoder_kv); this may be GLIDE")
    missing = [] if flags["image_size"] else ["image_size=..., the side of its images"]
    if unet["attention_levels"] and heads is None and head_dim is None:
        missing.append("num_heads=... or num_head_channels=..., as in its training")
    if missing:
        raise CheckpointError(f"{file}: the file does not say enough: pass {'; '.join(missing)}")
    upsamples = unet["in_channels"] == 6
    if upsamples != (flags["small_size"] is not None):
        advice = "small_size=..., the side of the images that it enlarges" if upsamples else "no small_size"
        raise CheckpointError(f"{file}: its U-Net has {unet['in_channels']} input channels: pass {advice}")
    learned = unet["out_channels"] == 6
    rules = prefixed("unet.", original_rules(unet, heads_first=not flags["use_new_attention_order"]))
    if "label_emb.weight" in tensors:
        unet["num_classes"] = shape_of(tensors, "label_emb.weight", 2, file)[0]
        rules["unet.label_embed.weight"] = MadeFrom(("label_emb.weight",))
    unet["time_dim"] = shape_of(tensors, "time_embed.0.weight", 2, file)[1]
    config = {
        "unet": unet, "image_size": flags["image_size"], "low_res_size": flags["small_size"],
        "schedule": flags["noise_schedule"], "timesteps": flags["diffusion_steps"],
        "prediction": "sample" if flags["predict_xstart"] else "epsilon",
        "variance": "learned_range" if learned else "fixed_large",
    }  # fmt: skip
    return config, translate(tensors, rules, file)
