"""Whole networks' rows of the registry: a call, or a loss and its gradient by all parameters; random weights.

On a GPU the sizes are Karlo's; what a CPU is given has the same parts with a tenth of the widths. "reference"
is our own network with none of its ops fused, which on a CPU is what runs anyway. diffusers' and open_clip's
networks have the same weights as ours and are held to the same float64 truth.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.registry import CASES, Case, add, compiled, drawer, needs, running
from benchmarks.timing.provenance import parameters
from dalle2_fast import CLIP, DiffusionPriorNetwork, UNet


@dataclass(frozen=True)
class Sizes:
    """The arguments of each network where they are not the defaults, which are Karlo's."""

    device: str
    decoder: dict = field(default_factory=dict)
    upsampler: dict = field(default_factory=dict)
    prior: dict = field(default_factory=dict)
    clip: dict = field(default_factory=dict)
    pixels: int = 64  # of a side of the decoder's image; the upsampler's has four times as many
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
    tokens=11,  # and 4 of the image: never as many as pixels, or diffusers does not pad its mask
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


def made(build: Callable[[Sizes], nn.Module], sizes: Sizes, device: str, dtype: torch.dtype) -> nn.Module:
    """Seeded; and no parameter is left at zero, where much of a network would have no gradient."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = build(sizes)
        if device != "meta":
            shake(net)
    return net.to(dtype).eval()


def shake(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


# ---------------------------------------------------------------------------------------- what they are given


def unet_inputs(sizes: Sizes, net: UNet, batch: int, device: str, dtype: torch.dtype) -> dict:
    draw = drawer(device, dtype)
    side = sizes.pixels * (1 if net.cross_dim else 4)
    given = dict(sample=draw(batch, net.in_channels, side, side),
                 timestep=torch.arange(1, batch + 1, device=device) * 7.0)  # fmt: skip
    if net.cross_dim:
        tokens = sizes.tokens + 4  # of the image embedding
        lengths = torch.arange(batch, device=device) * 7 % sizes.tokens + 5
        given |= dict(encoder_hidden_states=draw(batch, tokens, net.cross_dim),
                      class_labels=draw(batch, net.embed_dim),
                      attention_mask=torch.arange(tokens, device=device) < lengths[:, None])  # fmt: skip
    return given


def prior_inputs(
    sizes: Sizes, net: DiffusionPriorNetwork, batch: int, device: str, dtype: torch.dtype
) -> dict:
    draw = drawer(device, dtype)
    lengths = torch.arange(batch, device=device) * 7 % sizes.tokens + 2
    return dict(hidden_states=draw(batch, net.embed_dim),
                timestep=torch.arange(1, batch + 1, device=device) * 7.0,
                proj_embedding=draw(batch, net.embed_dim),
                encoder_hidden_states=draw(batch, sizes.tokens, net.text_dim),
                attention_mask=torch.arange(sizes.tokens, device=device) < lengths[:, None])  # fmt: skip


def clip_inputs(sizes: Sizes, net: CLIP, batch: int, device: str, dtype: torch.dtype) -> dict:
    side, tokens = net.image_size, sizes.tokens
    place = torch.arange(tokens, device=device)
    text = (place + torch.arange(batch, device=device)[:, None]) % (net.config["num_text_tokens"] - 2) + 1
    text[:, -1] = net.config["num_text_tokens"] - 1  # open_clip reads the embedding at the largest token
    images = drawer(device, dtype)(batch, 3, side, side).sigmoid()
    return dict(text=text, images=images.bfloat16().to(dtype))


def forward(impl: str, net: nn.Module, **inputs) -> Tensor:
    with running(impl):
        return net(**inputs)


def unet_loss(impl: str, net: UNet, **inputs) -> Tensor:
    with running(impl):
        return squared(net(**inputs), inputs["sample"])


def squared(output: Tensor, sample: Tensor) -> Tensor:
    """Of the predicted noise, in float32; the sample will do for the noise."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    return F.mse_loss(output[:, :3].to(wide), sample[:, :3].to(wide))


