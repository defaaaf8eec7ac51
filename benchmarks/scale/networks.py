"""What one sample costs each network: parameters, FLOPs and activations, counted on the real code.

    python -m benchmarks.scale.networks        counts all anew into benchmarks/results/scale-costs.json

The networks are built on torch's meta device, which has shapes and no data. FLOPs are those of torch's
FlopCounterMode for a forward pass: a multiplication and an addition are two, elementwise work is left out.
Activations are what autograd keeps of a forward pass in bfloat16 for the backward pass. On the meta device
our ops run as their references, which keep more than the fused kernels: the activations are an upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing.provenance import RESULTS
from dalle2_fast import CLIP, DiffusionPriorNetwork, UNet
from dalle2_fast.models.transformer import TextTransformer

FILE = RESULTS / "scale-costs.json"
CAPTION = 77  # tokens of CLIP's context
LONG_CAPTION = 256  # tokens of the context of the paper's decoder; unCLIP, 2204.06125, table 3
IMAGE_TOKENS = 4  # of the decoder's context; unCLIP, section 2.1
EMBEDDING = 768  # width of our default CLIP

# The image and the text tower of CLIPs. H/16: unCLIP, 2204.06125, appendix C, which names image size, widths
# and depths; heads of width 64 and a shared width of 1024 are our assumptions. L/14 is the default of our
# class; L/14 and B/32: Radford et al., 2103.00020, table 20.
CLIPS: dict[str, dict[str, Any]] = {
    "H/16": dict(dim_image=1280, visual_enc_depth=32, visual_heads=20, visual_image_size=256,
                 visual_patch_size=16, dim_text=1024, text_enc_depth=24, text_heads=16, dim_latent=1024),
    "L/14": {},
    "B/32": dict(dim_image=768, visual_enc_depth=12, visual_heads=12, visual_patch_size=32, dim_text=512,
                 text_enc_depth=12, text_heads=8, dim_latent=512),
}  # fmt: skip


class Cost(NamedTuple):
    """Of one sample.

    Args:
        parameters: of the network.
        flops: of the forward pass.
        activations: bytes kept for the backward pass.
    """

    parameters: int
    flops: float
    activations: float

    def plus(self, other: Cost) -> Cost:
        """Of both networks together."""
        return Cost(*(mine + its for mine, its in zip(self, other, strict=True)))


def measure(network: nn.Module, call: Callable[[], Any]) -> Cost:
    """Count `call`, which runs the network on one sample. All parameters of the network count."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets this address
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    activations = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops(), activations)


def _values(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _unet(size: int, context: int | None = None, **options: Any) -> Cost:
    net = UNet(**options).to(torch.bfloat16)
    text = () if context is None else (_values(1, context, net.cross_dim),)
    return measure(net, lambda: net(_values(1, net.in_channels, size, size), torch.zeros(1), *text))


def _text_tower(length: int, width: int, depth: int, heads: int) -> Cost:
    tower = TextTransformer(49408, length, width, depth, heads).to(torch.bfloat16)
    return measure(tower, lambda: tower.encode_tokens(torch.ones(1, length, dtype=torch.int64)))


def _prior(depth: int, length: int) -> Cost:
    net = DiffusionPriorNetwork(depth=depth, context_length=length, embed_dim=EMBEDDING).to(torch.bfloat16)
    embed, encodings = _values(1, EMBEDDING), _values(1, length, net.text_dim)
    return measure(net, lambda: net(embed, torch.zeros(1), embed, encodings))


def _image_side(name: str) -> Cost:
    clip = CLIP(**CLIPS[name])
    tower, image = clip.visual.to(torch.bfloat16), _values(1, 3, clip.image_size, clip.image_size)
    return measure(tower, lambda: tower(image))


def _text_side(name: str) -> Cost:
    clip = CLIP(**CLIPS[name], visual_kind=None).to(torch.bfloat16)
    return measure(clip, lambda: clip.encode_text(torch.ones(1, CAPTION, dtype=torch.int64)))


NETWORKS: dict[str, Callable[[], Cost]] = {
    **{f"CLIP {name} image": lambda name=name: _image_side(name) for name in CLIPS},
    **{f"CLIP {name} text": lambda name=name: _text_side(name) for name in CLIPS},
    "prior": lambda: _prior(20, CAPTION),
    # GLIDE: Nichol et al., 2112.10741, section 4: about 2.3 (U-Net) and 1.2 (text tower) billion parameters.
    "decoder 3.5 B": lambda: _unet(
        64, LONG_CAPTION + IMAGE_TOKENS, channels=(512, 1024, 1536, 2048), cross_dim=2048
    ),
    "decoder 3.5 B text": lambda: _text_tower(LONG_CAPTION, 2048, 24, 32),
    "decoder 0.9 B": lambda: _unet(64, CAPTION + IMAGE_TOKENS),
    "upsampler 64-256": lambda: _unet(64, in_channels=6, attention_levels=(), cross_dim=None),
    "upsampler 256-1024": lambda: _unet(
        256, in_channels=6, channels=(192, 192, 384, 384, 768, 768), layers_per_block=2, attention_levels=(),
        cross_dim=None,
    ),
}  # fmt: skip


def count(name: str) -> Cost:
    """Count a network."""
    with torch.device("meta"):
        return NETWORKS[name]()


def costs() -> dict[str, Cost]:
    """The costs of all networks, as they were counted."""
    return {name: Cost(*values) for name, values in json.loads(FILE.read_text()).items()}


if __name__ == "__main__":
    rows = (f" {json.dumps(name)}: {json.dumps(count(name))}" for name in NETWORKS)
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(FILE)
