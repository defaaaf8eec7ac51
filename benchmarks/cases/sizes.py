"""Sizes, weights and inputs of whole networks: Karlo's on a GPU, small ones on a CPU, tiny ones in checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.cases.registry import rounded_randn
from dalle2_fast import CLIP, DiffusionPriorNetwork, UNet


@dataclass(frozen=True)
class Sizes:
    """Arguments of each network that differ from the defaults, which are Karlo's."""

    device: str
    decoder: dict = field(default_factory=dict)
    upsampler: dict = field(default_factory=dict)
    prior: dict = field(default_factory=dict)
    clip: dict = field(default_factory=dict)
    pixels: int = 64  # side of the decoder's image; the upsampler's is four times as long
    tokens: int = 77


_SMALL_UNET = dict(channels=(32, 64, 96, 128), layers_per_block=1, num_groups=8)
KARLO = Sizes("cuda")
SMALL = Sizes(
    "cpu",
    decoder=dict(_SMALL_UNET, head_dim=32, cross_dim=128),
    upsampler=dict(_SMALL_UNET),
    prior=dict(dim=256, depth=4, heads=8, dim_head=32, embed_dim=96, text_dim=96, context_length=20),
    clip=dict(dim_text=96, dim_image=128, dim_latent=96, num_text_tokens=1000, text_enc_depth=4,
              text_seq_len=20, text_heads=4, visual_enc_depth=4, visual_heads=4, visual_image_size=64,
              visual_patch_size=8),
    pixels=32,
    tokens=20,
)  # fmt: skip
TINY = Sizes(
    "cpu",
    decoder=dict(channels=(8, 16, 24, 32), layers_per_block=1, num_groups=4, head_dim=8, cross_dim=16),
    upsampler=dict(channels=(8, 16, 24, 32), layers_per_block=1, num_groups=4),
    prior=dict(dim=16, depth=1, heads=2, dim_head=8, embed_dim=12, text_dim=12, context_length=11),
    clip=dict(dim_text=12, dim_image=16, dim_latent=12, num_text_tokens=20, text_enc_depth=1, text_seq_len=11,
              text_heads=2, visual_enc_depth=1, visual_heads=2, visual_image_size=8, visual_patch_size=4),
    pixels=8,
    tokens=11,  # with the 4 of the image: not as many as pixels, else diffusers does not pad its mask
)  # fmt: skip


def decoder(sizes: Sizes) -> UNet:
    return UNet(**sizes.decoder)


def upsampler(sizes: Sizes) -> UNet:
    return UNet(in_channels=6, out_channels=3, film=False, cross_dim=None,
                **(dict(attention_levels=()) | sizes.upsampler))  # fmt: skip


def prior(sizes: Sizes) -> DiffusionPriorNetwork:
    return DiffusionPriorNetwork(**sizes.prior)


def clip(sizes: Sizes) -> CLIP:
    return CLIP(**sizes.clip)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def nearest_in_size(build: Callable[..., nn.Module], options: Iterable, target: int) -> nn.Module:
    """build(option) for the option whose parameter count is nearest to `target`; the others stay on meta."""

    def distance(option) -> float:
        with torch.device("meta"):
            return abs(math.log(parameter_count(build(option)) / target))

    return build(min(options, key=distance))


def seeded_network(
    build: Callable[[Sizes], nn.Module], sizes: Sizes, device: str, dtype: torch.dtype
) -> nn.Module:
    """build(sizes) with seeded weights and without layers of zeros, which would cut off many gradients."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = build(sizes)
        if device != "meta":
            fill_zeros(net)
    return net.to(dtype).eval()


def parameters_of(build: Callable[[Sizes], nn.Module], sizes: Sizes) -> int:
    """The parameter count of build(sizes), without memory for its weights."""
    return parameter_count(seeded_network(build, sizes, "meta", torch.bfloat16))


def check_sizes(theirs: dict[str, nn.Module], ours: dict[str, nn.Module], tolerance: float = 0.01) -> None:
    for name, module in theirs.items():
        wanted, got = parameter_count(ours[name]), parameter_count(module)
        if abs(got - wanted) > tolerance * wanted > 1e5:  # tiny networks of a test cannot come that near
            raise RuntimeError(f"{name}: expected about {wanted} parameters, got {got}: not the same job")


def fill_zeros(net: nn.Module) -> None:
    """Random numbers for every parameter that is initialised with zeros."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


# ----------------------------------------------------------------------------------------------------- inputs


def unet_inputs(sizes: Sizes, net: UNet, batch: int, device: str, dtype: torch.dtype) -> dict:
    randn = rounded_randn(device, dtype)
    side = sizes.pixels * (1 if net.cross_dim else 4)
    given = dict(sample=randn(batch, net.in_channels, side, side),
                 timestep=torch.arange(1, batch + 1, device=device) * 7.0)  # fmt: skip
    if net.cross_dim:
        tokens = sizes.tokens + 4  # 4 tokens are projected from the image embedding
        lengths = torch.arange(batch, device=device) * 7 % sizes.tokens + 5
        given |= dict(encoder_hidden_states=randn(batch, tokens, net.cross_dim),
                      class_labels=randn(batch, net.embed_dim),
                      attention_mask=torch.arange(tokens, device=device) < lengths[:, None])  # fmt: skip
    return given


def prior_inputs(
    sizes: Sizes, net: DiffusionPriorNetwork, batch: int, device: str, dtype: torch.dtype
) -> dict:
    randn = rounded_randn(device, dtype)
    lengths = torch.arange(batch, device=device) * 7 % sizes.tokens + 2
    return dict(hidden_states=randn(batch, net.embed_dim),
                timestep=torch.arange(1, batch + 1, device=device) * 7.0,
                proj_embedding=randn(batch, net.embed_dim),
                encoder_hidden_states=randn(batch, sizes.tokens, net.text_dim),
                attention_mask=torch.arange(sizes.tokens, device=device) < lengths[:, None])  # fmt: skip


def clip_inputs(sizes: Sizes, net: CLIP, batch: int, device: str, dtype: torch.dtype) -> dict:
    side, tokens = net.image_size, sizes.tokens
    position = torch.arange(tokens, device=device)
    text = (position + torch.arange(batch, device=device)[:, None]) % (net.config["num_text_tokens"] - 2) + 1
    text[:, -1] = net.config["num_text_tokens"] - 1  # open_clip reads the embedding at the largest token
    images = rounded_randn(device, dtype)(batch, 3, side, side).sigmoid()
    return dict(text=text, images=images.bfloat16().to(dtype))
