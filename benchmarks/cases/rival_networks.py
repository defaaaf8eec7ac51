"""Networks of diffusers and open_clip that have the same weights as ours."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.registry import needs
from dalle2_fast import CLIP, DiffusionPriorNetwork, UNet
from dalle2_fast.ops._dtypes import compute_dtype


def noise_loss(output: Tensor, sample: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, in float32; `sample` stands for the noise."""
    dtype = compute_dtype(output.dtype)
    return F.mse_loss(output[:, :3].to(dtype), sample[:, :3].to(dtype))


def built_like(net: nn.Module, build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """build(net) on the device of `net` and in its dtype."""
    like = next(net.parameters())
    with torch.random.fork_rng(), torch.device(like.device):
        torch.manual_seed(1)
        return build(net).to(like.dtype).train()


class RivalNetwork:
    """A network of another package that has the weights of ours; one is built for each network of ours.

    build(net) -> module on the default device.
    copy_weights(net, module) copies the weights of one of the two to the other.
    call(module, **inputs) -> the same outputs as our network.
    """

    def __init__(self, build: Callable, copy_weights: Callable, call: Callable):
        self.build, self.copy_weights, self.call = build, copy_weights, call
        self.modules = weakref.WeakKeyDictionary()

    def ready(self, inputs: dict) -> nn.Module:
        net = inputs["net"]
        if net not in self.modules:
            module = built_like(net, self.build).eval()
            self.copy_weights(net, module)
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


def copy_unet_weights(net: UNet, theirs: nn.Module) -> None:
    from dalle2_fast.checkpoints.formats.renaming import translate
    from dalle2_fast.checkpoints.formats.unet_keys import diffusers_rules

    net.load_state_dict(translate(theirs.state_dict(), diffusers_rules(net.config), "diffusers"))


def call_unet(module: nn.Module, **inputs) -> Tensor:
    return module(**inputs).sample


def call_unet_loss(module: nn.Module, **inputs) -> Tensor:
    return noise_loss(module(**inputs).sample, inputs["sample"])


def diffusers_prior(net: DiffusionPriorNetwork) -> nn.Module:
    from diffusers import PriorTransformer

    config = net.config
    return PriorTransformer(
        num_attention_heads=config["heads"], attention_head_dim=config["dim_head"],
        num_layers=config["depth"], embedding_dim=config["embed_dim"],
        num_embeddings=config["context_length"], additional_embeddings=4,
    )  # fmt: skip


def copy_prior_weights(net: DiffusionPriorNetwork, theirs: nn.Module) -> None:
    from dalle2_fast.checkpoints.formats.karlo_keys import diffusers_prior_rules
    from dalle2_fast.checkpoints.formats.renaming import translate

    # The rest are statistics of the embeddings. In ours they belong to DiffusionPrior, which holds the net.
    both = translate(theirs.state_dict(), diffusers_prior_rules(net.config["depth"]), "diffusers")
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


def copy_clip_weights(net: CLIP, theirs: nn.Module) -> None:
    theirs.load_state_dict(net.state_dict())
    mean, std = (torch.tensor(getattr(net, name)) for name in ("image_mean", "image_std"))
    theirs.normalisation = [value[:, None, None].to(net.text_projection) for value in (mean, std)]


def call_open_clip(module: nn.Module, text: Tensor, images: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    mean, std = module.normalisation
    return ClipLoss()(*module((images - mean) / std, text)).float()


DIFFUSERS_UNET = needs("diffusers", RivalNetwork(diffusers_unet, copy_unet_weights, call_unet))
DIFFUSERS_UNET_LOSS = needs("diffusers", RivalNetwork(diffusers_unet, copy_unet_weights, call_unet_loss))
DIFFUSERS_PRIOR = needs("diffusers", RivalNetwork(diffusers_prior, copy_prior_weights, call_prior))
OPEN_CLIP = needs("open_clip", RivalNetwork(open_clip_model, copy_clip_weights, call_open_clip))