# ----------------------------------------------------------------------------------------------------- rivals


class Foreign:
    """A network of another package with the weights of ours.

    build(net) -> module on the default device; share(net, module) gives one of them the other's weights;
    call(module, **inputs) -> what ours returns.
    """

    def __init__(self, build: Callable, share: Callable, call: Callable):
        self.build, self.share, self.call = build, share, call
        self.modules = weakref.WeakKeyDictionary()

    def ready(self, inputs: dict) -> nn.Module:
        net = inputs["net"]
        if net not in self.modules:
            where = next(net.parameters())
            with torch.random.fork_rng(), torch.device(where.device):
                torch.manual_seed(1)
                module = self.build(net).to(where.dtype).eval()
            self.share(net, module)
            self.modules[net] = module
        return self.modules[net]

    def leaves(self, inputs: dict) -> list[Tensor]:
        return list(self.ready(inputs).parameters())

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        return self.call(self.ready(dict(net=net)), **inputs)


def diffusers_unet(net: UNet, **changes) -> nn.Module:
    from benchmarks.cases import foreign_unets

    config = net.config
    changes |= dict(block_out_channels=tuple(config["channels"]), norm_num_groups=config["num_groups"],
                   layers_per_block=config["layers_per_block"][0])  # fmt: skip
    if net.cross_dim is None:
        return foreign_unets.build("karlo upsampler", **changes)
    changes |= dict(attention_head_dim=config["head_dim"][0], cross_attention_dim=net.cross_dim)
    return foreign_unets.build("karlo decoder", **changes)


def take_unet(net: UNet, theirs: nn.Module) -> None:
    from dalle2_fast.checkpoints.formats.renaming import translate
    from dalle2_fast.checkpoints.formats.unet_keys import diffusers_rules

    net.load_state_dict(translate(theirs.state_dict(), diffusers_rules(net.config), "diffusers"))


def call_unet(module: nn.Module, **inputs) -> Tensor:
    return module(**inputs).sample


def call_unet_loss(module: nn.Module, **inputs) -> Tensor:
    return squared(module(**inputs).sample, inputs["sample"])


def diffusers_prior(net: DiffusionPriorNetwork) -> nn.Module:
    from diffusers import PriorTransformer

    config = net.config
    return PriorTransformer(
        num_attention_heads=config["heads"], attention_head_dim=config["dim_head"],
        num_layers=config["depth"], embedding_dim=config["embed_dim"],
        num_embeddings=config["context_length"], additional_embeddings=4,
    )  # fmt: skip


def take_prior(net: DiffusionPriorNetwork, theirs: nn.Module) -> None:
    from dalle2_fast.checkpoints.formats.diffusers import prior_rules
    from dalle2_fast.checkpoints.formats.renaming import translate

    # Statistics of the embeddings, which in ours the DiffusionPrior around the net has.
    both = translate(theirs.state_dict(), prior_rules(net.config["depth"]), "diffusers")
    net.load_state_dict({name[4:]: value for name, value in both.items() if name.startswith("net.")})


def call_prior(module: nn.Module, **inputs) -> Tensor:
    return module(**inputs).predicted_image_embedding


def open_clip_model(net: CLIP) -> nn.Module:
    from open_clip.model import CLIP as Theirs
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    config = net.config
    vision = CLIPVisionCfg(layers=config["visual_enc_depth"], width=config["dim_image"],
                           head_width=config["dim_image"] // config["visual_heads"],
                           patch_size=config["visual_patch_size"], image_size=net.image_size)  # fmt: skip
    text = CLIPTextCfg(context_length=config["text_seq_len"], vocab_size=config["num_text_tokens"],
                       width=config["dim_text"], heads=config["text_heads"],
                       layers=config["text_enc_depth"])  # fmt: skip
    return Theirs(config["dim_latent"], vision, text, quick_gelu=config["quick_gelu"])


def give_open_clip(net: CLIP, theirs: nn.Module) -> None:
    theirs.load_state_dict(net.state_dict())
    mean, std = (torch.tensor(getattr(net, name)) for name in ("image_mean", "image_std"))
    theirs.normalisation = [value[:, None, None].to(net.text_projection) for value in (mean, std)]


def call_open_clip(module: nn.Module, text: Tensor, images: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    mean, std = module.normalisation
    return ClipLoss()(*module((images - mean) / std, text)).float()


# ----------------------------------------------------------------------------------------------- the registry


def flops_of(case: Case) -> int:
    """Of the products and convolutions, counted on tensors without storage."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = case.make("meta", torch.bfloat16, False)
    with FlopCounterMode(display=False) as counter:
        case.ours("reference", **inputs)
    return counter.get_total_flops() * (3 if case.backward else 1)  # a gradient is two products for each


def add_network(name, sizes, build, inputs_of, batch, call, rivals, *, gradient=False, checked=1):
    """checked: the batch of the check before the time. The truth of a training batch would not fit."""

    def make(device, dtype, tiny):
        size = TINY if tiny else sizes
        net = made(build, size, device, dtype)
        return dict(net=net, **inputs_of(size, net, 2 if tiny else batch, device, dtype))

    def make_check(device, dtype):
        net = made(build, sizes, device, dtype)
        # Convolutions of 256 x 256 pixels in float64 take long.
        size = replace(sizes, pixels=sizes.pixels // 4) if build is upsampler else sizes
        return dict(net=net, **inputs_of(size, net, checked, device, dtype))

    def reference(**inputs):
        return call("reference", **inputs)

    if sizes.device == "cuda":
        own = {"reference": reference, "compile": compiled(reference, network=True)}
    else:
        own = {"reference": "on a CPU it is the same", "compile": compiled(reference, network=True)}
    title = f"{name}, batch {batch}" + (" (CPU)" if sizes.device == "cpu" else "")

    @functools.cache
    def weights() -> int:
        return parameters(made(build, sizes, "meta", torch.bfloat16)) * (2 if sizes.device == "cuda" else 4)

    add(
        Case(
            title,
            make,
            call,
            own | rivals,
            bytes=lambda: weights() * (3 if gradient else 1),
            flops=functools.cache(lambda: flops_of(CASES[title])),
            images=batch,
            device=sizes.device,
            backward=("net",) if gradient else (),
            with_forward=gradient,
            same_bits=False,
            make_check=make_check,
        )
    )


def add_networks(sizes: Sizes) -> None:
    gpu = sizes.device == "cuda"
    unets = {"diffusers": needs("diffusers", Foreign(diffusers_unet, take_unet, call_unet))}
    unet_losses = {"diffusers": needs("diffusers", Foreign(diffusers_unet, take_unet, call_unet_loss))}
    priors = {"diffusers": needs("diffusers", Foreign(diffusers_prior, take_prior, call_prior))}
    clips = {"open_clip": needs("open_clip", Foreign(open_clip_model, give_open_clip, call_open_clip))}
    add_network("decoder forward", sizes, decoder, unet_inputs, 2, forward, unets)
    if gpu:
        add_network("decoder forward", sizes, decoder, unet_inputs, 16, forward, unets)
    add_network("upsampler forward", sizes, upsampler, unet_inputs, 1, forward, unets)
    add_network("prior forward", sizes, prior, prior_inputs, 2, forward, priors)
    add_network("decoder loss and gradient", sizes, decoder, unet_inputs, 8, unet_loss, unet_losses,
                gradient=True)  # fmt: skip
    add_network("upsampler loss and gradient", sizes, upsampler, unet_inputs, 1, unet_loss, unet_losses,
                gradient=True)  # fmt: skip
    add_network("clip loss and gradient", sizes, clip, clip_inputs, 64, forward, clips, gradient=True,
                checked=8)  # fmt: skip


add_networks(KARLO)
add_networks(SMALL)
